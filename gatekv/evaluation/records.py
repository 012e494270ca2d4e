"""Every sample's result, on disk the moment it is known, so that a run that stops goes on where it stopped."""

import dataclasses
import hashlib
import json
from pathlib import Path

from torch import nn

from gatekv.fingerprint import fingerprint, gates_sha256, lora_sha256
from gatekv.modules import gate_spec, wrappers
from gatekv.version import VERSION


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def settings(model: nn.Module, name: str, options: dict, texts: list[str], examples: list | None) -> dict:
    """What every record of a file has in common: the model (`name`, empty = the embedded one), its gates, maps and
    LoRA, the options of the run, and digests of the held-out texts and of the examples given."""
    adapter, sha256, tuned = None, gates_sha256(model), lora_sha256(model)
    if sha256 is not None:
        calibration = next((w.calibration() for w in wrappers(model) if w.active()), None)
        parts = [dataclasses.asdict(x) for x in (gate_spec(model), calibration) if x is not None]
        adapter = {"gates": sha256[:16], "settings": _digest(parts)}
    if tuned is not None:
        adapter = (adapter or {}) | {"lora": tuned[:16]}
    data = {"data": _digest(texts), "choices": _digest(examples) if examples else None}
    base = {"name": name or "embedded", **fingerprint(model)}
    return {"gatekv": VERSION, "model": base, "adapter": adapter, **options, **data}


def pinned_dtype(path: Path) -> str:
    """The dtype of the results that a file holds; "" where it is none, or says nothing (`Records` says why)."""
    try:
        with path.open() as file:
            return json.loads(file.readline())["pinned"]["dtype"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""


class Records:
    """Lines of a JSONL file behind one header line that pins what they were made with.

    A line: {"task", "mode", "seed", "index", "policy", "budget", "scores": one per question, "kls": one per ask or
    none, "ratio", "ratio_end": bytes held over those of a full cache after prefill and at the end, "place": dict or
    null, "refused": why there is no score, or null, "gate": whose gate judged, "trained", "untrained" or null, "maps":
    whether low-rank maps had a part}. A torn last line, from a run that was killed, is cut off.

    Args:
        path: of the file; None: nothing is written. pinned: settings that all lines share, JSON values.
        fresh: throw away what the file holds.

    Raises:
        ValueError: the file was made with other settings, or is not such a file.
    """

    def __init__(self, path: Path | None, pinned: dict, fresh: bool = False) -> None:
        self.path = path
        self.lines: list[dict] = []
        self._by_sample: dict[tuple, dict] = {}
        if path is None:
            return
        lines = [] if fresh or not path.is_file() else self._whole_lines()
        if lines:
            self._check(lines[0].get("pinned"), json.loads(json.dumps(pinned)))
            for line in lines[1:]:
                self._take(line)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"pinned": pinned}) + "\n")

    def _whole_lines(self) -> list[dict]:
        assert self.path is not None
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise ValueError(
                f"{self.path} has a line that is not JSON ({error}): delete it, or use --fresh."
            ) from error
        if len(whole) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return lines

    def _check(self, old: dict | None, new: dict) -> None:
        if old is None:
            raise ValueError(f"{self.path} has no header of settings: use --fresh to replace it, or another --out.")
        changed = [k for k in {**old, **new} if old.get(k) != new.get(k)]
        if changed:
            what = "; ".join(f"{k} was {old.get(k)!r} and is {new.get(k)!r}" for k in changed)
            raise ValueError(
                f"{self.path} holds results made with other settings ({what}): set them as they were, give another "
                "--out, or --fresh to throw the old results away."
            )

    def _take(self, line: dict) -> None:
        self.lines.append(line)
        sample = (line["task"], line["mode"], line["seed"], line["index"])
        self._by_sample.setdefault(sample, {})[line["policy"], line["budget"]] = line

    def of(self, task: str, mode: str, seed: int, index: int) -> dict[tuple[str, float], dict]:
        """(policy, budget) -> line, of one sample."""
        return self._by_sample.get((task, mode, seed, index), {})

    def append(self, lines: list[dict]) -> None:
        """Add lines, in one write."""
        for line in lines:
            self._take(line)
        if self.path is not None and lines:
            with self.path.open("a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
