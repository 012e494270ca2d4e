"""Losses against their formulas; accumulation changes nothing; gates move, the base does not; errors."""

import copy

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny
from peft import get_peft_model

import gatekv
from gatekv.modules import base_model, gated_pass, parallel, wrappers
from gatekv.ops import naive
from gatekv.ops.gated_attention import received_attention
from gatekv.passes import Observe, Plain, Relaxed
from gatekv.recompute import recompute_layers
from gatekv.training import checkpoint, losses
from gatekv.training import sparsity as sparse
from gatekv.training.calibrate import calibrate
from gatekv.training.config import CPTConfig
from gatekv.training.loop import train
from gatekv.training.objective import Objective
from gatekv.training.schedule import learning_rate_factor, sampled_keep, target_keep


class ToyData:
    """Rows of random tokens, a pure function of the index."""

    length = 48

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        n = int(torch.randint(30, 49, (1,), generator=generator))
        return torch.randint(1, 97, (n,), generator=generator)

    def batch(self, first, rows, align=False):
        items = [self[i] for i in range(first, first + rows)]
        splits = [len(item) * 2 // 3 for item in items]
        left = [max(splits) - s if align else 0 for s in splits]
        width = max(pad + len(item) for pad, item in zip(left, items))
        ids, mask, weights = torch.zeros(rows, width).long(), torch.zeros(rows, width).long(), torch.zeros(rows, width)
        for r, (pad, item) in enumerate(zip(left, items)):
            ids[r, pad : pad + len(item)], mask[r, pad : pad + len(item)] = item, 1
            weights[r, pad : pad + len(item) - 1] = torch.linspace(1, 3, len(item) - 1)
        split = torch.tensor([max(splits)] * rows if align else splits)
        return {"input_ids": ids, "attention_mask": mask, "weights": weights, "split": split}


def make(objective="kl", sparsity="abs", scope="global", oracle_weight=0.0, dtype=torch.float32, prefill="sparse",
         polarise_weight=0.0, family="llama", layers=2, **spec):  # fmt: skip
    torch.manual_seed(0)
    spec = dict(window=4, sinks=2, hidden=8, heads=2, head_dim=4, context_window=8, initial_logit=0.5) | spec
    model = get_peft_model(tiny(family, dtype, num_hidden_layers=layers), gatekv.GateKVConfig(**spec)).to(dtype).train()
    for w in wrappers(model):  # a zero last layer would block the first step's gradient to the layers before it
        gate = w.gatekv_gate["default"]
        torch.nn.init.normal_(gate.out_weight if spec.get("gate") == "key_mlp" else gate.out.weight, std=0.5)
    return Objective(model, objective=objective, sparsity=sparsity, scope=scope, sparsity_weight=2.0, prefill=prefill,
                     oracle_weight=oracle_weight, polarise_weight=polarise_weight)  # fmt: skip


def config(tmp_path, **changes):
    base = dict(output_dir=str(tmp_path), max_steps=4, batch_size=2, learning_rate=5e-3, save_every=2)
    return CPTConfig(**{**base, **changes})


def test_distillation_is_the_weighted_kl_and_its_gradient(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_NUMBERS", 97 * 3)
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 97, bias=False).double().requires_grad_(False)
    student = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    teacher, weights = torch.randn(2, 7, 8, dtype=torch.float64), torch.rand(2, 7, dtype=torch.float64)
    weights[0, 4:] = 0
    got = losses.distillation_loss(student, teacher, head, losses.row_shares(weights))
    p, q = head(teacher).log_softmax(-1), head(student).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    wanted = ((kl * weights).sum(-1) / weights.sum(-1)).mean()
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    a, b = torch.autograd.grad(got, student)[0], torch.autograd.grad(wanted, student)[0]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_lm_loss_is_cross_entropy(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_NUMBERS", 97 * 2)
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 97, bias=False).requires_grad_(False)
    student = torch.randn(1, 6, 8, requires_grad=True)
    labels, weights = torch.randint(0, 97, (1, 6)), torch.ones(1, 6)
    got = losses.lm_loss(student, labels, head, losses.row_shares(weights))
    wanted = torch.nn.functional.cross_entropy(head(student)[0], labels[0])
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, student)[0], torch.autograd.grad(wanted, student)[0])


