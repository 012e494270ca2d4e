"""Losses against their formulas; accumulation changes nothing; gates move, the base does not; resume; errors."""

import copy
import json

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny
from peft import get_peft_model

import gatekv
from gatekv.modules import base_model, gates_off, parallel, wrappers
from gatekv.ops import naive
from gatekv.ops.gated_attention import received_attention
from gatekv.training import checkpoint, losses
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

    def batch(self, first, rows):
        items = [self[i] for i in range(first, first + rows)]
        width = max(map(len, items))
        ids, mask, weights = torch.zeros(rows, width).long(), torch.zeros(rows, width).long(), torch.zeros(rows, width)
        for r, item in enumerate(items):
            ids[r, : len(item)], mask[r, : len(item)] = item, 1
            weights[r, : len(item) - 1] = torch.linspace(1, 3, len(item) - 1)
        return {"input_ids": ids, "attention_mask": mask, "weights": weights}


def make(
    objective="kl", sparsity="abs", scope="global", gate="mlp", relaxation="log", oracle_weight=0.0, dtype=torch.float32,
    family="llama",
):  # fmt: skip
    torch.manual_seed(0)
    spec = dict(gate=gate, relaxation=relaxation, window=4, sinks=2, hidden=8, heads=2, head_dim=4, context_window=8)
    model = get_peft_model(tiny(family, dtype), gatekv.GateKVConfig(**spec, initial_logit=0.5)).to(dtype).train()
    for w in wrappers(model):  # a zero last layer would block the first step's gradient to the layers before it
        torch.nn.init.normal_(w.gatekv_gate["default"].out.weight, std=0.5)
    return Objective(
        model, objective=objective, sparsity=sparsity, scope=scope, sparsity_weight=2.0, oracle_weight=oracle_weight
    )


def config(tmp_path, **changes):
    base = dict(output_dir=str(tmp_path), max_steps=4, batch_size=2, warmup_steps=1, learning_rate=5e-3, save_every=2)
    return CPTConfig(**{**base, **changes})


def test_distillation_is_the_weighted_kl_and_its_gradient(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_NUMBERS", 97 * 3)
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 97, bias=False).double().requires_grad_(False)
    student = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    teacher, weights = torch.randn(2, 7, 8, dtype=torch.float64), torch.rand(2, 7, dtype=torch.float64)
    weights[0, 4:] = 0
    got = losses.distillation_loss(student, teacher, head, weights)
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
    got = losses.lm_loss(student, labels, head, weights)
    wanted = torch.nn.functional.cross_entropy(head(student)[0], labels[0])
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, student)[0], torch.autograd.grad(wanted, student)[0])


def test_keep_rates_count_protection_and_skip_pads():
    kept = torch.zeros(1, 2, 10)
    kept[0, 1] = 0.5
    valid = torch.tensor([[True] * 8 + [False] * 2])
    rates = losses.keep_rates(kept, valid, sinks=2, window=3)
    torch.testing.assert_close(rates, torch.tensor([[5 / 8, (5 + 1.5) / 8]]))


def test_budget_cut_holds_exactly_the_ratio():
    torch.manual_seed(0)
    logits, valid = torch.randn(3, 2, 4, 100), torch.ones(2, 100, dtype=torch.bool)
    valid[1, 60:] = False
    cut = losses.budget_cut(logits, valid, 0.3, sinks=2, window=5)
    flags = (logits > cut).float()
    rates = torch.stack([losses.keep_rates(f, valid, 2, 5) for f in flags]).mean((0, 2))
    torch.testing.assert_close(rates, torch.tensor([0.3, 0.3]), atol=0.003, rtol=0)


def test_sparsity_losses():
    rates = torch.tensor([[[0.2, 0.4]], [[0.6, 0.8]]])  # two layers, one sequence, two heads
    torch.testing.assert_close(losses.sparsity_gap(rates, 0.5, "layer"), torch.tensor([[-0.2], [0.2]]))
    torch.testing.assert_close(losses.sparsity_gap(rates, 0.5, "global"), torch.tensor([[0.0]]))
    gap = torch.tensor([[-0.2], [0.2]])
    assert losses.sparsity_loss(gap, "abs").item() == pytest.approx(0.2)
    lagrange = losses.sparsity_loss(gap, "lagrange", torch.tensor([1.0, 3.0]))
    assert lagrange.item() == pytest.approx((-0.2 + 0.6) / 2 + 0.04)


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
    lr = [learning_rate_factor(s, 100, 10, 0.1) for s in range(100)]
    assert lr[0] == 0.1 and lr[9] == 1 and lr[99] == pytest.approx(0.1)
    draws = [sampled_keep(s, 0, 0.08, 0.4) for s in range(200)]
    assert (
        0.08 <= min(draws) < 0.1
        and 0.35 < max(draws) <= 0.4
        and draws == [sampled_keep(s, 0, 0.08, 0.4) for s in range(200)]
    )


