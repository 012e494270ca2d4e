"""From records to results.json: rows with intervals, grids, and paired comparisons."""

from gatekv.evaluation.names import FULL, TRAINED, gate_of
from gatekv.evaluation.statistics import interval, mean, paired_interval


def grouped(lines: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Lines by their values at `keys`, groups in order of appearance."""
    groups: dict[tuple, list[dict]] = {}
    for line in lines:
        groups.setdefault(tuple(line[k] for k in keys), []).append(line)
    return groups


def _averages(lines: list[dict]) -> dict:
    kls = [line["kls"] for line in lines if line["kls"]]
    return {
        "score": mean([line["scores"] for line in lines]),
        "kl": mean(kls) if kls else None,
        "n": sum(len(line["scores"]) for line in lines),
    }


def rows(lines: list[dict]) -> list[dict]:
    """One row per task, mode, policy and budget, over all seeds; where a policy refused any sample, it says why.

    Intervals are 95 %, resampling contexts. by_seed: means of each seed, seed_spread: the largest less the smallest of
    them, None for one. cells: means at each place of a task's grid, where it has one.
    """
    out = []
    for (task, mode, policy, budget), group in grouped(lines, "task", "mode", "policy", "budget").items():
        group = sorted(group, key=lambda line: (line["seed"], line["index"]))
        seeds = grouped(group, "seed")
        row = {"policy": policy, "budget": budget, "task": task, "mode": mode, "seeds": [s for (s,) in seeds]}
        row |= {name: group[0][name] for name in ("gate", "maps") if name in group[0]}
        refused = [line["refused"] for line in group if line["refused"]]
        if refused:
            out.append(row | {"score": None, "kl": None, "n": 0, "refused": refused[0], "refusals": len(refused)})
            continue
        low, high = interval([line["scores"] for line in group])
        row |= _averages(group) | {"ci_low": low, "ci_high": high}
        row |= {"bytes_ratio": mean([[line["ratio"]] for line in group])}
        row |= {"bytes_ratio_end": mean([[line["ratio_end"]] for line in group])}
        row["by_seed"] = {str(seed): _averages(part) for (seed,), part in seeds.items()}
        key = "score" if row["kl"] is None else "kl"
        means = [part[key] for part in row["by_seed"].values()]
        row["seed_spread"] = max(means) - min(means) if len(means) > 1 else None
        if group[0]["place"]:
            places = grouped([line | line["place"] for line in group], *group[0]["place"])
            row["cells"] = [dict(zip(group[0]["place"], at)) | _averages(places[at]) for at in sorted(places)]
        out.append(row)
    return out


def comparisons(lines: list[dict]) -> list[dict]:
    """Best learned policy against the best training-free one at each budget, paired on the samples both have.

    By KL where a task has it (lower is better), by score elsewhere.
    """
    out = []
    for (task, mode), group in grouped(lines, "task", "mode").items():
        cells = {
            cell: {(r["seed"], r["index"]): r for r in part}
            for cell, part in grouped(group, "policy", "budget").items()
        }
        full = cells.pop(FULL, {})
        values = "kls" if any(line["kls"] for line in group) else "scores"
        better = min if values == "kls" else max
        cells = {cell: part for cell, part in cells.items() if not any(r["refused"] for r in part.values())}
        for budget in sorted({b for _, b in cells}, reverse=True):
            here = {p: part for (p, b), part in cells.items() if b == budget}
            shared = sorted(set.intersection(set(full), *map(set, here.values())))
            picked = {p: [part[s][values] for s in shared] for p, part in here.items()}
            gates = {p: gate_of(next(iter(part.values()))) for p, part in here.items()}
            learned = [p for p in here if gates[p] == TRAINED]
            free = [p for p in here if gates[p] is None]
            if not (learned and free and shared):
                continue
            a, b = (better(names, key=lambda p: mean(picked[p])) for names in (learned, free))
            difference, low, high = paired_interval(picked[a], picked[b])
            entry = {"task": task, "mode": mode, "budget": budget, "learned": a, "training_free": b}
            entry |= {"learned_value": mean(picked[a]), "training_free_value": mean(picked[b])}
            entry |= {"full_value": mean([full[s][values] for s in shared]), "contexts": len(shared)}
            out.append(entry | {"difference": difference, "ci_low": low, "ci_high": high})
    return out
