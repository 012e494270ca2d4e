"""What every policy does in a cache, as it was recorded: what is held, bytes, tokens, logits.

For changes of structure, which change none of it. The record is tests/fixtures/recorded_cache.json; where a change is
meant, write it anew and read the difference before it is committed:

    python tests/unit/test_recorded_cache.py

Tokens are fed as drawn, not as predicted: one that is predicted otherwise shows once, and nothing follows from it.

Norms and RoPE are float32 inside a float64 model, and processors round them otherwise. So the record knows what the
plain models said where it was written; where they say something else, it is written anew, at the commit before, to
compare with.
"""

import functools
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for main(); pytest has it already
from recording import ALSO_GEMMA3, FAMILIES, FIELDS, LENGTHS, LLAMA_ALONE, POLICIES, QUESTION, Run, drawn

import gatekv

RECORD = Path(__file__).resolve().parents[1] / "fixtures" / "recorded_cache.json"

# -- stages: what is done with a cache


def decoded(run: Run) -> None:
    """A prompt, a question of several tokens, single tokens past two folds."""
    often, steps = run.family == "llama", 40 if run.family == "llama" else 34
    run.feed(run.prompt)
    run.note("prompt")
    run.more(QUESTION)
    if often:
        run.note("question")
    run.more(20, single=True)
    if often:
        run.note("middle")
    run.more(steps - 20, single=True)
    run.note("end")


def chunks(run: Run) -> None:
    """A prompt that comes in pieces; the last piece may not be allowed to run past its end."""
    for piece in run.prompt[:, :60].split([30, 2, 28], 1):
        run.feed(piece)
    before, rest = run.cache.snapshot(), run.prompt[:, 60:]
    over = run.branch(before)
    run.feed(rest)
    run.note("prompt")
    run.more(3)
    run.far()
    run.note("end")
    over.feed(torch.cat([rest, rest[:, :3].clamp_min(1)], 1))
    over.note("past the prompt")


def snapshot(run: Run) -> None:
    """Two caches that go on differently, and a way back."""
    run.begin()
    kept, other, back = run.cache.snapshot(), run.branch(run.cache.snapshot()), run.branch(run.cache)
    run.far()
    other.seed = 50
    other.more(20)
    run.note("one")
    other.note("other")
    back.cache.restore(kept)
    back.more(2)
    back.note("restored")


def beams(run: Run) -> None:
    """Rows change places, are repeated, leave."""
    run.begin()
    run.pick("reorder_cache", [2, 0, 0])
    run.more(4, single=True)
    run.note("reordered")
    run.pick("batch_select_indices", [0, 2])
    run.far()
    run.note("selected")


def draft(run: Run) -> None:
    """Tokens that are taken back, the last ones first; folds in between."""
    run.begin()
    run.cache.activate_past_recording()
    for fed, wrong in ((6, 4), (20, 17), (12, 1)):
        run.more(fed)
        run.crop(wrong)
    run.note("cropped")
    run.far()
    run.crop(2)
    run.more(2)
    run.note("end")


def unrecorded(run: Run) -> None:
    """Tokens that are taken back from a cache which was not told of it."""
    run.begin()
    run.crop(2)
    run.more(2)
    run.note("end")


def assisted(run: Run) -> None:
    """A prompt that comes together with the first draft."""
    run.cache = run.make()
    run.cache.activate_past_recording()
    run.feed(torch.cat([run.prompt, drawn(len(run.mask), 4, 9)], 1))
    run.crop(3)
    run.more(2)
    run.note("end")


def saved(run: Run) -> None:
    """To disk and back; what is in the file is its own business."""
    run.begin()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        run.cache.save(path)
        run.cache = gatekv.KVCache.load(path, run.model)
    run.note("loaded")
    run.more(3)
    run.far()
    run.note("end")


def turns(run: Run) -> None:
    """Turns that are compressed when they are over."""
    run.feed(run.prompt)
    for turn, pieces in (("first turn", (20, 1, 1, 18)), ("second turn", (50,))):
        for piece in pieces:
            run.more(piece)
        run.cache.compress()
        run.note(turn)
    run.far()
    run.note("end")


def decided(run: Run) -> None:
    """A prompt that one cache read, decided afterwards."""
    policy, budget, options = run.decide_as
    run.cache = gatekv.KVCache.undecided(run.model)
    run.feed(run.prompt)
    run.cache = run.cache.decide(policy, budget, **options)
    run.more(QUESTION)
    run.far()
    run.note("end")


