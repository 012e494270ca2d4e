"""SnapKV (arXiv 2404.14469): keep what the last queries of the prompt attend to."""

from dataclasses import dataclass

import torch

from gatekv.config import check_choice
from gatekv.ops.learned_sinks import softmax
from gatekv.ops.naive import accumulation_dtype, causal_mask, group_queries
from gatekv.ops.scale import capped
from gatekv.policies.scorer import Scorer, View


def window_attention(view: View, window: int) -> torch.Tensor:
    """Softmax of the last `window` queries over all keys, causal: [batch, kv_heads, group, window, tokens].

    A row shorter than the window has pads among its last queries; they see nothing and count for nothing.
    """
    acc = accumulation_dtype(view.keys)
    q = group_queries(view.queries[:, :, -window:], view.keys.shape[1]).to(acc)
    s = capped(torch.einsum("bkgqd,bktd->bkgqt", q, view.keys.to(acc)) * view.scaling, view.scaling)
    seen = causal_mask(window, view.keys.shape[2], s.device) & view.valid[:, None, None, None]
    a = softmax(s.masked_fill(~seen, -torch.inf), view.learned_sinks).masked_fill(~seen, 0)
    return a.masked_fill(~view.valid[:, None, None, -window:, None], 0)


@dataclass
class SnapKV(Scorer):
    """Decides once, at the end of the prompt.

    A = softmax of the last `window` queries over all keys (causal inside the window), summed over the window, mean over
    the query heads of a group, pooled over positions (stride 1). The window itself is protected, nothing else is.

    Args:
        window: observation window, tokens (paper's LongBench runs: 32; kvpress: 64).
        kernel: pooling width, odd (paper: 7; kvpress: 5).
        pooling: "max" (paper's code for LongBench) or "mean".
        sinks: 0 in the paper.
    """

    window: int = 32
    kernel: int = 7
    pooling: str = "max"
    sinks: int = 0
    utility = "attention"

    def __post_init__(self) -> None:
        check_choice("pooling", self.pooling, ("max", "mean"))
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and at least 1, so that pooling stays centred; got {self.kernel}.")
        if self.window < 1:
            raise ValueError(f"SnapKV's window is its observation window and must be at least 1, not {self.window}.")
        self.queries = self.window

    def score(self, view: View) -> torch.Tensor:
        n, w = view.keys.shape[2], min(self.window, view.keys.shape[2])
        a = window_attention(view, w).sum(-2).mean(2)
        pool = torch.nn.functional.max_pool1d if self.pooling == "max" else torch.nn.functional.avg_pool1d
        older = pool(a[:, :, : n - w], self.kernel, stride=1, padding=self.kernel // 2) if n > w else a[:, :, :0]
        return torch.cat([older, a[:, :, n - w :]], -1)
