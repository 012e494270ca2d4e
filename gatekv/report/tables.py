"""Markdown tables of what recipes measured: results.json of evaluate.py, of ablation.py and of compare.py."""

from gatekv.evaluation.names import TRAINED, gate_by_name, gate_of
from gatekv.policies.amount import budget_text


def _number(value: float, digits: int) -> str:
    """As the tables of this field print them: .64, not 0.64."""
    return f"{value:.{digits}f}".removeprefix("0")


def tables(rows: list[dict]) -> str:
    """One section for each task and mode of `rows` (see gatekv.evaluation.results.rows), in their order.

    KL to the full cache where a task has it, scores elsewhere. A dash: the policy refused a sample. Nothing: not run.
    """
    budgets = sorted({r["budget"] for r in rows if r["policy"] != "full"}, reverse=True)
    sections = []
    for task, mode in dict.fromkeys((r["task"], r["mode"]) for r in rows):
        here = {(r["policy"], r["budget"]): r for r in rows if (r["task"], r["mode"]) == (task, mode)}
        full = here.get(("full", 1.0))
        kl = any(r["kl"] is not None for r in here.values())
        said = "KL to the full cache" if kl else f"full cache {_number(full['score'], 2)}" if full else "score"
        lines = [f"## `{task}`, {mode}: n = {max(r['n'] for r in here.values())}, {said}", ""]
        lines += ["| policy |" + "".join(f" {budget_text(b)} |" for b in budgets), "|---|" + "---|" * len(budgets)]
        for policy in dict.fromkeys(p for p, _ in here if p != "full"):
            cells = []
            for budget in budgets:
                row = here.get((policy, budget))
                if row is None:
                    cells.append("")
                elif row["score"] is None:
                    cells.append("–")
                else:
                    cells.append(_number(row["kl"], 3) if kl else _number(row["score"], 2))
            lines.append(f"| `{policy}` | {' | '.join(cells)} |")
        sections.append("\n".join(lines))
    return "\n\n".join(sections) + "\n"


def _cell(row: dict | None, key: str, digits: int) -> str:
    """A number; a dash where the policy refused a sample; nothing where it was not run."""
    if row is None:
        return ""
    return "–" if row[key] is None else _number(row[key], digits)


def _at(rows: list[dict], task: str, mode: str) -> dict[tuple, dict]:
    return {(r["policy"], r["budget"]): r for r in rows if (r["task"], r["mode"]) == (task, mode)}


def summary(rows: list[dict], budgets: list[float], policies: dict[str, str] | None = None) -> str:
    """Retrieval and KL side by side, question unseen, one line a policy.

    rows: of `niah_multikey` and `ppl`, agnostic, among others. policies: name -> label, in the table's order; None: all
    that retrieval was measured for, under their own names. The full cache comes first.
    """
    facts, text = _at(rows, "niah_multikey", "agnostic"), _at(rows, "ppl", "agnostic")
    policies = policies or {p: f"`{p}`" for p, _ in facts if p != "full"}
    percents = [f"{100 * b:g}\u00a0%" for b in budgets]  # a head of a narrow column does not break there
    head = [f"retrieval at {percents[0]}", *percents[1:], f"KL at {percents[0]}", *percents[1:]]
    lines = ["| |" + "".join(f" {h} |" for h in head), "|---|" + "---|" * len(head)]
    full = _number(facts["full", 1.0]["score"], 2)
    lines.append("| full cache |" + f" {full} |" * len(budgets) + " 0 |" * len(budgets))
    for policy, label in policies.items():
        cells = [_cell(facts.get((policy, b)), "score", 2) for b in budgets]
        cells += [_cell(text.get((policy, b)), "kl", 3) for b in budgets]
        lines.append(f"| {label} |" + "".join(f" {c} |" for c in cells))
    return "\n".join(lines) + "\n"


