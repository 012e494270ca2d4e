"""LESS (arXiv 2402.09398): evicted tokens stay as a low-rank remainder of constant size.

Feature maps φ (queries) and ψ (keys), and the state that evicted tokens are folded into. The same over whole sequences,
for training and scoring, is `gatekv.ops.remainder`.
"""

from gatekv.less.features import Phi, Psi
from gatekv.less.state import State

__all__ = ["Phi", "Psi", "State"]