def test_keep_rates_count_protection_and_skip_pads():
    kept = torch.zeros(1, 2, 10)
    kept[0, 1] = 0.5
    valid = torch.tensor([[True] * 8 + [False] * 2])
    rates = sparse.keep_rates(kept, valid, sinks=2, window=3)
    torch.testing.assert_close(rates, torch.tensor([[5 / 8, (5 + 1.5) / 8]]))


def test_budget_cut_holds_exactly_the_ratio():
    torch.manual_seed(0)
    logits, valid = torch.randn(3, 2, 4, 100), torch.ones(2, 100, dtype=torch.bool)
    valid[1, 60:] = False
    cut = sparse.budget_cut(logits, valid, 0.3, sinks=2, window=5)
    flags = (logits > cut).float()
    rates = torch.stack([sparse.keep_rates(f, valid, 2, 5) for f in flags]).mean((0, 2))
    torch.testing.assert_close(rates, torch.tensor([0.3, 0.3]), atol=0.003, rtol=0)


def test_sparsity_losses():
    rates = torch.tensor([[[0.2, 0.4]], [[0.6, 0.8]]])  # two layers, one sequence, two heads
    torch.testing.assert_close(sparse.sparsity_gap(rates, 0.5, "layer"), torch.tensor([[-0.2], [0.2]]))
    torch.testing.assert_close(sparse.sparsity_gap(rates, 0.5, "global"), torch.tensor([[0.0]]))
    gap = torch.tensor([[-0.2], [0.2]])
    assert sparse.sparsity_loss(gap, "abs").item() == pytest.approx(0.2)
    lagrange = sparse.sparsity_loss(gap, "lagrange", torch.tensor([1.0, 3.0]))
    assert lagrange.item() == pytest.approx((-0.2 + 0.6) / 2 + 0.04)


@pytest.mark.parametrize("scope", ["layer", "head"])
def test_budget_cut_of_each_layer_or_head(scope):
    torch.manual_seed(0)
    logits, valid = torch.randn(3, 2, 4, 100) + torch.arange(3.0)[:, None, None, None], torch.ones(2, 100).bool()
    cut = sparse.budget_cut(logits, valid, 0.3, sinks=2, window=5, scope=scope)
    assert cut.shape == logits.shape
    rates = torch.stack([sparse.keep_rates((x > c).float(), valid, 2, 5) for x, c in zip(logits, cut)])
    rates = rates.mean(-1) if scope == "layer" else rates
    torch.testing.assert_close(rates, torch.full_like(rates, 0.3), atol=0.01, rtol=0)


def test_penalties():
    gap = torch.tensor([[-0.2], [0.4]])
    wanted = {"abs": 0.3, "square": 0.1, "hinge": 0.2, "linear": 0.1, "concave": 0.1}
    for kind, value in wanted.items():
        assert sparse.sparsity_loss(gap, kind).item() == pytest.approx(value), kind
    rates = torch.rand(2, 3, 4)
    assert sparse.sparsity_gap(rates, 0.5, "head").shape == (8, 3)
    assert sparse.sparsity_gap(rates, 0.5, "head")[5, 2] == rates[1, 2, 1] - 0.5, "units count heads within layers"
    valid = torch.ones(1, 6, dtype=torch.bool)
    assert sparse.undecided(torch.zeros(1, 2, 6), valid, 1, 1).item() == 1
    assert sparse.undecided(torch.full((1, 2, 6), 20.0), valid, 1, 1).item() < 1e-6


def test_reverse_and_hidden_losses():
    head = torch.nn.Linear(8, 11, bias=False).requires_grad_(False)
    student, teacher = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8)
    weights = torch.rand(2, 5)
    share = weights / weights.sum(-1, keepdim=True) / 2
    p, q = head(student).log_softmax(-1), head(teacher).log_softmax(-1)
    got = losses.distillation_loss(student, teacher, head, losses.row_shares(weights), reverse=True)
    wanted = ((p.exp() * (p - q)).sum(-1) * share).sum()
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, student, retain_graph=True)[0] for x in (got, wanted)))
    error = ((student - teacher) ** 2).mean(-1) / (teacher**2).mean(-1)
    torch.testing.assert_close(losses.hidden_loss(student, teacher, losses.row_shares(weights)), (error * share).sum())


