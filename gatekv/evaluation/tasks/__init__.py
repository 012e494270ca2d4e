"""Tasks: what is cached, what is then asked of the cache, and how the answer is scored; one file a family.

A task is a function (tokenizer, texts, mode, index, seed, tokens) -> Item, and nothing but these decides its sample.
"""

from pathlib import Path

from gatekv.evaluation.tasks.classification import classification
from gatekv.evaluation.tasks.item import Item as Item
from gatekv.evaluation.tasks.niah import niah_multikey, niah_seen
from gatekv.evaluation.tasks.passkey import passkey
from gatekv.evaluation.tasks.ppl import ppl
from gatekv.evaluation.tasks.recall import recall
from gatekv.evaluation.tasks.ruler import ruler
from gatekv.training.data import read_source

HELDOUT = Path(__file__).resolve().parents[3] / "data" / "sample" / "heldout"
TASKS = {
    "ppl": ppl,
    "niah_multikey": niah_multikey,
    "niah_seen": niah_seen,
    "passkey": passkey,
    "ruler": ruler,
    "recall": recall,
    "classification": classification,
}
MODES = ("agnostic", "aware")
AGNOSTIC_ONLY = ("ppl",)  # no question


def heldout_texts(sources: list[str]) -> list[str]:
    """Texts that no gate was trained on: whole sources, or the bundled ones."""
    return [read_source(s) for s in (sources or sorted(str(p) for p in HELDOUT.glob("*.txt")))]
