"""TRL's SFTTrainer trains gates: what should move moves, the loss is the objective's, the adapter loads and evicts."""

import pytest
import torch
from conftest import tiny
from datasets import Dataset
from letters import letters
from peft import PeftModel, get_peft_model
from trl import SFTConfig

import gatekv
from gatekv.integrations.trl import GatedSFTTrainer, row_of
from gatekv.recompute import recompute_layers

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
GATE = {"window": 4, "sinks": 2, "relaxation": "ste", "initial_logit": 0.5}
LOUD = {"logging_steps": 1, "learning_rate": 1e-2}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


def data(kind="prompt"):
    texts = [f"the cat {i} is " + "red and fat " * (2 + i % 3) for i in range(8)]
    if kind == "prompt":
        return Dataset.from_list([{"prompt": t, "completion": f"yes, {len(t)}"} for t in texts])
    return Dataset.from_list([{"text": t} for t in texts])


def trainer_of(folder, model=None, kind="prompt", spec=None, options=None, **more):
    torch.manual_seed(0)
    args = dict(output_dir=str(folder), per_device_train_batch_size=2, max_steps=3, report_to="none", use_cpu=True,
                bf16=False, save_strategy="no", disable_tqdm=True)  # fmt: skip
    more = {"peft_config": gatekv.GateKVConfig(**GATE | (spec or {})), "keep": 0.4} | more
    tokenizer = letters(None)
    tokenizer.pad_token = " "
    model = model or tiny(dtype=torch.float32)
    return GatedSFTTrainer(model=model, args=SFTConfig(**args | LOUD | (options or {})), train_dataset=data(kind),
                           processing_class=tokenizer, **more)  # fmt: skip


CASES = {
    "gate alone, behind the prompt": (None, {"prefill": "dense"}, "prompt"),
    "gate and LoRA, behind the prompt": ({"lora": LORA}, {"prefill": "dense"}, "prompt"),
    "gate and LoRA, inside of texts": ({"lora": LORA}, {"sparsity": "abs"}, "text"),
    "a gate that reads whole prompts": ({"gate": "attention", "context": "prompt"}, {}, "prompt"),
    "distilled, without a task": (None, {"objective": "kl"}, "text"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_trained_moves_and_the_base_does_not(case, tmp_path, capsys):
    spec, objective, kind = CASES[case]
    trainer = trainer_of(tmp_path, kind=kind, spec=spec, objective=objective)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "gatekv_gate" in n or "lora_" in n}
    assert any("lora_" in n for n in moved) == (spec is not None and "lora" in spec)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3 and all({"keep", "task", "oracle"} <= set(entry) for entry in logged)


def test_the_adapter_loads_and_generates_from_a_smaller_cache(tmp_path):
    trainer = trainer_of(tmp_path, spec={"lora": LORA}, objective={"prefill": "dense"})
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(tiny(dtype=torch.float32), tmp_path).eval()
    trained = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, trained[n]) for n, p in loaded.named_parameters())
    ids = trainer.processing_class("the cat 3 is " + "red and fat " * 6, return_tensors="pt").input_ids
    outs = []
    for model in (loaded, trainer.model.eval()):
        cache = gatekv.KVCache(model, "gate+global", 0.4, block_size=1)
        outs.append(model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=4, do_sample=False))
        assert torch.stack(cache.flags())[..., : ids.shape[1]].float().mean() <= 0.4
    assert torch.equal(*outs)


def test_a_trl_row_is_a_row_of_our_recipes():
    row = row_of([0, 0, 5, 6, 7, 8, 9], [0, 0, 1, 1, 1, 1, 1], [-100, -100, -100, -100, -100, 8, 9])
    assert (row.ids, row.weights, row.split, row.lengths) == ([5, 6, 7, 8, 9], [0, 0, 1, 1, 0], 2, [5])


def gradients(trainer, batches):
    trainer.model.train()
    for batch in batches:
        trainer.accelerator.backward(trainer.compute_loss(trainer.model, batch) / len(batches))
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return grads


