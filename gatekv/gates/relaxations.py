"""From a gate's margins (logit - threshold, > 0 keeps) to the weights that attention uses, in training and deployed."""

import math
from collections.abc import Callable

import torch


def logit_of(probability: float) -> float:
    """The logit at which sigmoid equals `probability`."""
    return math.log(probability / (1 - probability))


def ste(margin: torch.Tensor) -> torch.Tensor:
    """Straight-through: the hard flag forward, the gradient of p backward; g = 1[p > tau] + p - sg(p) (2410.12876)."""
    p = torch.sigmoid(margin)
    return (margin > 0).to(p.dtype) + p - p.detach()


def log(margin: torch.Tensor) -> torch.Tensor:
    """Log-gate: attention scores get + log sigmoid(margin), i.e. the weight sigmoid(margin); never below e^-30."""
    return torch.sigmoid(margin.clamp_min(-30.0))


def _uniform(shape: torch.Size, device: torch.device, seed: int) -> torch.Tensor:
    """Numbers in (0, 1) drawn where they are used, in float64 where that exists."""
    kind = torch.float32 if device.type in ("mps", "xpu") else torch.float64
    try:
        generator = torch.Generator(device)
    except RuntimeError:  # a device without a generator of its own
        generator = torch.Generator()
    edge = max(1e-9, torch.finfo(kind).eps / 2)
    drawn = torch.rand(shape, generator=generator.manual_seed(seed), dtype=kind, device=generator.device)
    return drawn.clamp(edge, 1 - edge).to(device)


def gumbel(margin: torch.Tensor, temperature: float, seed: int | None) -> torch.Tensor:
    """Binary Gumbel-softmax: sigmoid((margin + logistic noise) / temperature), never below e^-30 (DMS, 2506.05345).

    The noise is a pure function of `seed`, so that a resumed run and a recomputed layer see the same; None: no noise.
    """
    if seed is not None:
        u = _uniform(margin.shape, margin.device, seed)
        margin = margin + (u.log() - (-u).log1p()).to(margin)
    return log(margin / temperature)


def hard(margin: torch.Tensor) -> torch.Tensor:
    """The deployed flag, without gradient."""
    return (margin > 0).to(margin.dtype)


def relax(form: str, margin: torch.Tensor, temperature: float, seed: int | None = None) -> torch.Tensor:
    """The weight in [0, 1] of tokens with that margin, by a relaxation's name or "hard"."""
    forms: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "ste": ste,
        "log": log,
        "hard": hard,
        "decay": torch.sigmoid,
    }
    return gumbel(margin, temperature, seed) if form == "gumbel" else forms[form](margin)
