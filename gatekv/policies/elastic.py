"""Elastic-Cache (arXiv 2407.18121): the prompt's lesser tokens merge into the nearest kept ones, then a fixed place
in the cache is cleared at every step."""

from dataclasses import dataclass

import torch

from gatekv.ops.attention_mass import attention_mass
from gatekv.policies.controls import real_index
from gatekv.policies.merging import MergeNear
from gatekv.policies.scorer import ALL, Scorer, View


@dataclass
class ElasticCache(Scorer):
    """At the prompt's end: score = attention received from all its queries; what is not kept merges (`MergeNear`).

    Then, at every step, the token goes that stands `window` places from the end, so that what the prompt left before
    these places stays, and later tokens pass through (fixed-point elimination). The authors keep a fixed share of all
    tokens so far, a growing cache; here it has the size that the prompt left, as every streaming policy has. Their
    heads share one set of tokens a layer; here each KV head has its own.

    Args:
        sinks: first tokens, kept and left as they are (authors' code: 4). window: the fixed place, counted from the end
            (authors' code: 25); so many last tokens of the prompt stay too.
    """

    sinks: int = 4
    window: int = 25
    queries = ALL
    evicts_in_decode = True
    decode = "evict"
    partners = {"remainder": MergeNear}

    def recent(self, counts: torch.Tensor, window: int) -> torch.Tensor:
        return counts.new_full(counts.shape, max(window, self.window))

    def score(self, view: View) -> torch.Tensor:
        index, length = real_index(view.valid), view.valid.sum(-1, keepdim=True)
        mass = attention_mass(view.queries, view.keys, scale=view.scaling, valid=view.valid, sinks=view.learned_sinks)
        passing = (index >= length - self.window)[:, None]
        return torch.where(passing, self.enter(view.keys, index).to(mass.dtype), mass)

    def enter(self, keys: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return (-1.0 - index)[:, None].expand(keys.shape[:3])