def test_accumulated_steps_are_one_large_step(tmp_path):
    """Trainer must divide our mean by the number of micro-batches, and TRL must not have it summed over tokens."""
    moved = []
    for rows, steps in ((4, 1), (2, 2), (1, 4)):
        options = dict(per_device_train_batch_size=rows, gradient_accumulation_steps=steps, max_steps=1, optim="sgd",
                       max_grad_norm=0.0, learning_rate=1.0)  # fmt: skip
        trainer = trainer_of(tmp_path / str(rows), spec={"lora": LORA}, objective={"prefill": "dense"}, options=options)
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        moved.append({n: p.detach() - before[n] for n, p in trainer.model.named_parameters() if n in before})
    for other in moved[1:]:
        for name, step in moved[0].items():
            torch.testing.assert_close(other[name], step, rtol=1e-3, atol=1e-4 * step.abs().max().item())


@pytest.mark.covering(1)  # either form, with LoRA and without
@pytest.mark.parametrize("objective", [{"prefill": "dense"}, {"sparsity": "budget"}], ids=["behind", "inside"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["gate alone", "with LoRA"])
def test_layers_may_be_computed_again_as_trl_has_it(lora, objective, tmp_path):
    """TRL's default is to checkpoint; in either form the step is the step without."""
    moved = []
    for i, more in enumerate(
        ({"gradient_checkpointing": False}, {}, {"use_reentrant": True}, {"use_reentrant": False})
    ):
        options = {"gradient_checkpointing_kwargs": more} if "use_reentrant" in more else more
        options |= dict(max_steps=1, optim="sgd", max_grad_norm=0.0, learning_rate=1.0)
        spec = {"lora": lora} if lora else {}
        trainer = trainer_of(tmp_path / str(i), spec=spec, objective=objective, options=options)
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        moved.append({n: p.detach() - before[n] for n, p in trainer.model.named_parameters() if n in before})
    assert any(step.abs().sum() > 0 for step in moved[0].values())
    for other in moved[1:]:
        for name, step in moved[0].items():
            torch.testing.assert_close(other[name], step, rtol=1e-5, atol=1e-6 * step.abs().max().item())


def test_pads_and_recomputed_layers_change_nothing(tmp_path):
    trainer = trainer_of(
        tmp_path, spec={"lora": LORA}, objective={"prefill": "dense"}, options={"gradient_checkpointing": False}
    )
    (batch,) = [b for b, _ in zip(trainer.get_train_dataloader(), range(1))]
    wide = {k: torch.nn.functional.pad(v, (0, 5), value=-100 if k == "labels" else 0) for k, v in batch.items()}
    plain = gradients(trainer, [batch])
    recompute_layers(trainer.model)
    for found in (gradients(trainer, [batch]), gradients(trainer, [wide])):
        assert found.keys() == plain.keys() and any(g.abs().sum() > 0 for g in plain.values())
        for name, g in found.items():
            torch.testing.assert_close(g, plain[name], rtol=1e-4, atol=1e-7)


def test_evaluation_gives_the_loss_at_the_target(tmp_path):
    trainer = trainer_of(tmp_path, eval_dataset=data(), objective={"prefill": "dense"})
    trainer.train()
    found = trainer.evaluate()["eval_loss"]
    trainer.keep = 1.0
    assert 0 < found != trainer.evaluate()["eval_loss"]


def test_a_wrapped_model_is_taken_too(tmp_path):
    model = get_peft_model(tiny(dtype=torch.float32), gatekv.GateKVConfig(**GATE))
    trainer = trainer_of(tmp_path, model=model, peft_config=None, options={"max_steps": 1})
    trainer.train()
    assert trainer.model is model and trainer.state.global_step == 1


def test_what_would_train_wrongly_is_refused(tmp_path):
    def refused(said, **more):
        with pytest.raises(ValueError, match=said):
            trainer_of(tmp_path, **more).train()

    refused("padding_free", options={"padding_free": True, "max_length": None})
    refused("keep is the share", keep=0.0)
    refused("lagrange", objective={"sparsity": "lagrange"})
    refused("`prompt` and `completion`", kind="text", objective={"prefill": "dense"})
    refused(
        "compute_metrics",
        eval_dataset=data(),
        compute_metrics=lambda p: {},
        options={"eval_strategy": "steps", "eval_steps": 1},
    )