def best_of(rows: list[dict], tasks: dict[tuple[str, str], str], policy: str, budgets: list[float]) -> str:
    """One learned policy against the best training-free one of each task: {(task, mode): what is asked}."""
    percents = " / ".join(f"{100 * b:g}" for b in budgets)
    lines = [f"| task | n | full cache | `{policy}` at {percents} % | best training-free at {percents} % |"]
    lines.append("|---|---|---|---|---|")
    for (task, mode), label in tasks.items():
        here = _at(rows, task, mode)
        names = {p: gate_of(row) for (p, _), row in here.items()}
        free = [p for p, gate in names.items() if gate is None and not p.startswith(("paper", "full"))]
        best = []
        for b in budgets:
            scored = [here[p, b] for p in free if (p, b) in here and here[p, b]["score"] is not None]
            row = max(scored, key=lambda r: r["score"])
            best.append(f"{_number(row['score'], 2)} (`{row['policy']}`)")
        full = here["full", 1.0]
        mine = " / ".join(_cell(here.get((policy, b)), "score", 2) for b in budgets)
        cells = [label, str(full["n"]), _number(full["score"], 2), mine, " / ".join(best)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ablation_table(results: list[dict], budgets: list[float]) -> str:
    """One line a recipe or training-free policy, retrieval and KL at each budget.

    results: [{"name", "rows", "seconds"}] as `recipes/ablation.py` writes them.
    """
    head = "".join(f" retrieval {b:.3g} | KL {b:.3g} |" for b in budgets)
    lines = [f"| recipe |{head} bytes | training |", "|---|" + "---|" * (2 * len(budgets) + 2)]
    full = next(r["score"] for x in results for r in x["rows"] if (r["policy"], r["task"]) == ("full", "niah_multikey"))
    lines.append("| full cache |" + f" {full:.2f} | 0 |" * len(budgets) + " 1.000 | |")
    for result in results:
        for policy in dict.fromkeys(r["policy"] for r in result["rows"] if r["policy"] != "full"):
            cells, held = "", []
            for b in budgets:
                for task, key in (("niah_multikey", "score"), ("ppl", "kl")):
                    row = next(r for r in result["rows"] if (r["policy"], r["budget"], r["task"]) == (policy, b, task))
                    cells += f" {row[key]:.3f} |" if row[key] is not None else " – |"
                    held += [row["bytes_ratio"]] if row[key] is not None else []
            own = policy in ("gate_alone+global", "gate+decay")
            name = (
                result["name"] if own else f"{result['name']}, {policy}" if gate_by_name(policy) == TRAINED else policy
            )
            took = f"{result['seconds'] / 60:.1f} min" if result["seconds"] and "untrained" not in policy else ""
            lines.append(f"| {name} |{cells} {max(held, default=0):.3f} | {took} |")
    return "\n".join(lines)


def runs_table(tasks: dict[str, list[dict]], budget: float) -> str:
    """Adapters over tasks at one budget, from the rows that `recipes/compare.py` writes for each task.

    A cell: score (difference to the baseline, its 95 % interval), bytes held. Whole caches have no bytes of interest.
    """
    heads = [f"{name} ({next(len(r['by_run']) for r in rows if not r['refused'])})" for name, rows in tasks.items()]
    lines = ["| |" + "".join(f" {h} |" for h in heads), "|---|" + "---|" * len(heads)]
    first = next(iter(tasks.values()))
    for arm, policy in dict.fromkeys((r["arm"], r["policy"]) for r in first if r["budget"] in (1.0, budget)):
        name = (
            f"{arm}, whole cache"
            if policy == "full"
            else arm
            if gate_by_name(policy) == TRAINED
            else f"{arm}, `{policy}`"
        )
        cells = []
        for rows in tasks.values():
            r = next(r for r in rows if (r["arm"], r["policy"]) == (arm, policy) and r["budget"] in (1.0, budget))
            if r["refused"]:
                cells.append("refused")
                continue
            cell = _number(r["score"], 3)
            if r["difference"] or r["difference_low"] != r["difference_high"]:
                cell += f" ({r['difference']:+.3f}, {r['difference_low']:+.3f}\u00a0…\u00a0{r['difference_high']:+.3f})"
            cells.append(cell if policy == "full" else f"{cell}, {_number(r['bytes_ratio'], 3)}")
        lines.append(f"| {name} |" + "".join(f" {c} |" for c in cells))
    return "\n".join(lines) + "\n"


def provenance(run: dict) -> str:
    """One line: with what a table was made, as far as its JSON file says so."""
    versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    said = {"machine": run.get("machine"), "dtype": run.get("dtype"), "commit": run.get("commit"), "versions": versions}
    return "*Made with: " + "; ".join(f"{k} {v or 'not recorded'}" for k, v in said.items()) + ".*\n"
