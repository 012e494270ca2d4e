"""Gate and maps that learn at once: the student is the deployed model, and everything that should learn does."""

import math

import pytest
import test_lora
import torch
from conftest import assert_close, gated, padded_batch, plain_logits, positions_of, recurrent_logits, tiny
from peft import PeftModel
from test_less_cache import FORMS, LESS, loud
from transformers import DynamicCache

import gatekv
from gatekv.modules import base_model, gates_off, wrappers
from gatekv.training import checkpoint, lesson
from gatekv.training.joint import JointObjective
from gatekv.training.less_config import LessConfig
from gatekv.training.lesson import LessObjective, with_maps
from gatekv.training.objective import Objective
from gatekv.training.options import load_config
from gatekv.training.prompt import gated_prompt

SPLIT = 60


def batch_of(lengths):
    ids, mask = padded_batch(lengths)
    weights = torch.ones_like(ids).double()
    weights[:, -1] = 0
    return {"input_ids": ids, "attention_mask": mask, "weights": weights, "split": torch.full((len(lengths),), SPLIT)}


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_with_hard_flags_the_student_is_the_cache(form, family):
    model = loud(gated(family, window=6, sinks=2, less_form=form, **LESS))
    batch = batch_of([80, 70])
    ids, mask, positions = batch["input_ids"], batch["attention_mask"], positions_of(batch["attention_mask"])
    prompt = dict(attention_mask=mask[:, :SPLIT], position_ids=positions[:, :SPLIT])
    behind = dict(attention_mask=mask, position_ids=positions[:, SPLIT:])
    cache = gatekv.KVCache(model, "gate_alone+global+less", 0.5, decode="keep")
    model(ids[:, :SPLIT], past_key_values=cache, **prompt)
    flags = [f.to(torch.float64) for f in cache.flags()]
    assert all(0 < f.mean() < 1 for f in flags)
    deployed = model(ids[:, SPLIT:], past_key_values=cache, **behind).logits
    with gates_off(model):
        teacher = model(
            ids, attention_mask=mask, position_ids=positions, past_key_values=DynamicCache()
        ).past_key_values
    weights = {w.layer_idx: f for w, f in zip(wrappers(model), flags)}
    past = gated_prompt(teacher, SPLIT, weights, model.peft_config["default"].gate_spec())
    trained = base_model(model)(ids[:, SPLIT:], past_key_values=past, **behind).logits
    torch.testing.assert_close(trained, deployed, rtol=1e-9, atol=1e-9 * deployed.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # of the base, as recipes have it, and as tests do
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("warm", [True, False])
def test_gates_and_maps_learn_and_nothing_else(warm, form, dtype):
    model = loud(gated(window=6, sinks=2, dtype=torch.float32, relaxation="ste", less_form=form, **LESS)).train()
    base_model(model).to(dtype)
    for w in wrappers(model):
        w.gate().float()
        w.less().float()
    objective = JointObjective(model, "gate_alone+global")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(3):
        optimizer.zero_grad()
        out = objective(batch_of([80]), 0.5, warm=warm, seed=step)
        out["loss"].backward()
        optimizer.step()
    assert float(out["keep"]) == pytest.approx(0.5, abs=0.05)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != ("gatekv_" in name), name


@pytest.mark.parametrize("form", FORMS)
def test_a_gate_learns_what_the_maps_cannot_say(form):
    """The state's share of an evicted token reaches the gate: its gradient is another one than without maps."""
    grads = []
    for maps in (False, True):
        torch.manual_seed(0)
        model = loud(gated(window=6, sinks=2, relaxation="ste", less_form=form, **LESS))
        if not maps:
            for w in wrappers(model):
                w.gatekv_less.clear()
        Objective(model, objective="kl", prefill="dense", sparsity="budget")(batch_of([80]), 0.4)["loss"].backward()
        grads.append(torch.cat([p.grad.flatten() for w in wrappers(model) for p in w.gate().parameters()]))
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)
    assert not torch.allclose(*grads, rtol=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_a_head_that_keeps_everything_has_a_finite_gradient(form):
    model = loud(gated(window=6, sinks=2, dtype=torch.float32, relaxation="ste", less_form=form, **LESS))
    out = JointObjective(model, "gate_alone+global")(batch_of([80, 70]), 1.0)
    out["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_from_scratch_and_on_top_of_a_trained_gate(tmp_path):
    config = load_config(["--policy", "gate+global", "--train_gate"], LessConfig)
    fresh = with_maps(tiny(dtype=torch.float32), "", config.fresh_gate, config.train_gate, **LESS)
    assert config.fresh_gate.relaxation == "ste" and all(w.gate() is not None for w in wrappers(fresh))
    gated(window=6, sinks=2, dtype=torch.float32).save_pretrained(tmp_path)
    config = load_config(["--policy", "gate+global", "--train_gate", "--adapter", str(tmp_path)], LessConfig)
    assert config.fresh_gate is None
    both = with_maps(tiny(dtype=torch.float32), str(tmp_path), None, config.train_gate, **LESS)
    assert all(p.requires_grad for w in wrappers(both) for part in (w.gate(), w.less()) for p in part.parameters())
    found = JointObjective(both.eval(), "gate+global").soft_hard(batch_of([80]), 0.5)
    assert found.keys() >= {"kl", "alone", "closed"} and math.isfinite(found["kl"])


@pytest.mark.parametrize("train_gate", [False, True])
def test_a_gate_lora_and_maps_travel_in_one_adapter(tmp_path, train_gate):
    """Maps, and the gate if asked to, learn beside LoRA, which drops nothing then; LoRA and the base do not move."""
    tuned = test_lora.tuned(dtype=torch.float32, lora=test_lora.LORA | {"lora_dropout": 0.5})
    tuned.save_pretrained(tmp_path / "tuned")
    maps = dict(less_policy="gate_alone+global", less_budget=0.5, **LESS)
    model = with_maps(tiny(dtype=torch.float32), str(tmp_path / "tuned"), None, train_gate, **maps).train()
    wanted = plain_logits(tuned, *padded_batch([30]))
    with gates_off(model):
        assert torch.equal(plain_logits(model, *padded_batch([30])), wanted)
    learning = ("gatekv_less", "gatekv_gate") if train_gate else ("gatekv_less",)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    objective = (JointObjective if train_gate else LessObjective)(model, "gate_alone+global")
    optimizer = torch.optim.AdamW(checkpoint.trained(objective).values(), lr=1e-2, weight_decay=0.0)
    for step in range(4):
        optimizer.zero_grad()
        objective(batch_of([80]), 0.5, warm=step < 2, seed=step)["loss"].backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != any(part in name for part in learning), name
    model.eval().save_pretrained(tmp_path / "three")
    loaded = PeftModel.from_pretrained(tiny(dtype=torch.float32), tmp_path / "three").eval()

    def answer(model, policy, budget):
        ids, mask = padded_batch([60, 44])
        return recurrent_logits(model, ids, mask, gatekv.KVCache(model, policy, budget), [40]), ids, mask

    small, ids, mask = answer(model, "gate+global+less", 0.5)
    assert torch.equal(answer(loaded, "gate+global+less", 0.5)[0], small)
    assert_close(answer(loaded, "full", 1.0)[0], plain_logits(tuned, ids, mask), mask, torch.float32)
    loaded.merge_lora()
    assert_close(answer(loaded, "gate+global+less", 0.5)[0], small, mask, torch.float32)


def test_the_teacher_of_maps_is_the_tuned_model(tmp_path, monkeypatch):
    tuned = test_lora.tuned(dtype=torch.float32)
    tuned.save_pretrained(tmp_path)
    model = with_maps(tiny(dtype=torch.float32), str(tmp_path), less_policy="keydiff", less_budget=0.5, **LESS).train()
    teachers, batch = [], batch_of([80, 70])
    loss = lambda student, teacher, head, weights: teachers.append(head(teacher)) or student.sum()  # noqa: E731
    monkeypatch.setattr(lesson, "distillation_loss", loss)
    LessObjective(model, "keydiff", "kl")(batch, 0.5)
    behind = batch["attention_mask"].clone()
    behind[:, :SPLIT] = 0
    assert_close(
        torch.cat([torch.zeros(2, SPLIT, 97), *teachers], 1),
        plain_logits(tuned, batch["input_ids"], batch["attention_mask"]), behind, torch.float32,
    )  # fmt: skip


def test_a_gate_learns_on_a_base_into_which_lora_was_merged():
    model = test_lora.tuned(dtype=torch.float32, relaxation="ste")
    model.merge_lora()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    objective = Objective(model.train(), objective="kl", prefill="dense", sparsity="budget", oracle_weight=0.3)
    assert not objective.below_learns
    optimizer = torch.optim.AdamW(checkpoint.trained(objective).values(), lr=1e-2, weight_decay=0.0)
    objective(batch_of([80]), 0.5)["loss"].backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != ("gatekv_" in name), name


def test_what_cannot_be_trained_is_refused(tmp_path):
    for argv, words in (
        (["--train_gate", "--policy", "snapkv"], "a gate's policy"),
        (["--train_gate", "--policy", "gate+global", "--objective", "attention_mse"], "--objective kl"),
        (["--policy", "gate+global"], "--train_gate true"),
    ):
        with pytest.raises(ValueError, match=words):
            load_config(argv, LessConfig)
    gated(gate="none", dtype=torch.float32, **LESS).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no gate to train"):
        with_maps(tiny(dtype=torch.float32), str(tmp_path), None, True, **LESS)
