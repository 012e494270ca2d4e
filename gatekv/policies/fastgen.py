"""FastGen (arXiv 2310.01801): each head keeps by the cheapest rule that still finds most of its attention."""

import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from gatekv.ops.attention_mass import attention_mass, local_mass
from gatekv.policies.budgets import Global, top
from gatekv.policies.controls import real_index
from gatekv.policies.scorer import ALL, Scorer, View

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL, PUNCTUATION = 1, 2
TIE = 1e-4  # of the mass: within a step the best attended come first


def token_kinds(tokenizer: "PreTrainedTokenizerBase") -> torch.Tensor:
    """[vocabulary] int8: SPECIAL for the tokenizer's special tokens, PUNCTUATION for tokens of nothing else, or 0.

    `token_kinds(tokenizer)[input_ids]` is what `KVCache(…, kinds=…)` takes.
    """
    special, marks = set(tokenizer.all_special_ids), set(string.punctuation)
    texts = (cast(str, tokenizer.decode([i])).strip() for i in range(len(tokenizer)))
    return torch.tensor(
        [
            SPECIAL if i in special else PUNCTUATION if text and set(text) <= marks else 0
            for i, text in enumerate(texts)
        ],
        dtype=torch.int8,
    )


@dataclass
class FastGen(Scorer):
    """A head's profile is how much of the attention that the prompt's queries pay is found by (§3): special tokens (and
    sinks); punctuation too; the most attended too; each query's last tokens too; everything. It keeps the first of
    these that finds `recover` of it. Decides once; where the paper then follows each head's rule while decoding, later
    tokens stay here.

    Without a budget this is all. Under a budget every head and layer of a row shares one `recover`, the highest that
    fits: score = recover - what a head's cheaper rules find already, so that the step which a head needs most comes
    first; the last step is filled up to the budget. `recover` itself then means nothing.

    Args:
        recover: r, share of the attention (paper: about .95). heavy, local: sizes of these two rules, shares of the
            prompt (paper: .3). sinks: first tokens that count as special.
    """

    recover: float = 0.95
    heavy: float = 0.3
    local: float = 0.3
    sinks: int = 1
    queries = ALL
    partners = {"rule": Global}
    absolute = True
    kinds = True

    def __post_init__(self) -> None:
        if not 0 < self.recover <= 1:
            raise ValueError(f"recover is a share of the attention, above 0 and at most 1; got {self.recover}.")
        for name, value in (("heavy", self.heavy), ("local", self.local)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a share of the prompt, 0 to 1; got {value}.")

    def steps(self, view: View) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(step [batch, kv_heads, tokens] at which a token joins, 0 to 4; what a head finds before each of the steps
        [batch, kv_heads, 5], as a share; attention received [batch, kv_heads, tokens])."""
        valid, index, length = view.valid, real_index(view.valid), view.valid.sum(-1)
        sinks = view.learned_sinks
        mass = attention_mass(view.queries, view.keys, scale=view.scaling, valid=valid, sinks=sinks)
        kinds = torch.zeros_like(index) if view.kinds is None else view.kinds
        heavy = top(mass.masked_fill(~valid[:, None], -torch.inf), (length * self.heavy).long()[:, None, None])
        near = (length * self.local).long()
        joins = [((kinds == SPECIAL) | (index < self.sinks))[:, None], (kinds == PUNCTUATION)[:, None], heavy]
        joins += [(index >= (length - near)[:, None])[:, None]]
        step = torch.full(mass.shape, 4, device=mass.device)
        for i in (3, 2, 1, 0):
            step = step.masked_fill(joins[i] & valid[:, None], i)
        found = [mass.new_zeros(mass.shape[:2])] + [(mass * (step <= i)).sum(-1) for i in range(3)]
        beside = (step <= 2) & valid[:, None]
        asked = view.queries, view.keys
        close = local_mass(*asked, scale=view.scaling, valid=valid, near=near, beside=beside, sinks=sinks)
        before = torch.stack([*found, found[-1] + close], -1) / length[:, None, None].clamp_min(1)
        return step, before, mass

    def score(self, view: View) -> torch.Tensor:
        step, before, mass = self.steps(view)
        order = mass.masked_fill(~view.valid[:, None], -torch.inf).argsort(dim=-1, descending=True, stable=True)
        place = order.argsort(dim=-1) / view.valid.sum(-1)[:, None, None].clamp_min(1)
        return self.recover - before.gather(-1, step) - TIE * place
