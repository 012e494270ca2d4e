"""A budget is held exactly from the first step on, where fresh gates say the same of every token."""

import pytest
import torch
from peft import get_peft_model
from test_logit_head import tiny

from gatekv import GateKVConfig
from gatekv.training.objective import Objective
from gatekv.training.sparsity import SCOPES, budget_cut, judged_tokens, keep_rates

LENGTHS = (1, 5, 7, 8, 13, 64, 101)


def old_cut(scores, ratio, total, protected):
    """One threshold a group, as it was before ties had an order."""
    n = scores.shape[1]
    keep = round(max(0.0, ratio * total - protected) / max(1, total - protected) * n)
    return scores.sort(descending=True).values[:, min(keep, n - 1)], keep


def wanted(ratio, total, protected, units):
    """Judged tokens that the units of a group hold together."""
    room = max(0.0, ratio * total - protected) / max(1, total - protected)
    return round(min(1.0, room) * (total - protected) * units)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.372, 0.5, 0.9, 1.0, 1.3])
@pytest.mark.parametrize("kind", ["equal", "few values", "none equal"])
def test_each_group_holds_its_budget_to_the_token(scope, ratio, kind):
    """Rows of many lengths, padded on either side."""
    layers, heads, sinks, window, n = 3, 4, 2, 5, max(LENGTHS)
    groups = {"global": 1, "layer": layers, "head": layers * heads}[scope]
    torch.manual_seed(0)
    shape = layers, len(LENGTHS), heads, n
    logits = {
        "equal": torch.full(shape, -5.0),
        "few values": torch.randint(-2, 3, shape).float(),
        "none equal": torch.randn(shape),
    }[kind]
    for left in (True, False):
        valid = torch.stack([torch.arange(n) >= n - x if left else torch.arange(n) < x for x in LENGTHS])
        cut = budget_cut(logits, valid, ratio, sinks, window, scope)
        assert cut.shape == logits.shape and not cut.isnan().any()
        open_tokens = judged_tokens(valid, sinks, window)
        for row, total in enumerate(LENGTHS):
            flags = (logits - cut > 0)[:, row][..., open_tokens[row]].reshape(groups, layers * heads // groups, -1)
            held = flags.flatten(1).sum(-1).tolist()
            assert held == [wanted(ratio, total, min(total, sinks + window), flags.shape[1])] * groups
            if kind == "equal" and flags.shape[2]:  # the newest, alike everywhere
                assert (
                    (flags.sum(-1).amax(1) - flags.sum(-1).amin(1)).max() <= 1 and (flags.diff(dim=-1) >= 0).all()
                    if flags.shape[2] > 1
                    else True
                )


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_ties_nothing_changes(scope, dtype):
    torch.manual_seed(0)
    logits, valid = torch.randn(3, 2, 4, 100, dtype=dtype), torch.ones(2, 100, dtype=torch.bool)
    valid[1, 63:] = False
    groups = {"global": 1, "layer": 3, "head": 12}[scope]
    for ratio in (0.1, 0.3, 0.7, 0.95):
        cut = budget_cut(logits, valid, ratio, 2, 5, scope)
        for row, total in enumerate((100, 63)):
            scores = logits[:, row, :, 2 : total - 5].reshape(groups, -1)
            before, _ = old_cut(scores, ratio, total, 7)
            assert torch.equal(cut[:, row].reshape(groups, -1), before[:, None].expand(groups, 12 // groups * 100))


def fresh(**spec):
    model = get_peft_model(
        tiny("llama", torch.float32),
        GateKVConfig(**{"gate": "linear", "relaxation": "ste", "window": 4, "sinks": 2} | spec),
    )
    for name, p in model.named_parameters():
        if "gatekv_gate" in name and name.endswith("out.weight"):
            torch.nn.init.zeros_(p)  # logits that do not depend on the token
    return model.train()


def batch_of(lengths, packed=False):
    n = max(sum(lengths) if packed else max(lengths), 2)
    generator = torch.Generator().manual_seed(1)
    if packed:
        ids = torch.randint(1, 97, (1, n), generator=generator)
        segments = torch.cat([torch.full((x,), i) for i, x in enumerate(lengths)])[None]
        positions = torch.cat([torch.arange(x) for x in lengths])[None]
        return dict(input_ids=ids, attention_mask=torch.ones_like(ids), weights=torch.ones(1, n), segments=segments, position_ids=positions,
                    split=torch.tensor([8]))  # fmt: skip
    mask = torch.stack([torch.arange(n) >= n - x for x in lengths]).long()
    ids = torch.randint(1, 97, mask.shape, generator=generator) * mask
    weights = (mask.float() * (torch.arange(n) < n - 1)).float()
    return dict(input_ids=ids, attention_mask=mask, weights=weights, split=torch.tensor([9] * len(lengths)))


@pytest.mark.parametrize("initial", [-5.0, 4.6])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    "rows", [dict(lengths=(33, 21)), dict(lengths=(40, 27, 19), packed=True)], ids=["padded", "packed"]
)
def test_fresh_gates_hold_the_target_in_the_first_step(rows, scope, initial):
    objective = Objective(
        fresh(initial_logit=initial), objective="lm", sparsity="budget", scope=scope, oracle_weight=0.3
    )
    for target in (0.0, 0.25, 0.4, 0.75, 1.0, 1.2):
        lengths = torch.tensor(rows["lengths"])
        out = objective(batch_of(**rows), target)
        least = (6 / lengths).clamp_max(1.0)
        true = (lengths * target).clamp(lengths * least, lengths) / lengths
        tolerance = 0.5 / min(lengths) if scope == "head" else 0.5 / min(lengths) / 2
        assert abs(float(out["keep"]) - float(true.mean())) <= tolerance + 1e-6, target
        parameters = [p for p in objective.model.parameters() if p.requires_grad]
        assert all(g.isfinite().all() for g in torch.autograd.grad(out["loss"], parameters))


@pytest.mark.parametrize("prefill", ["sparse", "dense"])
def test_what_attention_uses_is_what_is_counted(prefill):
    """Layers as they run hold what `keep` says, behind a dense prompt too."""
    objective = Objective(fresh(), objective="kl", prefill=prefill, sparsity="budget")
    batch = batch_of((30, 30)) | {"split": torch.tensor([20, 20])}
    rows, asked = objective._prepare(batch, None)
    teacher = objective._teacher(rows, 0.5, asked)
    rates = [
        keep_rates((said.logits - teacher.thresholds[i] > 0).float(), said.valid, 2, 4)
        for i, said in teacher.said.items()
    ]
    n = 20 if prefill == "dense" else 30
    assert abs(float(torch.stack(rates).mean()) - 0.5) <= 0.5 / (4 * n)


def test_layers_alone_and_computed_again_hold_it_too():
    from gatekv.recompute import recompute_layers

    for scope in ("layer", "head"):
        objective = Objective(fresh(), objective="attention_mse", sparsity="budget", scope=scope)
        assert abs(float(objective(batch_of((33, 33)), 0.4)["keep"]) - 0.4) <= 0.5 / 33
    objective = Objective(fresh(relaxation="log"), objective="kl", sparsity="budget")
    parameters = [p for p in objective.model.parameters() if p.requires_grad]
    first = torch.autograd.grad(objective(batch_of((33, 20)), 0.4)["loss"], parameters)
    recompute_layers(objective.model)
    for a, b in zip(first, torch.autograd.grad(objective(batch_of((33, 20)), 0.4)["loss"], parameters)):
        torch.testing.assert_close(a, b)
