"""The end of a prompt or turn, as pure functions: how much room there is, and which tokens of which heads get it."""

from typing import NamedTuple, cast

import torch
from transformers.utils import logging

from gatekv.attention import sink_tokens
from gatekv.cache.allocation import Undecided, allocated
from gatekv.cache.config import CacheConfig
from gatekv.policies.amount import Amount, budget_text, count_of, share_of
from gatekv.policies.budgets import BudgetError, Ranking, ranked, too_small
from gatekv.policies.layers import layer_count, whole_layers
from gatekv.precision import without_autocast

Tensor = torch.Tensor
logger = logging.get_logger(__name__)


class Selection(NamedTuple):
    """What a decision leaves to one layer.

    Attributes:
        keep: [batch, kv_heads, n] bool. cut: [batch, 1 or kv_heads, 1], the logit that later tokens must exceed, or
        None: they all stay. scores: as they were ranked. recent: [batch], how many last tokens stay in any case.
        unmet: [batch] bool, rows that hold what is not their budget. bits: [batch, kv_heads, n, 2] uint8, of each
        token's key and value, where the policy's width says so; else None.
    """

    keep: Tensor
    cut: Tensor | None
    scores: Tensor
    recent: Tensor
    unmet: Tensor
    bits: Tensor | None = None


# -- how much room


def needed(config: CacheConfig, length: int, counts: Tensor, before: int = 0) -> Tensor:
    """The least that heads with room for counts [...] tokens can hold of a row: sinks and last tokens, or one token.

    length: real tokens of the row's prompt or turn; before: of what came earlier, sinks among them.
    """
    recent = config.policy.scorer.recent(counts, config.window)
    width, scorer = config.policy.width, config.policy.scorer
    if width is not None:
        everything = width.allots and not scorer.evicts
        recent = width.least(torch.full_like(recent, length) if everything else recent, *config.token)
    return (recent + max(config.sinks - before, 0)).clamp_min(1).clamp_max(length)


def rooms(config: CacheConfig, length: int, before: int = 0, row: int = 0) -> tuple[list[int], str | None]:
    """(tokens that a head of each layer keeps of a row on average; why that is not its budget, or None).

    Told from the row's length alone (as for `needed`): all of it where a threshold without a budget decides, which
    depends on the text. A row whose budget is below what the policy protects is held whole; where layers that are left
    whole cost more than all of the budget ("unreachable"), the others hold what is protected. row: its number, to name.
    """
    policy, layers, everything = config.policy, config.layers, [length] * config.layers
    if policy.budget is None and config.needs.scope == "token":
        return everything, None
    if config.needs.scope == "token":
        counts = torch.full((layers,), count_of(policy.budget, length))
    else:
        share, guarded, skip = share_of(policy.budget, length), config.sinks + config.window, policy.scorer.skip_layers
        try:
            counts = torch.tensor(
                [layer_count(policy.layers, skip, share, length, guarded, i, layers) for i in range(layers)]
            )
        except BudgetError as error:
            skipped, _ = whole_layers(skip, 1.0, layers)
            least = int(needed(config, length, torch.zeros(1, dtype=torch.long), before))
            return [length if i in skipped else least for i in range(layers)], str(error)
    need = needed(config, length, counts, before)
    if bool((counts >= need).all()):
        return counts.tolist(), None
    worst = int((need - counts).argmax())
    why = too_small(cast(Amount, policy.budget), length, row, int(counts[worst]), int(need[worst]))
    # A threshold that does not know where the prompt ends has evicted what left the window before it could be seen.
    return (everything if config.knows_end else need.tolist()), why


def admit(config: CacheConfig, length: int, before: int = 0, row: int = 0) -> tuple[list[int], bool]:
    """(tokens that a head of each layer keeps of a row on average, whether they are its budget); see `rooms`.

    Raises:
        BudgetError: where they are not, in a strict cache.
    """
    counts, why = rooms(config, length, before, row)
    if why is not None and config.strict:
        raise BudgetError(why)
    if why is not None:
        logger.warning_once(
            f"gatekv: a budget of {budget_text(config.policy.budget)} cannot be kept for every prompt under "
            f"{config.policy}; prompts too short for it are held whole, see KVCache.memory(). strict=True refuses them."
        )
    return counts, why is None