@pytest.mark.parametrize("gate", ["mlp", "attention"])
@pytest.mark.parametrize("form", ["log", "hard"])
def test_the_short_pass_over_what_follows_a_prompt_is_the_parallel_form(gate, form):
    """prefill="dense": same loss, same gradient as one pass over the whole row with a split."""
    module = make(prefill="dense", sparsity="budget", gate=gate, dtype=torch.float64)
    batch = ToyData().batch(0, 3, align=True)
    rows, asked = module._prepare(batch, None)
    split, taught = asked["split"], module._teacher(rows, 0.4, asked)
    teacher, cut = taught.hidden, taught.thresholds
    got, _ = module._task(rows, taught, form, asked)
    weights = batch["weights"] * (torch.arange(batch["weights"].shape[1]) >= split)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with gated_pass(module.model, Relaxed(form=form, threshold=cut, split=split)):
        inner = base_model(module.model)
        student = inner.base_model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
    shares = losses.row_shares(weights.double())
    wanted = losses.distillation_loss(student, teacher, inner.get_output_embeddings(), shares)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    assert got > 1e-4
    if form == "log":
        parameters = list(checkpoint.trained(module).values())
        for a, b in zip(*(torch.autograd.grad(x, parameters) for x in (got, wanted))):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # the loss itself is float32


def test_each_layers_own_error_needs_no_backward_through_the_model():
    """The gradient reaches one layer's gate from that layer's own error alone."""
    module = make("attention_mse", "budget", "layer", dtype=torch.float64)
    batch = ToyData().batch(0, 2)
    rows, asked = module._prepare(batch, None)
    errors = [o.error for o in module._teacher(rows, 0.5, asked).said.values()]
    assert all(0 < e < 10 for e in errors)
    errors[1].backward()
    grads = [[p.grad for p in w.gatekv_gate.parameters()] for w in wrappers(module.model)]
    assert all(g is None for g in grads[0]) and all(g is not None for g in grads[1])
    flat = make("attention_mse", "abs", initial_logit=60.0, dtype=torch.float64)  # everything kept: no error
    torch.nn.init.zeros_(wrappers(flat.model)[0].gate().out.weight)
    rows, asked = flat._prepare(batch, None)
    assert flat._teacher(rows, 0.5, asked).said[0].error < 1e-12


def test_combinations_that_cannot_be_computed():
    with pytest.raises(ValueError, match="scope='layer'"):
        make("attention_mse", "budget", "global")
    with pytest.raises(ValueError, match="prefill='sparse'"):
        make(prefill="dense", gate="attention", context="prompt")
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        CPTConfig(**{"prefill": "dense", "gradient_checkpointing": True})
    with pytest.raises(ValueError, match="oracle_weight"):
        CPTConfig(**{"objective": "none"})