STAGES = {  # stage -> options
    decoded: {},
    chunks: dict(prompt_tokens=max(LENGTHS)),
    snapshot: {},
    beams: {},
    draft: {},
    unrecorded: {},
    assisted: dict(prompt_tokens=max(LENGTHS)),
    saved: {},
    turns: dict(turns=True),
    decided: {},
}
NOT_ALONE = (unrecorded, assisted, decided)  # what a policy of LLAMA_ALONE is not taken through


def cases(name: str, families: list[str], stages: Sequence[Callable] = tuple(STAGES)) -> dict[str, dict]:
    """Everything that happens to one policy: case -> checkpoint -> values of FIELDS; a refusal by its class alone."""
    found = {}
    for family in families[:1] if name in LLAMA_ALONE else families:
        everything = family == "llama" or family == "gemma3" and name in ALSO_GEMMA3
        for stage, options in STAGES.items() if everything else [(decoded, {})]:
            if stage not in stages or name in LLAMA_ALONE and stage in NOT_ALONE:
                continue
            run = Run(family, name, **options)
            try:
                stage(run)
            except (ValueError, RuntimeError) as error:  # the latter from transformers' sliding layers
                run.found["refused"] = type(error).__name__
            found[f"{family} {stage.__name__}"] = run.found
    return found


def close(a: list[float], b: list[float]) -> bool:
    """Logits, relative to the largest of them; the first is their norm."""
    largest = max(abs(x) for x in a[1:])
    return abs(a[0] - b[0]) <= 1e-12 * a[0] and all(abs(x - y) <= 1e-12 * largest for x, y in zip(a[1:], b[1:]))


def differences(recorded: dict, found: dict) -> list[str]:
    """One line for each field that is not what was recorded."""
    lines = []
    for case in sorted({*recorded, *found}):
        before, now = recorded.get(case, {}), found.get(case, {})
        for point in [*before, *(p for p in now if p not in before)]:
            a, b = before.get(point), now.get(point)
            if not (isinstance(a, list) and isinstance(b, list)):
                lines += [f"{case}, {point}: recorded {a}, found {b}"] * (a != b)
                continue
            for field, x, y in zip(FIELDS, a, b):
                if not (close(x, y) if field == "logits" else x == y):
                    lines.append(f"{case}, {point}, {field}: recorded {x}, found {y}")
    return lines


@functools.cache
@torch.no_grad()
def plain() -> dict[str, list[float]]:
    """What the models themselves say, family by family: how this machine computes."""
    found = {}
    for family in FAMILIES:
        run = Run(family, "full")
        logits = run.model(run.prompt[:1, -LENGTHS[0] :], use_cache=False).logits[0, -1]
        found[family] = [float(f"{x:.17g}") for x in (logits.norm(), *logits[:8])]
    return found


def some_stages(name: str) -> list[Callable]:
    """Of a policy's stages those of `make test`: decoding, and two others, by turns, of those that are recorded of it."""
    others = [s for s in STAGES if s is not decoded and (name not in LLAMA_ALONE or s not in NOT_ALONE)]
    place = [n for n in POLICIES if (n in LLAMA_ALONE) == (name in LLAMA_ALONE)].index(name)
    return [decoded, *(others[(2 * place + i) % len(others)] for i in (0, 1))]


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", POLICIES)
def test_a_cache_does_what_was_recorded(name, everything):
    recorded = json.loads(RECORD.read_text())
    if not all(close(recorded["plain"][family], said) for family, said in plain().items()):
        pytest.skip("this processor computes the plain models otherwise: write the record anew at the commit before")
    families, stages = ([*FAMILIES], [*STAGES]) if everything else (["llama"], some_stages(name))
    wanted = {f"{family} {stage.__name__}" for family in families for stage in stages}
    before = {case: values for case, values in recorded[name].items() if case in wanted}
    wrong = differences(before, cases(name, families, stages))
    assert not wrong, "\n" + "\n".join(f"{name}, {line}" for line in wrong)


def main() -> None:
    """Write the record anew."""
    lines = [f"{json.dumps(name)}: {json.dumps(cases(name, [*FAMILIES]), separators=(',', ':'))}" for name in POLICIES]
    lines.append(f'"plain": {json.dumps(plain())}')
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
