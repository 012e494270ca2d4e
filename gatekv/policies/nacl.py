"""NACL (arXiv 2408.03675): one cut after the prompt; some tokens by what the last ones attend to, some by lot."""

from dataclasses import dataclass

import torch

from gatekv.ops.attention_mass import attention_mass
from gatekv.policies.budgets import top
from gatekv.policies.controls import hashed
from gatekv.policies.scorer import ALL, Scorer, View


@dataclass
class NACL(Scorer):
    """Of what a head may keep: sinks and recent tokens, then the best by the attention a that the prompt's last tokens
    ("proxies") pay, summed over proxies, mean over a group; the rest is drawn without replacement, by softmax of a
    (Gumbel's trick: the highest a + noise). The paper's 1 : 12 : 7 % of the prompt are shares of any budget here.

    A draw hangs on (seed, layer, head, index in the row) alone, so that no batch and no padding changes it. a is at
    most the number of proxies, so the lot is nearly even, as in the authors' code. There the recent tokens of a short
    prompt, int(1 % of it) - sinks, come out below none; here at least `window` stay. Proxies look at no later token
    (theirs do).

    Args:
        proxies: share of the prompt whose queries are asked, its last; at least one. sampled: share of what is not
            protected that is drawn. recent_share: of the budget, sinks among it. seed: of the draw.
    """

    proxies: float = 0.01
    sampled: float = 7 / 19
    recent_share: float = 0.05
    seed: int = 0
    sinks: int = 4
    window: int = 1
    queries = ALL

    def __post_init__(self) -> None:
        for name, value in (("proxies", self.proxies), ("sampled", self.sampled), ("recent_share", self.recent_share)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a share, 0 to 1; got {value}.")

    def recent(self, counts: torch.Tensor, window: int) -> torch.Tensor:
        return ((counts * self.recent_share).long() - self.sinks).clamp_min(window)

    def attention(self, view: View) -> torch.Tensor:
        """[batch, kv_heads, tokens]: what the proxies pay; each row has its own number of them."""
        count = (view.valid.sum(-1, keepdim=True) * self.proxies).long().clamp_min(1)
        most = min(int(count.max()), view.keys.shape[2])
        asks = torch.arange(most, 0, -1, device=count.device) <= count
        asked = view.queries[:, :, -most:]
        asks, sinks = asks & view.valid[:, -most:], view.learned_sinks
        return attention_mass(asked, view.keys, scale=view.scaling, valid=view.valid, asks=asks, sinks=sinks)

    def score(self, view: View) -> torch.Tensor:
        draw = (hashed(self.seed, view).double() + 0.5) / 2**32
        return self.attention(view) - (-draw.log()).log()

    def always_keep(self, view: View, protected: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        free = (counts[:, None] - protected.sum(-1)).clamp_min(0)
        best = free - (free * self.sampled).round().long()
        rivals = self.attention(view).masked_fill(protected | ~view.valid[:, None], -torch.inf)
        return top(rivals, best[..., None]) | protected
