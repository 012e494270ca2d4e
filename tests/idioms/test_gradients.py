"""Gates learn the same from whatever loop: one's own, transformers' Trainer, TRL's, Accelerate's."""

import pytest
import torch
from peft import get_peft_model
from test_logit_head import batch_of, tiny
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from transformers import Trainer, TrainerCallback, TrainingArguments

import gatekv
from gatekv import GateKVConfig
from gatekv.modules import base_model, gated_pass, gates_off, wrappers
from gatekv.passes import Observe, Relaxed
from gatekv.training.objective import Objective
from gatekv.training.sparsity import keep_rates

# No capacity-limited experts, no MLA: twelve families that gates train on.
FAMILIES = [
    "llama", "qwen2", "qwen3", "mistral", "olmo2", "smollm3", "starcoder2", "glm", "ministral", "cohere", "granite", "gemma3_text",
]  # fmt: skip
RECOMPUTED = {"whole": None, "transformers": {}, "reentrant": {"use_reentrant": True}, "not": {"use_reentrant": False}}


def gated(family="llama", dtype=torch.float64, **spec):
    """A gate with something to say, in training mode."""
    model = get_peft_model(tiny(family, dtype), GateKVConfig(**{"window": 4, "sinks": 2, "relaxation": "log"} | spec))
    generator = torch.Generator().manual_seed(1)
    for w in wrappers(model):
        gate = w.gate().to(dtype)
        torch.nn.init.zeros_(gate.out.bias)
        gate.out.weight.data.copy_(torch.randn(gate.out.weight.shape, generator=generator))
    return model.train()


def gradients(model):
    found = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    assert found and all("gatekv_" in name for name in found) and any(g.abs().sum() > 0 for g in found.values())
    return found


def assert_equal(found, wanted, rtol):
    assert found.keys() == wanted.keys()
    for name, g in found.items():
        assert (g - wanted[name]).abs().max() <= rtol * wanted[name].abs().max(), name


def ours(model, batch, **objective):
    out = Objective(model, **{"objective": "lm", "sparsity": "abs", "sparsity_weight": 0.0} | objective)(batch, 0.4)
    out["loss"].backward()
    return out["loss"].detach(), gradients(model)


def kl(student, teacher):
    p, q = teacher.log_softmax(-1)[:, :-1], student.log_softmax(-1)[:, :-1]
    return (p.exp() * (p - q)).sum(-1).mean()


@pytest.mark.parametrize("prefill", ["sparse", "dense"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_an_own_loop_with_its_own_loss(recomputed, prefill):
    """Divergence from the model without gates and the share that gates keep, by the public parts alone."""
    batch, grads = batch_of(), []
    split = 12 if prefill == "dense" else None
    for own in (True, False):
        model = gated()
        if recomputed:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        if not own:
            grads.append(ours(model, batch, objective="kl", sparsity_weight=1.0, prefill=prefill)[1])
            continue
        ids = batch["input_ids"]
        with torch.no_grad(), gates_off(model):
            teacher = model(ids).logits[:, split:]
        with gated_pass(model, Relaxed(split=split)) as said:
            student = model(ids).logits[:, split:]
        rates = [
            keep_rates(_flags(o, split), o.valid, 2, 4).mean(-1) for o in said.values()
        ]  # by layer, [batch]  # fmt: skip
        (kl(student, teacher) + (torch.stack(rates).mean(0) - 0.4).abs().mean()).backward()
        grads.append(gradients(model))
    assert_equal(*grads, rtol=1e-9)


def _flags(said, split):
    from gatekv.attention import relaxed_flags
    from gatekv.config import GateSpec

    return relaxed_flags(said.logits, said.valid, GateSpec(window=4, sinks=2), form="log", split=split)


def test_an_own_loop_by_layers():
    """What gates say beside the plain output has a gradient, however layers are checkpointed."""
    grads = []
    for recomputed in RECOMPUTED.values():
        model = gated()
        if recomputed is not None:
            model.gradient_checkpointing_enable(recomputed or None)
            model.enable_input_require_grads()
        with gated_pass(model, Observe(received=True)) as said:
            model(batch_of()["input_ids"])
        sum((o.logits - o.received.clamp_min(1e-6).log()).square().mean() for o in said.values()).backward()
        grads.append(gradients(model))
    for found in grads[1:]:
        assert_equal(found, grads[0], rtol=1e-9)


@pytest.mark.parametrize("how", RECOMPUTED)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_own_labels(family, how):
    """`model(…, labels=…).loss` outside of any pass; float32, because transformers takes that loss in it."""
    batch = batch_of()
    wanted_loss, wanted = ours(gated(family, torch.float32), batch)
    model = gated(family, torch.float32)
    if RECOMPUTED[how] is not None:
        model.gradient_checkpointing_enable(RECOMPUTED[how] or None)
        model.enable_input_require_grads()
    loss = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["input_ids"]).loss
    assert abs(loss - wanted_loss) <= 1e-5 * wanted_loss
    loss.backward()
    assert_equal(gradients(model), wanted, rtol=1e-5)


def test_layers_checkpointed_by_torch_follow_the_pass():
    """As FSDP2's activation checkpointing wraps them, in both forms."""
    batch, grads = batch_of(), []
    for form in (None, CheckpointImpl.NO_REENTRANT, CheckpointImpl.REENTRANT):
        model = gated()
        layers = base_model(model).model.layers
        for i in range(len(layers) if form else 0):
            layers[i] = checkpoint_wrapper(layers[i], checkpoint_impl=form)
        grads.append(ours(model, batch, objective="kl", sparsity="budget", sparsity_weight=1.0)[1])
    for found in grads[1:]:
        found = {n.replace("_checkpoint_wrapped_module.", ""): g for n, g in found.items()}
        assert_equal(found, grads[0], rtol=1e-9)


class Grads(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = gradients(model)


@pytest.mark.covering(1)  # every way to recompute; test_trl has more of TRL
@pytest.mark.parametrize("how", RECOMPUTED)
@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_trainers(kind, how, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    batch, spy = batch_of(), Grads()
    wanted = ours(gated(dtype=torch.float32), batch)[1]
    arguments = dict(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=1, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=RECOMPUTED[how] is not None, max_grad_norm=0.0,
        gradient_checkpointing_kwargs=RECOMPUTED[how] or None, bf16=False,
    )  # fmt: skip
    model, rows = (
        gated(dtype=torch.float32),
        [{"input_ids": r.tolist(), "labels": r.tolist()} for r in batch["input_ids"]],
    )
    if kind == "trl":
        trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
        from letters import letters

        tokenizer = letters(None)
        tokenizer.pad_token = " "
        trainer = trl.SFTTrainer(
            model=model, args=trl.SFTConfig(**arguments, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, callbacks=[spy],
        )  # fmt: skip
    else:
        trainer = Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=rows, callbacks=[spy])
    trainer.train()
    assert_equal(spy.found, wanted, rtol=1e-5)


def test_gates_apply_in_training_mode_and_not_in_evaluation_mode():
    model, ids = gated(), batch_of()["input_ids"]
    with torch.no_grad():
        trained, plain = model(ids).logits, model.eval()(ids).logits
        with gatekv.parallel(model, "log"):
            assert torch.equal(model(ids).logits, trained)
        assert not torch.equal(trained, plain)
