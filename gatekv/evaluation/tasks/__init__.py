"""Tasks: what is cached, what is then asked of the cache, and how the answer is scored; one file a family.

A task is a function (tokenizer, texts, mode, index, seed, tokens) -> Item or Generated, and nothing but these decides
its sample.
"""

import functools
from collections.abc import Callable

from gatekv.bundled import HELDOUT
from gatekv.evaluation.tasks import longbench as _longbench
from gatekv.evaluation.tasks import ruler_sets as _ruler_sets
from gatekv.evaluation.tasks.classification import classification
from gatekv.evaluation.tasks.generated import Generated as Generated
from gatekv.evaluation.tasks.item import Item as Item
from gatekv.evaluation.tasks.niah import niah_multikey, niah_seen
from gatekv.evaluation.tasks.passkey import passkey
from gatekv.evaluation.tasks.ppl import ppl
from gatekv.evaluation.tasks.recall import recall
from gatekv.evaluation.tasks.ruler import ruler
from gatekv.training.data import read_source

TASKS: dict[str, Callable[..., Item]] = {
    "ppl": ppl,
    "niah_multikey": niah_multikey,
    "niah_seen": niah_seen,
    "passkey": passkey,
    "ruler": ruler,
    "recall": recall,
    "classification": classification,
}
PUBLISHED = (*_longbench.NAMES, *_ruler_sets.NAMES)  # whole prompts of public benchmarks, with generated answers
NAMES = (*TASKS, *PUBLISHED)
MODES = ("agnostic", "aware")
AGNOSTIC_ONLY = ("ppl",)  # no question


def heldout_texts(sources: list[str]) -> list[str]:
    """Texts that no gate was trained on: whole sources, or the bundled ones."""
    return [read_source(s) for s in (sources or sorted(str(p) for p in HELDOUT.glob("*.txt")))]


def published(task: str, longbench: str = "", ruler: str = "") -> tuple[Callable[..., Generated], int | None]:
    """(the task as a function, how many samples it has or None) of one of PUBLISHED; its data are loaded here.

    The function wants `room` too: tokens that the model can hold. longbench, ruler: where the data lie, see
    `load_longbench` and `load_ruler`; without `ruler`, samples are made by RULER's definition. Raises ValueError as
    these do, and for a RULER task that cannot be made.
    """
    if task in _longbench.NAMES:
        examples = _longbench.load_longbench(task, longbench)
        return functools.partial(_longbench.longbench, task=task, examples=examples), len(examples)
    rows = _ruler_sets.load_ruler(task, ruler)
    return functools.partial(_ruler_sets.ruler_set, task=task, examples=rows), len(rows) if rows else None
