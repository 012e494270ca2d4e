"""Pads are no tokens, wherever they stand: every row answers as it does alone, whatever the policy."""

import pytest
import torch
from conftest import gated, tiny

import gatekv
from gatekv.policies import AdaKV, SnapKV, StreamingLLM

VOCAB = 90
GATE = dict(window=6, sinks=2)
POLICIES = {
    "full": ("full", None, {}),
    "snapkv": (SnapKV(window=8), 0.5, {}),
    "snapkv+ada": (AdaKV(SnapKV(window=8)), 0.5, {}),
    "snapkv+global": ("snapkv+global", 0.7, {}),
    "value_norm": ("value_norm", 0.5, {}),
    "random": ("random", 0.5, {}),
    "sinks_recent": ("sinks_recent", 0.5, {}),
    "nacl": ("nacl", 0.5, {}),
    "fastgen": ("fastgen", 0.5, {}),
    "h2o": ("h2o", 0.5, {}),
    "tova": ("tova", 0.5, {}),
    "streaming_llm": ("streaming_llm", 0.5, {}),
    "slot": (StreamingLLM(positions="cache"), 0.5, {}),
    "l2 evict": ("l2", 0.9, {"decode": "evict", "window": 1}),
    "elastic": ("elastic", 0.8, {}),
    "d2o": ("h2o+merge_similar", 0.5, {}),
    "think": ("snapkv+think", 0.8, {}),
    "qaq": ("qaq", None, {}),
    "h2o+qaq": ("h2o+qaq", 0.8, {"decode": "keep"}),
    "tova+rate": ("tova+rate", 0.5, {"decode": "keep"}),
    "gate+rate": ("gate+rate", 0.5, {}),
    "gate": ("gate", None, {}),
    "gate dense": ("gate", None, {"prefill": "dense"}),
    "attention gate": ("gate", None, {}),
    "late attention gate": ("gate", None, {}),
    "gate+global": ("gate+global", 0.5, {}),
    "gate+uniform": ("gate+uniform", 0.5, {}),
    "gate keep": ("gate+global", 0.5, {"decode": "keep"}),
    "decay": ("gate+decay", 0.5, {}),
    "snapkv+less": ("snapkv+less", 0.6, {}),
    "gate+less": ("gate+less", None, {}),
}
SINGLE = 24  # tokens one by one behind them: past a fold
LENGTHS = [(60, 9, 1, 1, 3), (47, 9, 1, 1, 7), (60, 2, 1, 0, 1), (52, 0, 0, 1, 7)]  # of each row, call by call


def model_of(name):
    if "gate" not in name and name not in ("decay", "snapkv+less"):
        return tiny()
    form = {
        "decay": dict(relaxation="decay"),
        "attention gate": dict(gate="attention", context_window=5),
        "late attention gate": dict(gate="attention", context_window=5, window=18),  # it reads sixteen at a time
    }.get(name, {})
    return gated(**GATE | form, **({"less_rank": 2} if "less" in name else {}))


def laid(rows: list[list[int]], where: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) [rows, longest] with each row's pads on the "left", the "right", or "anywhere"."""
    n = max(map(len, rows))
    mask = torch.zeros(len(rows), n, dtype=torch.long)
    for m, row in zip(mask, rows):
        at = {"left": range(n - len(row), n), "right": range(len(row))}.get(where)
        at = torch.randperm(n, generator=generator)[: len(row)].sort().values if at is None else torch.tensor([*at])
        m[at.long()] = 1
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.tensor([t for row in rows for t in row])
    return ids, mask


