"""Several adapters on the same questions: what `recipes/evaluate.py` recorded of each, side by side and paired."""

import json
from pathlib import Path

from gatekv.evaluation.records import Records
from gatekv.evaluation.results import grouped
from gatekv.evaluation.statistics import interval, mean, paired_interval

ADAPTERS = ("adapter", "maps")  # of the pinned settings, what arms may differ in; all else they must share
Sample = tuple[str, str, int, int]


def read_arms(arms: dict[str, list[str]]) -> dict[str, list[list[dict]]]:
    """The lines of each arm's folders, which are the same training under different seeds.

    Raises:
        ValueError: a folder without records, or measured with other settings than the first one.
    """
    first: dict | None = None
    out: dict[str, list[list[dict]]] = {}
    for name, folders in arms.items():
        out[name] = []
        for folder in folders:
            path = Path(folder) / "records.jsonl"
            if not path.is_file():
                raise ValueError(f"{path} is no file: name folders that recipes/evaluate.py wrote with --out.")
            with path.open() as file:
                pinned = json.loads(file.readline()).get("pinned", {})
            out[name].append(Records(path, pinned).lines)
            shared = {k: v for k, v in pinned.items() if k not in ADAPTERS}
            first = first or shared
            if changed := [k for k in {**first, **shared} if first.get(k) != shared.get(k)]:
                raise ValueError(
                    f"{folder} was measured with other settings than the first folder ({', '.join(changed)}): "
                    "compare runs of one model, data, dtype and protection."
                )
    return out


def table(arms: dict[str, list[list[dict]]], baseline: tuple[str, str]) -> list[dict]:
    """One row for each arm, policy and budget: the mean score over runs and samples, `by_run`, bytes_ratio, and the
    difference to the baseline with its 95 % interval, which resamples contexts; all on the samples that every row has.
    A policy that refused any sample has a row of {"refused": why} instead, and takes no sample from the others.

    arms: name -> runs -> lines, each arm with the same number of runs. baseline: (arm, policy), the policy at the
    largest budget it has.

    Raises:
        ValueError: arms with different numbers of runs, several tasks or modes, no such baseline, no shared sample.
    """
    if len({len(runs) for runs in arms.values()}) > 1:
        counts = ", ".join(f"{name} {len(runs)}" for name, runs in arms.items())
        raise ValueError(f"the arms have different numbers of runs ({counts}): give each the same training seeds.")
    cells: dict[tuple, list[dict[Sample, dict]]] = {}
    refused = {}
    for name, runs in arms.items():
        for number, lines in enumerate(runs):
            for (policy, budget), group in grouped(lines, "policy", "budget").items():
                found = cells.setdefault((name, policy, budget), [{} for _ in runs])
                found[number] = {(r["task"], r["mode"], r["seed"], r["index"]): r for r in group}
                if why := next((r["refused"] for r in group if r["refused"]), None):
                    refused[name, policy, budget] = why
    if len(kinds := {s[:2] for runs in cells.values() for run in runs for s in run}) > 1:
        names = ", ".join(" ".join(kind) for kind in sorted(kinds))
        raise ValueError(f"the folders hold several tasks or modes ({names}): evaluate each into folders of its own.")
    rows = [{"arm": a, "policy": p, "budget": b, "refused": why} for (a, p, b), why in refused.items()]
    cells = {cell: runs for cell, runs in cells.items() if cell not in refused}
    own = [cell for cell in cells if cell[:2] == baseline]
    if not own:
        known = ", ".join(dict.fromkeys(f"{name}:{policy}" for name, policy, _ in cells))
        raise ValueError(f"no baseline {':'.join(baseline)}; there are {known}.")
    shared = sorted(set.intersection(*(set(run) for runs in cells.values() for run in runs)))
    if not shared:
        raise ValueError("no sample was scored by all arms, policies and budgets: evaluate them on the same samples.")
    scores = {
        cell: [[score for run in runs for score in run[s]["scores"]] for s in shared] for cell, runs in cells.items()
    }
    base = scores[max(own, key=lambda cell: cell[2])]
    for (name, policy, budget), samples in cells.items():
        mine = scores[name, policy, budget]
        low, high = interval(mine)
        row = {"arm": name, "policy": policy, "budget": budget, "score": mean(mine), "ci_low": low, "ci_high": high}
        row |= {"by_run": [mean([run[s]["scores"] for s in shared]) for run in samples], "contexts": len(shared)}
        row |= {"bytes_ratio": mean([[run[s]["ratio"] for run in samples] for s in shared])}
        difference, low, high = paired_interval(mine, base)
        row |= {"difference": difference, "difference_low": low, "difference_high": high, "refused": None}
        rows.append(row)
    order = list(arms)
    return sorted(rows, key=lambda r: (order.index(r["arm"]), r["policy"] != "full", r["policy"], -r["budget"]))
