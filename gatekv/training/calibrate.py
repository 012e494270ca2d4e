"""After training: measure, on training text and with eviction on, which threshold keeps which share of tokens."""

from typing import cast

import torch
from torch import nn

from gatekv.adapter import set_calibration
from gatekv.config import GateSpec
from gatekv.gates.calibration import Calibration
from gatekv.modules import base_model, gate_spec, gated_pass
from gatekv.passes import Relaxed
from gatekv.training.data import TrainingData
from gatekv.training.streams import RESERVED

RATIOS = (1.0, 0.5, 0.25, 0.125, 0.0625)
LEVELS = (
    0.0, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.0625, 0.08, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9,
    1.0,
)  # fmt: skip


@torch.no_grad()
def logits_of(model: nn.Module, data: TrainingData, first: int, rows: int, threshold: float) -> torch.Tensor:
    """Gate logits of tokens beyond sinks and window, all layers and heads pooled, under eviction at `threshold`."""
    pooled = []
    device = base_model(model).device
    for row in range(rows):
        batch = {k: v.to(device) for k, v in data.batch(first + row, 1).items()}
        spec = cast(GateSpec, gate_spec(model))
        split = int(batch["split"][0]) if spec.context == "prompt" else None
        with gated_pass(model, Relaxed(form="hard", threshold=threshold, split=split)) as said:
            base_model(model).base_model(input_ids=batch["input_ids"], use_cache=False)
        pooled += [o.logits[..., spec.sinks : o.logits.shape[-1] - spec.window].flatten() for o in said.values()]
    return torch.cat(pooled).float().cpu()  # a few hundred thousand numbers, which not every device sorts in float64


def calibrate(
    model: nn.Module, data: TrainingData, rows: int = 4, keep: float | None = None, first: int = RESERVED[1]
) -> Calibration | None:
    """Measure and store the thresholds. Rows `first` … are training text that the run has not reached.

    keep: also make tau the threshold that keeps this share, for gates that were trained without a fixed one ("budget").
    A gate that reads whole prompts does not stream: it gets tau alone, and the result is None.
    """
    model.eval()
    levels, spec = torch.tensor(LEVELS), cast(GateSpec, gate_spec(model))
    if spec.context == "prompt":
        if keep is not None:
            logits = logits_of(model, data, first, rows, -torch.inf).sort().values
            set_calibration(model, None, float(_at(logits, torch.tensor([keep])).double().sigmoid()))
        return None
    protected = spec.sinks + spec.window
    table, threshold = [], -torch.inf
    for i in range(len(RATIOS)):
        logits = logits_of(model, data, first, rows, threshold).sort().values
        table.append([round(v, 5) for v in _at(logits, levels).tolist()])
        if i + 1 < len(RATIOS):  # the next ratio's threshold, judged by logits under the milder eviction before it
            level = max(0.0, (RATIOS[i + 1] * data.length - protected) / (data.length - protected))
            threshold = float(_at(logits, torch.tensor([level])))
    calibration = Calibration(list(RATIOS), list(LEVELS), table)
    tau = None if keep is None else torch.tensor(calibration.at_level(keep, keep)).double().sigmoid().item()
    set_calibration(model, calibration, tau)
    return calibration


def _at(ordered: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Thresholds that keep the shares `levels` of ordered (ascending) logits."""
    index = ((1 - levels) * len(ordered)).long().clamp(0, len(ordered) - 1)
    out = ordered[index]
    out[levels >= 1] = ordered[0] - 1
    return out
