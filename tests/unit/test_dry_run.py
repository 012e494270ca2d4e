"""What a dry run says is what a run then holds; it needs a config and no weights."""

import time
from dataclasses import asdict

import pytest
import torch
import zoo
from conftest import gated, tiny
from peft import get_peft_model
from test_training import ToyData, config, make
from transformers import AutoModelForCausalLM, LlamaConfig

import gatekv
from gatekv.modules import base_model
from gatekv.recipes import cpt, frame, less, sft
from gatekv.training import checkpoint
from gatekv.training.dry_run import Plan, memory, on_meta, plan_of, report, text_of
from gatekv.training.objective import Objective
from gatekv.training.options import load_config
from gatekv.training.plain import PlainObjective
from gatekv.training.sft_config import SFTConfig

LLAMA_8B = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                       num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072)  # fmt: skip
LLAMA_70B = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072)  # fmt: skip


def held(tensors) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def step_holds(module, said) -> None:
    """A step of `module` holds the bytes that `said` (a dict of Memory) has; several processes: tests/distributed."""
    learning = list(checkpoint.trained(module).values())
    optimizer = torch.optim.AdamW(learning)
    module(ToyData().batch(0, 2, align=True), 0.5)["loss"].backward()
    assert said["gradients"] == pytest.approx(held(p.grad for p in learning), rel=0.1)
    optimizer.step()
    state = [v for p in learning for v in optimizer.state[p].values()]
    assert said["optimizer"] == pytest.approx(held(state), rel=0.1)
    frozen = [p for p in module.parameters() if not p.requires_grad] + list(module.buffers())
    assert said["frozen"] == pytest.approx(held(frozen), rel=0.1)
    assert said["trained"] == pytest.approx(held(learning), rel=0.1)
    parts = ("frozen", "trained", "gradients", "optimizer")
    assert said["total"] == sum(said[part] for part in parts) and said["buckets"] == 0


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_one_process_holds_what_was_predicted(base):
    module = make(objective="attention_mse", sparsity="abs")
    base_model(module.model).to(base)
    for w in gatekv.modules.wrappers(module.model):
        w.gatekv_gate.float()
    step_holds(module, asdict(memory(module, Plan("ddp", 1))))


@pytest.mark.parametrize("gate", ["mlp", "none"])
def test_lora_is_in_what_fine_tuning_says_and_holds(tmp_path, model_folder, gate):
    """In float32 over a bfloat16 base, beside a gate and alone."""
    options = ["--gate", gate, "--lora_rank", "4", "--sequence_length", "128", "--dtype", "bfloat16"]
    options += ["--output_dir", str(tmp_path / "out")]
    said = {plan: sft.main([*options, "--model", model_folder, "--dry_run", plan]) for plan in ("ddp:1", "zero3:2")}
    config = load_config(options, SFTConfig)
    model = AutoModelForCausalLM.from_config(tiny().config, dtype=torch.bfloat16)
    model = get_peft_model(model, gatekv.GateKVConfig(lora=config.lora, **vars(config.spec))).train()
    learning = {n: p for n, p in model.named_parameters() if ".lora_" in n or "gatekv_" in n}
    assert {p.dtype for p in learning.values()} == {torch.float32}
    assert said["ddp:1"]["trained"] == sum(p.numel() for p in learning.values())
    assert said["zero3:2"]["trained"] == said["ddp:1"]["trained"]
    # Each process's half of gradients, of two moments and of ZeRO's own copy.
    parts = {name: said["zero3:2"]["bytes"][name] * 2 for name in ("gradients", "optimizer")}
    assert parts == {"gradients": held(learning.values()), "optimizer": 3 * held(learning.values())}
    step_holds(PlainObjective(model) if gate == "none" else Objective(model, objective="lm", prefill="dense"),
               said["ddp:1"]["bytes"])  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_without_weights_says_the_same_as_one_with_them(tied):
    shape = tiny(tie_word_embeddings=tied).config
    real = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    with_weights = get_peft_model(real, gatekv.GateKVConfig())
    without = on_meta(shape, "bfloat16", lambda m: get_peft_model(m, gatekv.GateKVConfig()))
    assert {p.device.type for p in without.parameters()} == {"meta"}
    for plan in (Plan("ddp", 1), Plan("zero3", 4)):
        assert memory(without, plan) == memory(with_weights, plan)


def test_plans_divide_what_they_say():
    module = make()
    whole = memory(module, Plan("ddp", 1))
    one, two, three, fsdp = (memory(module, Plan(kind, 4)) for kind in ("zero1", "zero2", "zero3", "fsdp2"))
    assert one.frozen == two.frozen == whole.frozen and fsdp.frozen == pytest.approx(whole.frozen / 4, rel=0.01)
    assert three.frozen == pytest.approx(1.25 * whole.frozen, rel=0.01), "tensors this small stay whole too"
    assert one.gradients == whole.gradients and two.gradients == pytest.approx(whole.gradients / 4, rel=0.01)
    assert one.optimizer == two.optimizer == three.optimizer == pytest.approx(1.5 * whole.optimizer / 4, rel=0.01)
    assert fsdp.optimizer == pytest.approx(whole.optimizer / 4, rel=0.01) and fsdp.buckets == 0
    assert memory(module, Plan("ddp", 4)).buckets == whole.trained and two.buckets == 2e9
    layer = base_model(module.model).model.layers[0]
    assert three.largest_layer == sum(p.numel() * p.element_size() for p in layer.parameters())


