"""Teacher and student differ by their gates and by nothing that the base draws at random."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_logit_head import batch_of, tiny

from gatekv import GateKVConfig
from gatekv.modules import base_model, wrappers
from gatekv.recompute import recompute_layers
from gatekv.training.lesson import LessObjective
from gatekv.training.noise import quiet
from gatekv.training.objective import Objective
from gatekv.training.plain import PlainObjective

# Dropout of what is embedded, of what layers add, of MLPs, of attention; layers left out; routers that jitter.
NOISY = {
    "opt": dict(dropout=0.3, layerdrop=0.3), "seed_oss": dict(residual_dropout=0.3, attention_dropout=0.3),
    "phimoe": dict(router_jitter_noise=0.3, input_jitter_noise=0.3), "starcoder2": dict(residual_dropout=0.3, embedding_dropout=0.3),
    "stablelm": dict(hidden_dropout=0.3), "phi3": dict(resid_pdrop=0.3, embd_pdrop=0.3), "llama": dict(attention_dropout=0.3),
    "mixtral": dict(router_jitter_noise=0.3), "granite": dict(attention_dropout=0.3),
}  # fmt: skip


def gated(family, window=4, dtype=torch.float64, **spec):
    model = get_peft_model(
        tiny(family, dtype, **NOISY[family]), GateKVConfig(**{"gate": "linear"} | spec, window=window, sinks=2)
    ).to(dtype)
    generator = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if "gatekv_gate" in name:
            p.data = torch.zeros_like(p) if name.endswith("bias") else torch.randn(p.shape, generator=generator).to(p)
    return model.train()


def step(objective, seed, target=0.4, batch=None, **more):
    torch.manual_seed(seed)
    out = objective(batch or batch_of(), target, **more)
    parameters = [p for p in objective.model.parameters() if p.requires_grad]
    return out["loss"].detach(), torch.autograd.grad(out["loss"], parameters, allow_unused=True)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("family", NOISY)
def test_gates_that_keep_everything_have_nothing_to_learn(family, seed):
    model = gated(family, window=1000, relaxation="ste")
    torch.manual_seed(seed)
    assert abs(float(Objective(model, objective="kl", sparsity="abs")(batch_of(), 0.4)["task"])) < 1e-9


@pytest.mark.parametrize("prefill", ["sparse", "dense"])
@pytest.mark.parametrize("family", NOISY)
def test_a_step_in_training_mode_is_the_step_in_evaluation_mode(family, prefill):
    model = gated(family, relaxation="log")
    objective = Objective(model, objective="kl", prefill=prefill, oracle_weight=0.3)
    loss, gradients = step(objective, 0)
    again, others = step(objective, 1)
    model.eval()
    still, true = step(objective, 2)
    assert loss == again == still and loss > 0
    for a, b, c in zip(gradients, others, true):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("family", ["opt", "seed_oss", "starcoder2", "mixtral"])
def test_layers_that_are_computed_again_are_as_quiet(family):
    objective = Objective(gated(family, relaxation="log"), objective="kl", sparsity="abs")
    loss, gradients = step(objective, 0)
    recompute_layers(objective.model)
    runs, layer = [], wrappers(objective.model)[0]
    layer = layer.module
    forward = layer.forward
    layer.forward = lambda *a, **k: runs.append(layer.training) or forward(*a, **k)
    again, others = step(objective, 1)
    assert loss == again and len(runs) == 3, "teacher, student, and the student again in its backward pass"
    for a, b in zip(gradients, others):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert all(m.training for m in objective.model.modules())


def test_what_learns_keeps_its_dropout_and_the_teacher_has_none():
    lora = dict(r=4, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    model = gated("llama", window=1000, relaxation="ste", lora=lora)
    model.train()
    objective = Objective(model, objective="kl", sparsity="abs")
    teachers = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        rows, asked = objective._prepare(batch_of(), None)
        teachers.append(objective._teacher(rows, 0.4, asked).hidden)
    assert torch.equal(*teachers)
    first, second = (step(objective, seed)[0] for seed in (0, 1))
    assert first != second and first > 1e-6, "the student's LoRA is at half of its strength, somewhere"
    plain = PlainObjective(get_peft_model(tiny("llama", **NOISY["llama"]), LoraConfig(**lora)).train())
    assert step(plain, 0)[0] != step(plain, 1)[0]


@pytest.mark.parametrize("family", ["opt", "seed_oss"])
def test_plain_fine_tuning_and_low_rank_maps_are_quiet_too(family):
    lora = dict(r=4, target_modules=["q_proj"], lora_dropout=0.0, init_lora_weights=False)
    plain = PlainObjective(get_peft_model(tiny(family, **NOISY[family]), LoraConfig(**lora)).train())
    assert step(plain, 0)[0] == step(plain, 1)[0]
    if family == "seed_oss":
        spec = dict(gate="none", less_rank=4, less_hidden=8, less_dropout=0.0)
        model = get_peft_model(tiny(family, torch.float32, **NOISY[family]), GateKVConfig(**spec)).train()
        less = LessObjective(model, "sinks_recent", "kl")
        long = batch_of(n=96, split=72)
        for warm in (True, False):
            assert step(less, 0, 0.7, long, warm=warm)[0] == step(less, 1, 0.7, long, warm=warm)[0] > 0
        dropping = get_peft_model(tiny(family, torch.float32), GateKVConfig(**spec | {"less_dropout": 0.5})).train()
        less = LessObjective(dropping, "sinks_recent")
        pairs = zip(*(step(less, seed, 0.7, long)[1] for seed in (0, 1)))
        assert not all(torch.equal(a, b) for a, b in pairs), "maps drop what they are told to"


def test_modes_are_put_back_however_a_step_ends():
    model = gated("opt")
    base_model(model).model.decoder.layers[0].eval()
    recompute_layers(model)
    modes = {n: m.training for n, m in model.named_modules()}
    functions = [getattr(m, "_gradient_checkpointing_func", None) for m in model.modules()]
    with pytest.raises(RuntimeError, match="out of memory"), quiet(model):
        assert not base_model(model).model.decoder.training
        raise RuntimeError("out of memory")
    assert modes == {n: m.training for n, m in model.named_modules()}
    assert functions == [getattr(m, "_gradient_checkpointing_func", None) for m in model.modules()]


def test_it_is_said_once(monkeypatch):
    said = []
    monkeypatch.setattr(logging.getLogger("gatekv.training.noise"), "warning", lambda text, *a, **k: said.append(text))
    for _ in range(2):
        PlainObjective(get_peft_model(tiny("opt", dropout=0.12), LoraConfig(r=2, target_modules=["q_proj"])))
    PlainObjective(get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"])))
    assert said == ["OPTForCausalLM: dropout=0.12 off in training; gates learn against the model without noise."]