@torch.no_grad()
def answers(model, cache, calls: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """Per row, the logits of its real tokens in order; the calls' masks stand side by side."""
    found: list[list[torch.Tensor]] = [[] for _ in calls[0][0]]
    mask = calls[0][1][:, :0]
    for ids, new in calls:
        mask = torch.cat([mask, new], 1)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        assert out.isfinite().all()
        for row, logits, real in zip(found, out, new.bool()):
            row.append(logits[real])
    return [torch.cat(row) for row in found]


@pytest.mark.covering(1)  # every policy under every way of padding
@pytest.mark.parametrize("where", ["left", "right", "anywhere"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_row_among_pads_equals_the_row_alone(name, where):
    policy, budget, options = POLICIES[name]
    model, generator = model_of(name), torch.Generator().manual_seed(1)
    tokens = [torch.randint(1, VOCAB, (sum(n) + SINGLE,), generator=generator).tolist() for n in LENGTHS]
    cuts = [[n[: i + 1] for i in range(len(n))] for n in LENGTHS]
    rows = [[row[sum(c[:-1]) : sum(c)] for c in cut] + [[t] for t in row[-SINGLE:]] for row, cut in zip(tokens, cuts)]
    calls = [laid([row[i] for row in rows], where, generator) for i in range(len(rows[0]))]
    cache = gatekv.KVCache(model, policy, budget, **options)
    together, held = answers(model, cache, calls), cache.flags()
    mask = torch.cat([new for _, new in calls], 1).bool()
    for i, row in enumerate(rows):
        alone = gatekv.KVCache(model, policy, budget, **options)
        part = [(torch.tensor([call]), torch.ones(1, len(call), dtype=torch.long)) for call in row if call]
        torch.testing.assert_close(together[i], answers(model, alone, part)[0], rtol=1e-8, atol=1e-8)
        for batch, single in zip(held, alone.flags()):
            assert torch.equal(batch[i][:, mask[i]], single[0]) and not batch[i][:, ~mask[i]].any()


@pytest.mark.parametrize("policy", ["full", "snapkv+ada", "h2o", "gate", "gate+global", "qaq"])
def test_a_row_of_pads_alone_disturbs_no_other(policy):
    model, generator = gated(**GATE), torch.Generator().manual_seed(2)
    row = torch.randint(1, VOCAB, (60,), generator=generator).tolist()
    after = [[t] for t in torch.randint(1, VOCAB, (20,), generator=generator).tolist()]
    budget = None if policy in ("full", "gate", "qaq") else 0.5
    calls = [laid([row, []], "left", generator), *(laid([t, t], "left", generator) for t in after)]
    together = answers(model, gatekv.KVCache(model, policy, budget), calls)
    part = [(torch.tensor([call]), torch.ones(1, len(call), dtype=torch.long)) for call in [row, *after]]
    alone = answers(model, gatekv.KVCache(model, policy, budget), part)
    torch.testing.assert_close(together[0], alone[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("policy", ["snapkv", "gate+global"])
def test_turns_of_unequal_length_are_compressed_as_alone(policy):
    model, generator = gated(**GATE), torch.Generator().manual_seed(3)
    turns = [[torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in row] for row in
             ((60, 40, 33), (50, 44, 20))]  # fmt: skip
    calls = [laid([row[i] for row in turns], "right", generator) for i in range(3)]

    def run(calls):
        cache, out, mask = gatekv.KVCache(model, policy, 0.6, turns=True), [], calls[0][1][:, :0]
        for ids, new in calls:
            mask = torch.cat([mask, new], 1)
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            with torch.no_grad():
                logits = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
            out.append([x[real] for x, real in zip(logits, new.bool())])
            if len(out) > 1:
                cache.compress()
        return [torch.cat([o[i] for o in out]) for i in range(len(calls[0][0]))]

    together = run(calls)
    for i, row in enumerate(turns):
        alone = run([(torch.tensor([t]), torch.ones(1, len(t), dtype=torch.long)) for t in row])[0]
        torch.testing.assert_close(together[i], alone, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("policy", ["full", "snapkv", "h2o", "gate"])
@torch.no_grad()
def test_a_mask_that_takes_back_what_it_said_is_refused_and_nothing_is_lost(policy):
    model = gated(**GATE)
    ids = torch.randint(1, VOCAB, (2, 60), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    cache = gatekv.KVCache(model, policy, 0.6 if policy in ("snapkv", "h2o") else None)
    model(ids, attention_mask=mask, past_key_values=cache)
    token, longer = ids[:, :1], torch.cat([mask, mask[:, -1:]], 1)
    wanted = model(token, attention_mask=longer, past_key_values=cache.snapshot()).logits
    hides, shows = longer.clone(), longer.clone()
    hides[0, 20], shows[1, 8] = 0, 1
    for wrong in (hides, shows):
        with pytest.raises(ValueError, match="which of the cached tokens are pads, or hides some"):
            model(token, attention_mask=wrong, past_key_values=cache)
    with pytest.raises(ValueError, match="holds padded rows, and the call has no attention_mask"):
        model(token, past_key_values=cache)
    assert torch.equal(model(token, attention_mask=longer, past_key_values=cache).logits, wanted)


def test_tokens_cannot_be_taken_back_across_pads():
    model = tiny()
    cache, generator = gatekv.KVCache(model, "full"), torch.Generator().manual_seed(5)
    row = torch.randint(1, VOCAB, (20,), generator=generator).tolist()
    answers(model, cache, [laid([row, row], "left", generator), laid([row[:4], row[:1]], "right", generator)])
    with pytest.raises(ValueError, match="there are pads among them"):
        cache.crop(-2)
