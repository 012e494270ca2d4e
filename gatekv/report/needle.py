"""Needle maps: where in a context, and in how long a one, a fact is still found."""

import math
from pathlib import Path
from typing import Any

from gatekv.extras import need

COLUMNS = 4


def grid(cells: list[dict]) -> tuple[list, list, list[list]]:
    """(depths, lengths, scores[depth][length]) of a row's cells; repeats are averaged by their n, gaps are NaN."""
    depths, lengths = sorted({c["depth"] for c in cells}), sorted({c["tokens"] for c in cells})
    scores = []
    for depth in depths:
        line = []
        for length in lengths:
            here = [c for c in cells if (c["depth"], c["tokens"]) == (depth, length)]
            n = sum(c["n"] for c in here)
            line.append(sum(c["score"] * c["n"] for c in here) / n if n else math.nan)
        scores.append(line)
    return depths, lengths, scores


def placed(rows: list[dict]) -> list[dict]:
    """Rows whose cells are places in a context; other tasks' cells are families of questions."""
    return [r for r in rows if r.get("cells") and "depth" in r["cells"][0]]


def needle(results: dict, path: Path) -> bool:
    """Write needle.png: a map of depth (share of the context) by length (tokens) per policy and budget.

    results: {"rows": […]}; of its rows those `placed`: "cells" of {"depth", "tokens", "score" 0 to 1, "n"}. Returns
    whether there were any; without, nothing is written. Needs matplotlib.
    """
    rows = placed(results["rows"])
    if not rows:
        return False
    need("matplotlib", what="pictures")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(COLUMNS, len(rows))
    lines = math.ceil(len(rows) / columns)
    size = (3.1 * columns + 1.2, 2.7 * lines + 0.3)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    image: Any = None
    modes = {r["mode"] for r in rows}
    for axis, row in zip(axes.flat, rows):
        depths, lengths, scores = grid(row["cells"])
        axis.set_facecolor("#bbbbbb")
        image = axis.imshow(scores, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(lengths)), [str(n) for n in lengths], fontsize=7, rotation=45 if lengths[4:] else 0)
        axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=7)
        title = row["policy"] if row["policy"] == "full" else f"{row['policy']} at {row['budget']:g}"
        axis.set_title(title + (f", {row['mode']}" if len(modes) > 1 else ""), fontsize=9)
        if len(depths) * len(lengths) <= 64:
            for y, line in enumerate(scores):
                for x, score in enumerate(line):
                    if not math.isnan(score):
                        ink = "black" if score > 0.55 else "white"
                        axis.text(
                            x, y, f"{score:.2f}".removeprefix("0"), ha="center", va="center", fontsize=6.5, color=ink
                        )
    for axis in list(axes.flat)[len(rows) :]:
        axis.set_axis_off()
    figure.supxlabel("tokens of context", fontsize=9)
    figure.supylabel("depth of the fact", fontsize=9)
    figure.colorbar(image, ax=axes, label="share of answers right", fraction=0.03, pad=0.01)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