def admit_rows(config: CacheConfig, lengths: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens a head [layers, batch], rows that hold what is not their budget [batch] bool), for rows of so many real
    tokens lengths [batch] behind so many before [batch]; BudgetError in a strict cache."""
    rows = enumerate(zip(*torch.stack([lengths, before]).tolist()))
    found = [admit(config, length, earlier, row) for row, (length, earlier) in rows]
    counts = torch.tensor([counts for counts, _ in found], device=lengths.device).T
    return counts, torch.tensor([not kept for _, kept in found], device=lengths.device)


# -- who gets it


def protected_tokens(config: CacheConfig, valid: Tensor, before: Tensor, recent: Tensor | int) -> Tensor:
    """[batch, 1, n] bool: the sinks and the last `recent` ([batch], or a number) of the slots valid [batch, n], where
    `before` [batch, 1] real tokens came earlier."""
    n = valid.shape[1]
    sinks = sink_tokens(valid, config.sinks, before)
    last = torch.as_tensor(recent, device=valid.device).view(-1, 1)
    return (sinks | (valid & (torch.arange(n, device=valid.device) >= n - last)))[:, None]


def choose(config: CacheConfig, layers: list[Undecided], valid: Tensor) -> list[Selection]:
    """Which tokens of a prompt or turn stay, for layers that decide together; valid: [batch, n], False at pads.

    Scores travel to the first layer's device, and flags back. Raises BudgetError in a strict cache.
    """
    with without_autocast(valid.device):
        return _choose(config, layers, valid)


def _choose(config: CacheConfig, layers: list[Undecided], valid: Tensor) -> list[Selection]:
    policy, home = config.policy, valid.device
    counts, unmet = admit_rows(config, valid.sum(-1), layers[0].before[:, 0].to(home))
    scores = torch.stack([layer.scores.to(home) for layer in layers])
    if policy.layers.scope == "model" and bool((~unmet).any()):
        shared = _shared(config, scores[:, ~unmet], valid[~unmet], counts[:, ~unmet])
        counts[:, ~unmet] = shared
    counts = torch.stack([counts[layer.place] for layer in layers])
    recent = policy.scorer.recent(counts, config.window)
    guarded: list[Tensor] = []
    for layer, count, last in zip(layers, counts, recent):
        there = layer.scores.device
        mine = protected_tokens(config, valid.to(there), layer.before, last.to(there))
        guarded.append(policy.scorer.always_keep(layer.view(), mine, count.to(there)).to(home))
    protected = torch.stack(guarded).expand(scores.shape)
    rule, bits = cast(Ranking, policy.rule), None  # a threshold decides nothing here
    if policy.width is not None and policy.width.allots:
        bits = allocated(config, layers, scores, protected, valid, counts)
        keep = (bits > 0).any(-1)
    else:
        keep = _never_none(rule.keep(scores, protected, valid, counts), scores, protected, valid)
    cuts: Tensor | list[None] = [None] * len(layers)
    if all(layer.logits is not None for layer in layers):
        logits = torch.stack([cast(Tensor, layer.logits).to(home) for layer in layers])
        alone = rule.keep(logits, protected, valid, counts) if config.dense_prefill and bits is None else keep
        cuts = logits.masked_fill(alone | protected | ~valid[:, None], -torch.inf).amax(-1, keepdim=True)
        if policy.rule.scope == "model":
            cuts = cuts.amax((0, 2), keepdim=True).expand(len(layers), -1, -1, -1)
    back = [layer.scores.device for layer in layers]
    return [
        Selection(
            k.to(to), None if c is None else c.to(to), s.to(to), r.to(to), unmet.to(to), None if b is None else b.to(to)
        )
        for k, c, s, r, b, to in zip(
            keep, cuts, scores, recent, bits if bits is not None else [None] * len(layers), back
        )
    ]


def _shared(config: CacheConfig, scores: Tensor, valid: Tensor, counts: Tensor) -> Tensor:
    """counts [layers, batch], which are even among the layers that are not left whole, shared out by what the layers'
    scores say; no layer gets less than it needs."""
    policy, layers = config.policy, config.layers
    skipped, _ = whole_layers(policy.scorer.skip_layers, 1.0, layers)
    if not (others := [i for i in range(layers) if i not in skipped]):
        return counts
    index = torch.tensor(others, device=counts.device)
    lengths, weights = valid.sum(-1).tolist(), policy.layers.weights(scores.index_select(0, index), valid)
    rows = []
    for w, n in zip(weights.T.tolist(), lengths):
        _, rest = whole_layers(policy.scorer.skip_layers, share_of(policy.budget, n), layers)
        found = torch.tensor(policy.layers.rooms(w, rest, n, config.sinks + config.window))
        rows.append(torch.maximum(found, needed(config, n, found)))
    return counts.index_copy(0, index, torch.stack(rows, -1).to(counts))


def _never_none(keep: Tensor, scores: Tensor, protected: Tensor, valid: Tensor) -> Tensor:
    """keep, and the best token of heads that compete and would be left with nothing; all as a rule takes them."""
    best = ranked(scores, protected, valid).argmax(-1, keepdim=True)
    best = torch.zeros_like(keep).scatter_(-1, best, True) & valid[:, None]
    return keep | (best & ~keep.any(-1, keepdim=True))
