"""A training step waits for its devices once, at its end."""

import contextlib
import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import gated, tiny
from peft import LoraConfig, get_peft_model

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from mock_device import MockDevices, host

from gatekv.config import GateSpec
from gatekv.modules import base_model
from gatekv.ops.sequence import ALONE
from gatekv.training import loop
from gatekv.training.objective import Objective
from gatekv.training.packing import Row, collate
from gatekv.training.plain import PlainObjective


class Data:
    """Rows of 40 tokens: whole, of unlike lengths, or of two documents each."""

    def __init__(self, kind):
        self.kind = kind

    def batch(self, first, rows, align=False):
        generator, made = torch.Generator().manual_seed(first), []
        for i in range(rows):
            n = 40 - (5 * i if self.kind == "padded" else 0)
            ids = torch.randint(1, 90, (n,), generator=generator).tolist()
            made.append(Row(ids, [1.0] * (n - 1) + [0.0], 25, [15, n - 15] if self.kind == "packed" else [n]))
        batch = collate(made, align)
        if self.kind != "packed":
            del batch["segments"]
        return batch


def objective_of(**options):
    if not options:
        return PlainObjective(get_peft_model(tiny(dtype=torch.float32), LoraConfig(target_modules=["q_proj"])).train())
    relaxation = options.pop("relaxation", "ste")
    torch.manual_seed(0)
    return Objective(gated(dtype=torch.float32, window=4, sinks=2, relaxation=relaxation).train(), **options)


def two_steps(objective, data, device, around):
    """(record of the second step, gradients' effect) with two micro-batches a step, as the loop makes it."""
    prefill, spec = getattr(objective, "prefill", "sparse"), getattr(objective, "spec", GateSpec())
    config = SimpleNamespace(
        batch_size=2, accumulation=2, max_steps=2, prefill=prefill, spec=spec, seed=0, warm_share=0.0,
        max_grad_norm=1.0, dataloader_num_workers=0,
    )  # fmt: skip
    accelerator = SimpleNamespace(
        device=torch.device(device), process_index=0, num_processes=1, sync_gradients=True,
        accumulate=lambda module: contextlib.nullcontext(), backward=lambda loss: loss.backward(),
        clip_grad_norm_=torch.nn.utils.clip_grad_norm_, reduce=lambda t, reduction: t, unwrap_model=lambda m: m,
    )  # fmt: skip
    batches, records = loop._batches(data, config, accelerator, 0, ALONE), []
    learns = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learns, lr=1e-4)
    for step in range(2):
        around()
        record, norm, *_ = loop._step(
            objective, optimizer, batches, config, accelerator, ALONE, step, 0.4, lambda: [False, False]
        )
        records.append(record | {"norm": norm})
    return records, learns


STEPS = {
    "distilled": dict(objective="kl", oracle_weight=0.3),
    "behind the prompt": dict(objective="kl", prefill="dense", oracle_weight=0.3, polarise_weight=0.1),
    "layer by layer": dict(objective="attention_mse", scope="layer"),
    "penalty and noise": dict(objective="lm", sparsity="lagrange", relaxation="gumbel", kl_weight=0.5),
    "LoRA alone": {},
}


# Flags that act behind a prompt are for rows of one document.
CASES = [(r, n) for r in ("whole", "padded", "packed") for n in STEPS if (r, n) != ("packed", "behind the prompt")]


def spread(objective, devices):
    """The second layer and the norm on a second device, as accelerate's device_map has it."""
    inner = base_model(objective.model)
    devices.move(objective, lambda name: "meta:1" if ".layers.1." in name or ".model.norm." in name else "meta:0")
    for part, device in (
        (inner.model.layers[0], 0),
        (inner.model.layers[1], 1),
        (inner.model.norm, 1),
        (inner.lm_head, 0),
    ):
        add_hook_to_module(part, AlignDevicesHook(execution_device=torch.device("meta", device)))
    return objective


@pytest.mark.covering(1)  # every step over every kind of rows, by turns on one device and on two
@pytest.mark.parametrize("place", [lambda objective, devices: devices.move(objective), spread], ids=["one", "two"])
@pytest.mark.parametrize("rows, name", CASES)
def test_a_step_looks_at_the_device_once(rows, name, place):
    """On one device and on two; and what comes out is what the CPU makes."""
    objective = objective_of(**STEPS[name])
    wanted, learned = two_steps(copy.deepcopy(objective), Data(rows), "cpu", lambda: None)
    devices = MockDevices()
    with devices:
        moved = place(objective, devices)
        found, learns = two_steps(moved, Data(rows), "meta:0", devices.reads.clear)
    assert sum(devices.reads.values()) == 1, dict(devices.reads)
    for record, same in zip(found, wanted):
        assert record == pytest.approx(same, rel=1e-4)
    for p, q in zip(learns, learned):
        torch.testing.assert_close(host(p.detach()), q.detach(), rtol=1e-4, atol=1e-6)
