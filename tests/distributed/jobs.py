"""What every backend trains in test_two_processes: tiny gates, low-rank maps and LoRA on a two-layer random model.

One process alone takes the same micro-batches as two, except where `whole` says otherwise: other batches round
differently, and where a gradient is 0 but for rounding Adam makes steps of it.
"""

import os
import signal

import torch
from peft import get_peft_model
from test_training import ToyData
from transformers import AutoModelForCausalLM

from gatekv import GateKVConfig
from gatekv.config import GateSpec
from gatekv.modules import wrappers
from gatekv.recompute import recompute_layers
from gatekv.training import losses, sharding
from gatekv.training.config import CPTConfig
from gatekv.training.joint import JointObjective
from gatekv.training.less_config import LessConfig
from gatekv.training.lesson import LessObjective, with_maps
from gatekv.training.objective import Objective
from gatekv.training.plain import PlainObjective
from gatekv.training.sft_config import SFTConfig

STEPS = 20
ROWS = 4  # a step, however many processes and micro-batches share them


class HalfTheData(ToyData):
    """The last process gets SIGTERM when it reads its last rows of the first half."""

    def batch(self, first, rows, **kwargs):
        if first + rows == STEPS // 2 * ROWS:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(first, rows, **kwargs)


def load(path, dtype=torch.float32):
    """The base, loaded as recipes do: under ZeRO-3 each process keeps its part."""
    with sharding.loading(dtype):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    torch.manual_seed(0)
    return model


def gate(whole=False, micro: int = 2, dtype=torch.float32, chunk: int = 1 << 16, recomputed=False, **changes):
    """Gates by Objective. micro: batches a step. whole: one process takes all rows in one. chunk: tokens whose logits
    exist at a time. recomputed: with gradient checkpointing."""

    def job(base, folder, world: int, **more):
        losses.CHUNK_NUMBERS = 97 * chunk
        own = {
            "objective": "kl",
            "sparsity": "abs",
            "scope": "layer",
            "prefill": "sparse",
            "oracle_weight": 0.0,
        } | changes
        options = dict(batch_size=ROWS // micro, accumulation=micro // world, learning_rate=5e-3) | own
        if whole and world == 1:
            options |= dict(batch_size=ROWS, accumulation=1)
        options |= dict(window=4, sinks=2, hidden=8, heads=2, head_dim=4, context_window=8, initial_logit=0.5)
        options |= dict(output_dir=str(folder), max_steps=STEPS, save_every=STEPS // 2, target_keep=0.5)
        config = CPTConfig(**options | more)
        model = load(base, dtype)
        with sharding.whole_sample(model):
            model = get_peft_model(model, GateKVConfig(**vars(config.spec))).train()
        for w in wrappers(model):  # zero at first, which would keep the first step's gradient from the layers before
            torch.nn.init.normal_(w.gate().out.weight, std=0.5)
        if recomputed:
            recompute_layers(model)
        return Objective(model, sparsity_weight=2.0, **own), config

    return job


def less(objective: str = "attention_mse", policy: str = "keydiff", form: str = "kernel", joint: bool = False):
    """Low-rank maps by LessObjective, as recipes/less.py makes them; joint: with a gate that learns too."""

    def job(base, folder, world: int, **more):
        maps = dict(less_form=form, less_rank=4, less_hidden=16, less_dropout=0.0, less_policy=policy, less_budget=0.5)
        model, spec = load(base), GateSpec(window=4, sinks=2, hidden=8, relaxation="ste", initial_logit=0.5)
        with sharding.whole_sample(model):
            model = with_maps(model, "", spec if joint else None, joint, **maps).train()
        options = dict(output_dir=str(folder), policy=policy, objective=objective, form=form, dropout=0.0)
        options |= dict(batch_size=ROWS // 2, accumulation=2 // world, max_steps=STEPS, save_every=STEPS // 2)
        options |= dict(target_keep=0.5)
        options |= dict(train_gate=joint, warm_share=0.5 if joint else 0.65)
        teach = JointObjective(model, policy) if joint else LessObjective(model, policy, objective)
        return teach, LessConfig(**(options | {"learning_rate": 5e-3} | more))

    return job


def sft(gate: str = "mlp", dtype=torch.float32):
    """A gate and LoRA, or LoRA alone, as recipes/sft.py makes them; dropout is a function of the row."""

    def job(base, folder, world: int, **more):
        options = dict(output_dir=str(folder), batch_size=ROWS // 2, accumulation=2 // world, learning_rate=5e-3)
        options |= dict(max_steps=STEPS, save_every=STEPS // 2, target_keep=0.5, sinks=2, hidden=8, initial_logit=0.5)
        options |= dict(gate=gate, lora_rank=4, lora_alpha=8, lora_dropout=0.1)
        config = SFTConfig(**options | more)
        model = load(base, dtype)
        with sharding.whole_sample(model):
            model = get_peft_model(model, GateKVConfig(lora=config.lora, **vars(config.spec))).train()
        for name, p in model.named_parameters():  # zero at first, which would keep A's gradient to rounding
            if ".lora_B." in name:
                torch.nn.init.normal_(p, std=0.1)
        if gate == "none":
            return PlainObjective(model), config
        for w in wrappers(model):
            torch.nn.init.normal_(w.gate().out.weight, std=0.5)
        return Objective(model, objective="lm", prefill="dense", oracle_weight=0.3), config

    return job


JOBS = {
    "gate": gate(whole=True),
    "accumulated": gate(whole=True, micro=4, sparsity="lagrange"),
    "behind": gate(prefill="dense", sparsity="budget", scope="global", oracle_weight=0.3, chunk=4),
    "local": gate(objective="attention_mse", sparsity="budget"),
    "bf16": gate(sparsity="budget", dtype=torch.bfloat16),
    "recomputed": gate(sparsity="budget", recomputed=True),
    "less": less(),
    "less_kl": less("kl"),
    "centroids": less(form="centroids"),
    "joint": less("kl", "gate_alone+global", "centroids", joint=True),
    "sft": sft(),
    "lora": sft("none"),
    "lora_bf16": sft("none", torch.bfloat16),
}