@pytest.mark.parametrize("objective", ["kl", "lm"])
@pytest.mark.parametrize(
    "sparsity,scope", [("abs", "global"), ("abs", "layer"), ("lagrange", "layer"), ("budget", "global")]
)
@pytest.mark.parametrize("gate,relaxation", [("mlp", "log"), ("attention", "ste")])
def test_every_gate_parameter_moves_and_no_base_parameter_does(tmp_path, objective, sparsity, scope, gate, relaxation):
    module = make(objective, sparsity, scope, gate, relaxation)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    records = train(module, ToyData(), config(tmp_path, sparsity=sparsity, target_keep=0.5), Accelerator(cpu=True))
    assert len(records) == 4 and all(0 < r["keep"] <= 1 for r in records)
    assert "soft_hard_gap" in records[1] and "soft_hard_gap" not in records[0]
    for name, p in module.named_parameters():
        moved = not torch.equal(p, before[name])
        assert moved == ("gatekv_gate" in name), f"{name} {'moved' if moved else 'did not move'}"
    if sparsity == "lagrange":
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


def test_gradient_checkpointing_gives_the_same_gradient():
    grads = []
    for on in (False, True):
        module = make(dtype=torch.float64)
        if on:
            base_model(module.model).gradient_checkpointing_enable({"use_reentrant": False})
            base_model(module.model).enable_input_require_grads()
        module(ToyData().batch(0, 2), 0.5)["loss"].backward()
        grads.append(torch.cat([p.grad.flatten() for p in checkpoint.trained(module).values()]))
    torch.testing.assert_close(*grads)


def test_teacher_is_the_plain_model_while_training():
    module = make()
    ids = ToyData().batch(0, 1)["input_ids"]
    plain = tiny(dtype=torch.float32)(ids, use_cache=False).logits
    for listen in (False, True):
        with torch.no_grad(), gates_off(module.model, listen=listen):
            assert torch.equal(module.model(ids, use_cache=False).logits, plain)
    assert wrappers(module.model)[0].recorded[0].requires_grad, "the oracle trains the gates through what they said"


def test_stop_and_resume_is_the_uninterrupted_run(tmp_path):
    whole = make(sparsity="lagrange", scope="layer")
    train(whole, ToyData(), config(tmp_path / "a", sparsity="lagrange", max_steps=6), Accelerator(cpu=True))

    class Stop(ToyData):
        def batch(self, first, rows):
            if 3 * 2 <= first < 10**6:
                raise KeyboardInterrupt
            return super().batch(first, rows)

    stopped = make(sparsity="lagrange", scope="layer")
    settings = config(tmp_path / "b", sparsity="lagrange", max_steps=6, save_every=50)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, Stop(), settings, Accelerator(cpu=True))
    assert json.loads((tmp_path / "b/checkpoint/state.json").read_text())["step"] == 3, "Ctrl-C saves"
    resumed = make(sparsity="lagrange", scope="layer")
    settings.resume = True
    for _ in range(2):  # resuming a finished run changes nothing either
        train(resumed, ToyData(), settings, Accelerator(cpu=True))
    for (name, a), b in zip(checkpoint.trained(whole).items(), checkpoint.trained(resumed).values()):
        assert torch.equal(a, b), name
    assert torch.equal(whole.multiplier, resumed.multiplier)
    saved = (tmp_path / "b/checkpoint/state.safetensors").stat().st_size
    assert saved < 12 * sum(p.numel() for p in checkpoint.trained(whole).values()) + 20_000, "the base is never saved"


def test_checkpoint_errors(tmp_path):
    module = make()
    optimizer = torch.optim.AdamW(checkpoint.trained(module).values())
    with pytest.raises(ValueError, match="nothing to resume"):
        checkpoint.load(tmp_path / "none", module, optimizer)
    checkpoint.save(tmp_path / "c", module, optimizer, 3)
    with pytest.raises(ValueError, match="of another gate"):
        other = make(gate="attention")
        checkpoint.load(tmp_path / "c", other, torch.optim.AdamW(checkpoint.trained(other).values()))
    path = tmp_path / "c/state.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load(tmp_path / "c", module, optimizer)


def test_nan_loss_stops_and_keeps_the_checkpoint(tmp_path):
    module = make()
    train(module, ToyData(), config(tmp_path, max_steps=2), Accelerator(cpu=True))
    before = (tmp_path / "checkpoint/state.safetensors").read_bytes()
    with torch.no_grad():
        next(iter(checkpoint.trained(module).values())).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        train(module, ToyData(), config(tmp_path), Accelerator(cpu=True))
    assert (tmp_path / "checkpoint/state.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


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
    with torch.no_grad(), parallel(model, threshold=calibration.table[0][calibration.levels.index(0.5)]) as layers:
        kept = []
        for i in range(12):
            model(data[10**6 + i][None], use_cache=False)
            kept += [(w.recorded[0][..., 2:-4] > w.threshold).float().mean() for w in layers]
    assert torch.stack(kept).mean().item() == pytest.approx(0.5, abs=0.12)
    copy.deepcopy(calibration)
