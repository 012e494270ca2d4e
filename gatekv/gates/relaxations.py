"""From a gate's logits to the weights that attention uses while training, and to the flags it uses when deployed."""

import math

import torch


def logit_of(probability: float) -> float:
    """The logit at which sigmoid equals `probability`."""
    return math.log(probability / (1 - probability))


def ste(logits: torch.Tensor, threshold: float) -> torch.Tensor:
    """Straight-through: the hard flag forward, the gradient of p backward; g = 1[p > tau] + p - sg(p) (2410.12876)."""
    p = torch.sigmoid(logits)
    return (logits > logit_of(threshold)).to(p.dtype) + p - p.detach()


def log(logits: torch.Tensor, threshold: float) -> torch.Tensor:
    """Log-gate: attention scores get + log sigmoid(logit), i.e. the weight sigmoid(logit); never below e^-30."""
    return torch.sigmoid(logits.clamp_min(-30.0))


def hard(logits: torch.Tensor, threshold: float) -> torch.Tensor:
    """The deployed flag, without gradient."""
    return (logits > logit_of(threshold)).to(logits.dtype)


RELAXATIONS = {"ste": ste, "log": log, "hard": hard}