@pytest.mark.parametrize("n,window", [(5, 1), (150, 0), (300, 16)])
def test_received_attention_matches_naive(n, window):
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, n, 8), torch.randn(2, 3, n, 8)
    a = naive.received_attention(q, k, window=window, scale=0.3)
    torch.testing.assert_close(received_attention(q, k, window=window, scale=0.3), a)
    assert (a[..., -max(window, 1) :] == 0).all()
    mask = naive.causal_mask(n, n)[None, None].repeat(2, 1, 1, 1)
    mask[1, ..., n // 2 :] = False  # a right-padded row
    b = received_attention(q, k, window=window, scale=0.3, mask=mask)
    torch.testing.assert_close(b, naive.received_attention(q, k, window=window, scale=0.3, mask=mask))
    torch.testing.assert_close(
        b[1:, :, : n // 2], received_attention(q[1:, :, : n // 2], k[1:, :, : n // 2], window=window, scale=0.3)
    )


def test_oracle_loss_judges_only_what_can_be_evicted():
    received, valid = torch.full((1, 2, 10), 0.5), torch.ones(1, 10, dtype=torch.bool)
    logits = torch.full((1, 2, 10), 0.5).log()
    logits[..., :2], logits[..., -3:] = 99, 99
    assert losses.oracle_loss(logits, received, valid, sinks=2, window=3).item() == pytest.approx(0)
    assert losses.oracle_loss(logits, received, valid, sinks=1, window=3).item() > 1


def test_schedules():
    targets = [target_keep(s, 90, 0.2, 0.5) for s in range(90)]
    assert targets[0] < 1 and targets[44] == targets[89] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(targets, targets[1:])), "never below, never up again"
    lr = [learning_rate_factor(s, 100, 0.1, 0.1) for s in range(100)]
    assert lr[0] == 0.1 and lr[9] == 1 and lr[99] == pytest.approx(0.1)
    draws = [sampled_keep(s, 0, 0.2, 2) for s in range(200)]
    assert (
        0.1 <= min(draws) < 0.11
        and 0.38 < max(draws) <= 0.4
        and draws == [sampled_keep(s, 0, 0.2, 2) for s in range(200)]
    )


RUNS = [
    dict(objective="kl", sparsity="abs", scope="layer", gate="mlp", relaxation="log"),
    dict(objective="lm", sparsity="lagrange", scope="layer", gate="attention", relaxation="ste"),
    dict(objective="kl", sparsity="budget", gate="attention", relaxation="ste", oracle_weight=0.3),
    dict(objective="reverse_kl", sparsity="square", scope="head", gate="linear", relaxation="gumbel"),
    dict(objective="hidden_mse", sparsity="concave", gate="key_mlp", relaxation="log"),
    dict(objective="attention_mse", sparsity="budget", scope="head", gate="key_mlp", relaxation="ste"),
    dict(objective="attention_mse", sparsity="linear", gate="mlp", relaxation="log", prefill="dense"),
    dict(objective="kl", sparsity="budget", gate="mlp", relaxation="ste", prefill="dense", oracle_weight=0.1),
    dict(objective="lm", sparsity="abs", gate="attention", context="prompt", relaxation="ste"),
    dict(objective="kl", sparsity="budget", gate="attention", context="prompt", mask_prompt=False, relaxation="log",
         prefill="dense"),
    dict(objective="kl", sparsity="hinge", gate="linear", relaxation="gumbel", polarise_weight=0.1, logit_scale=10.0),
    dict(objective="kl", sparsity="capacity", gate="mlp", relaxation="decay"),
    dict(objective="kl", sparsity="capacity", gate="linear", relaxation="decay", prefill="dense"),
    dict(objective="none", sparsity="budget", gate="mlp", oracle_weight=1.0),
]  # fmt: skip


@pytest.mark.parametrize("run", RUNS, ids=lambda r: "-".join(str(v) for v in r.values()))
def test_every_gate_parameter_moves_and_no_base_parameter_does(tmp_path, run):
    module = make(**run)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    records = train(module, ToyData(), config(tmp_path, **run, target_keep=0.5), Accelerator(cpu=True))
    assert len(records) == 4 and all(0 < r["keep"] <= 1 for r in records)
    assert "soft_hard_gap" in records[1] and "soft_hard_gap" not in records[0]
    for name, p in module.named_parameters():
        moved = not torch.equal(p, before[name])
        assert moved == ("gatekv_gate" in name), f"{name} {'moved' if moved else 'did not move'}"
    if run["sparsity"] == "lagrange":
        assert module.multiplier.abs().sum() > 0


@pytest.mark.parametrize(
    "sparsity,scope,oracle", [("abs", "layer", 0.0), ("lagrange", "global", 0.0), ("budget", "global", 0.3)]
)
def test_accumulation_changes_nothing(tmp_path, sparsity, scope, oracle):
    results = []
    for accumulation in (1, 2, 4):
        module = make(sparsity=sparsity, scope=scope, dtype=torch.float64, oracle_weight=oracle)
        settings = config(
            tmp_path, sparsity=sparsity, batch_size=4 // accumulation, accumulation=accumulation, max_steps=3, target_keep=0.6
        )  # fmt: skip
        records = train(module, ToyData(), settings, Accelerator(cpu=True))
        parameters = torch.cat([p.flatten() for p in checkpoint.trained(module).values()])
        results.append(([r["loss"] for r in records], parameters))
    for losses_, parameters in results[1:]:
        assert losses_ == pytest.approx(results[0][0], rel=1e-6)
        torch.testing.assert_close(parameters, results[0][1], rtol=1e-6, atol=1e-8)


RECOMPUTED = [
    dict(sparsity="abs", scope="layer", relaxation="log"),
    dict(sparsity="budget", oracle_weight=0.3, relaxation="ste", polarise_weight=0.1),
    dict(sparsity="budget", gate="attention", context="prompt", relaxation="log"),
    dict(sparsity="budget", prefill="dense", oracle_weight=0.3),  # a short pass behind a cache: nothing is repeated
    dict(objective="lm", sparsity="linear", relaxation="gumbel"),
]


@pytest.mark.parametrize("run", RECOMPUTED, ids=lambda r: "-".join(str(v) for v in r.values()))
def test_gradient_checkpointing_gives_the_same_loss_and_gradient(run):
    """A layer is computed again under the orders of its own batch, though the next one's are given already."""
    grads, found, calls = [], [], []
    for on in (False, True):
        module = make(dtype=torch.float64, **run)
        if on:
            recompute_layers(module.model)
            wrappers(module.model)[0].module.register_forward_hook(lambda *args: calls.append(1))
        batches = [ToyData().batch(i, 2, align=True) for i in (0, 2)]
        losses_ = [module(batch, target, seed=i)["loss"] for i, (batch, target) in enumerate(zip(batches, (0.4, 0.7)))]
        sum(losses_).backward()
        found.append(torch.stack(losses_).detach())
        grads.append(torch.cat([p.grad.flatten() for p in checkpoint.trained(module).values()]))
        assert all(w.running is None for w in wrappers(module.model))
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*grads)
    repeated = run.get("prefill") != "dense"
    teacher = run["sparsity"] == "budget" or run.get("objective", "kl") != "lm"
    assert len(calls) == 2 * (1 + repeated + teacher), "really twice"


