"""LESS (arXiv 2402.09398): evicted tokens stay as a low-rank remainder of constant size.

Feature maps φ (queries) and ψ (keys), LESS's own (features.py) and ours (centroids.py); the state that evicted tokens
are folded into; the answer of both (maps.py). The same over whole sequences, for training, is `gatekv.ops.remainder`.
"""

from gatekv.less.features import Phi, Psi
from gatekv.less.maps import LessMaps, Waiting
from gatekv.less.state import State

__all__ = ["LessMaps", "Phi", "Psi", "State", "Waiting"]
