"""From a gate's margins (logit - threshold, > 0 keeps) to the weights that attention uses, in training and deployed."""

import math

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


def hard(margin: torch.Tensor) -> torch.Tensor:
    """The deployed flag, without gradient."""
    return (margin > 0).to(margin.dtype)


RELAXATIONS = {"ste": ste, "log": log, "hard": hard}