def test_teacher_is_the_plain_model_while_training():
    module = make()
    ids = ToyData().batch(0, 1)["input_ids"]
    plain = tiny(dtype=torch.float32)(ids, use_cache=False).logits
    for context in (Plain(), Observe()):
        with torch.no_grad(), gated_pass(module.model, context) as said:
            assert torch.equal(module.model(ids, use_cache=False).logits, plain)
    assert said[0].logits.requires_grad, "the oracle trains the gates through what they said"


def test_soft_hard_gap_is_zero_for_straight_through_and_not_for_log():
    for relaxation, expected in (("ste", True), ("log", False)):
        gap = make(relaxation=relaxation).soft_hard(ToyData().batch(0, 1), 0.5)
        assert (abs(gap["soft_hard_gap"]) < 1e-6) == expected
        assert 0 <= gap["undecided"] <= 1


def test_calibration_lands_on_the_ratio(tmp_path):
    module = make()
    model = module.model.eval()
    data = ToyData()
    data.length = 48
    calibration = calibrate(model, data, rows=6)
    assert model.peft_config["default"].calibration["ratios"] == list(calibration.ratios)
    for row in calibration.table:
        assert all(a >= b for a, b in zip(row, row[1:])), "more tokens, lower threshold"
    threshold = calibration.table[0][calibration.levels.index(0.5)]
    with torch.no_grad(), parallel(model, threshold=threshold) as layers:
        kept = []
        for i in range(12):
            model(data[10**6 + i][None], use_cache=False)
            kept += [(w.recorded.logits[..., 2:-4] > threshold).float().mean() for w in layers]
    assert torch.stack(kept).mean().item() == pytest.approx(0.5, abs=0.12)
    copy.deepcopy(calibration)
