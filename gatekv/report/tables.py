"""Markdown tables of a results.json: one a task and mode, policies down, budgets across."""

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
