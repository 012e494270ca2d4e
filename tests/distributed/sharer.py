"""Run in two processes by test_shared_rows: losses and gradients of rows that both share, against whole rows, float64.

sharer.py OUT: writes {case: {"loss": [shared, whole], "gradient": largest difference, "size": largest gradient, …}}.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT), *(str(ROOT / p) for p in ("tests", "tests/unit"))]

import torch
import torch.distributed as dist
from conftest import tiny
from peft import get_peft_model
from test_training import ToyData

from gatekv import GateKVConfig
from gatekv.modules import wrappers
from gatekv.ops.sequence import Sequence
from gatekv.recompute import recompute_layers
from gatekv.training import checkpoint, losses
from gatekv.training.objective import Objective

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"]}
CASES = {
    "kl": {},
    "reverse_kl": {"objective": "reverse_kl", "scope": "head", "sparsity": "budget"},
    "lm": {"objective": "lm"},
    "lm beside kl, lora": {"objective": "lm", "kl_weight": 0.5, "lora": LORA},
    "kl, lora, budget": {"sparsity": "budget", "lora": LORA, "oracle_weight": 0.3},
    "hidden_mse": {"objective": "hidden_mse", "sparsity": "budget", "scope": "layer"},
    "attention_mse": {"objective": "attention_mse", "scope": "layer"},
    "attention_mse, budget, heads": {"objective": "attention_mse", "sparsity": "budget", "scope": "head"},
    "attention_mse, budget, packed": {"objective": "attention_mse", "sparsity": "budget", "scope": "layer", "packed": True},
    "oracle": {"objective": "none", "sparsity": "budget", "oracle_weight": 1.0, "polarise_weight": 0.1},
    "oracle, packed": {"objective": "none", "sparsity": "budget", "oracle_weight": 1.0, "packed": True},
    "packed": {"sparsity": "budget", "packed": True},
    "lagrange": {"sparsity": "lagrange", "scope": "layer"},
    "square": {"sparsity": "square", "scope": "head"},
    "hinge": {"sparsity": "hinge", "scope": "layer"},
    "linear penalty": {"sparsity": "linear"},
    "concave, heads": {"sparsity": "concave", "scope": "head"},
    "decay": {"sparsity": "capacity", "relaxation": "decay"},
    "linear": {"gate": "linear", "sparsity": "budget", "relaxation": "ste"},
    "key_mlp": {"gate": "key_mlp", "sparsity": "budget"},
    "recomputed": {"sparsity": "budget", "recomputed": True, "lora": LORA},
    "qwen3": {"family": "qwen3", "sparsity": "budget"},
    "phi3": {"family": "phi3", "sparsity": "budget"},
}  # fmt: skip


class Packed(ToyData):
    """Two documents in each row, side by side."""

    def batch(self, first, rows, **kwargs):
        batch = super().batch(first, rows, **kwargs)
        real, place = batch["attention_mask"], batch["attention_mask"].cumsum(-1) - 1
        half = real.sum(-1, keepdim=True) // 2
        segments = (place >= half).long().masked_fill(real == 0, -1)
        positions = (place - half * (place >= half)).masked_fill(real == 0, 0)
        return batch | {"segments": segments, "position_ids": positions}


def build(family="llama", lora=None, recomputed=False, **options) -> Objective:
    spec = {name: options.pop(name) for name in ("gate", "relaxation") if name in options}
    spec |= dict(window=4, sinks=2, hidden=8, initial_logit=0.5, lora=lora)
    model = get_peft_model(tiny(family, torch.float64, num_key_value_heads=2), GateKVConfig(**spec)).double().train()
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if ".lora_B." in name or "gatekv_gate" in name and "out" in name:
            with torch.no_grad():
                p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    if recomputed:
        recompute_layers(model)
    return Objective(model, **({"sparsity": "abs", "sparsity_weight": 2.0} | options))


def gradients(objective: Objective, batch) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    objective.zero_grad()
    out = objective(batch, 0.4)
    out["loss"].backward()
    found = {name: p.grad.clone() for name, p in checkpoint.trained(objective).items() if p.grad is not None}
    return {k: v.detach().double().mean() for k, v in out.items()}, found


def mean(tensor: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


def main(out: Path) -> None:
    torch.set_num_threads(1)
    losses.CHUNK_NUMBERS = 97 * 16
    dist.init_process_group("gloo")
    sequence, results = Sequence(dist.group.WORLD, dist.get_rank(), dist.get_world_size()), {}
    for name, options in CASES.items():
        options = dict(options)
        data = Packed() if options.pop("packed", False) else ToyData()
        objective, batch = build(**options), data.batch(3, 3)
        assert batch["input_ids"].shape[1] % 2, "parts of unequal length"
        whole, wanted = gradients(objective, batch)
        probe = objective.soft_hard(batch, 0.4)
        objective.share_rows(sequence)
        shared, found = gradients(objective, batch)
        again = objective.soft_hard(batch, 0.4)
        assert found.keys() == wanted.keys() and not any(w.running for w in wrappers(objective.model))
        pairs = [(mean(found[n].double()), wanted[n].double()) for n in wanted]
        results[name] = {
            "gradient": max(float((a - b).abs().max()) for a, b in pairs),
            "size": min(float(b.abs().max()) for _, b in pairs),
            "values": {k: [float(mean(shared[k])), float(whole[k])] for k in whole},
            "probe": [list(again.values()), list(probe.values())],
        }
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