@pytest.mark.parametrize("text,environment,plan", [
    ("zero3:16", {}, Plan("zero3", 16)), ("zero3:16/8", {}, Plan("zero3", 16, 8)),
    ("auto", {"WORLD_SIZE": "8", "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_SP_SIZE": "4"},
     Plan("ddp", 8, 4)), ("auto", {}, Plan("ddp", 1)), ("auto", {"WORLD_SIZE": "8"}, Plan("ddp", 8)),
    ("auto", {"WORLD_SIZE": "8", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, Plan("zero3", 8)),
    ("auto", {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, Plan("fsdp2", 2)),
])  # fmt: skip
def test_the_plan_is_named_or_the_launchs(text, environment, plan):
    assert plan_of(text, environment) == plan


def test_a_deepspeed_file_names_the_stage(tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")}
    assert plan_of("auto", environment) == Plan("zero1", 1)


@pytest.mark.parametrize(
    "text,match",
    [("zero3", "zero3:16"), ("zero4:2", "Did you mean 'zero"), ("ddp:0", "at least 1"), ("ddp:6/4", "divides 6")],
)
def test_bad_plans(text, match):
    with pytest.raises(ValueError, match=match):
        plan_of(text)


@pytest.mark.parametrize("shape,parameters", [(LLAMA_8B, 8.03e9), (LLAMA_70B, 70.55e9)], ids=["8B", "70B"])
def test_large_shapes_take_seconds_and_no_memory(tmp_path, shape, parameters):
    start = time.process_time()
    module = on_meta(shape, "bfloat16", lambda m: get_peft_model(m, gatekv.GateKVConfig(task_type="CAUSAL_LM")))
    found = report(module, config(tmp_path, dry_run="fsdp2:8", max_steps=100, sequence_length=4096, accumulation=4))
    assert time.process_time() - start < 30
    assert found["parameters"] - found["trained"] == pytest.approx(parameters, rel=0.001)
    assert found["bytes"]["frozen"] == pytest.approx(2 * parameters / 8, rel=0.001)
    assert found["tokens_per_step"] == 2 * 4 * 8 * 4096 and found["tokens"] == 100 * found["tokens_per_step"]
    assert found["schedule"][-1]["step"] == 99 and found["schedule"][-1]["target"] == pytest.approx(0.2)
    assert "fsdp2, 8 processes" in text_of(found) and "not counted: activations" in text_of(found)


@pytest.fixture
def model_folder(tmp_path):
    """A config and nothing else."""
    tiny().config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("kind", ["qwen3_5_text", "gemma4_text", "gpt_oss"])
def test_models_with_layers_of_other_kinds(kind, tmp_path, unreachable):
    model = zoo.build(kind)
    model.config.save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--sequence_length", "128", "--output_dir", str(tmp_path / "out")]
    found = cpt.main([*options, "--dry_run", "--dtype", "float32"])
    peft = get_peft_model(model, gatekv.GateKVConfig(gate="mlp"))
    frozen = [*(p for p in peft.parameters() if not p.requires_grad), *peft.buffers()]
    assert found["bytes"]["frozen"] == pytest.approx(sum(p.numel() * p.element_size() for p in frozen), rel=0.1)
    assert 0 < found["trained"] < found["parameters"]


def test_the_recipes_say_what_they_will_take_and_do_nothing(tmp_path, model_folder, monkeypatch, capsys, unreachable):
    monkeypatch.setattr(frame, "load_model", lambda *a: pytest.fail("a dry run loads no weights"))
    gated(dtype=torch.float32).save_pretrained(tmp_path / "adapter")
    options = ["--model", model_folder, "--sequence_length", "128", "--output_dir", str(tmp_path / "out"), "--dry_run"]
    gates, maps, both = (
        cpt.main(options), less.main(options),
        less.main([*options, "zero2:4", "--adapter", str(tmp_path / "adapter"), "--policy", "gate+global"]),
    )  # fmt: skip
    assert not (tmp_path / "out").exists() and capsys.readouterr().out.count("memory ") == 3
    assert 0 < gates["trained"] < gates["parameters"] and gates["tokens"] == 140 * 128
    assert both["trained"] == maps["trained"] and both["plan"] == {"kind": "zero2", "processes": 4, "sharing": 1}
    assert both["parameters"] > maps["parameters"], "the gate is there, frozen"
    with pytest.raises(ValueError, match="exceeds the model's 512 positions"):
        cpt.main([*options, "--sequence_length", "600"])
    with pytest.raises(ValueError, match="config of model 'nowhere' cannot be read"):
        cpt.main(["--model", "nowhere", "--dry_run"])
