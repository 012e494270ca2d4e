"""The frontier: score against bytes really held, one line a policy."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatekv.extras import need
from gatekv.report.style import measure, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TICKS = [2.0**-i for i in range(8)]
LABELS = {"kl": "KL to the full cache, nats per token (lower is better)", "score": "share of answers right"}


def _line(axis: "Axes", points: list[dict], value: str, name: str, style: dict) -> None:
    """One policy's points, sorted by bytes; the rows' interval is the score's, so KL goes without one."""
    points = sorted(points, key=lambda r: r["bytes_ratio"])
    x, y = [r["bytes_ratio"] for r in points], [r[value] for r in points]
    color, learned = style["color"][0], style["kind"] == "learned"
    dashes = (0, style["dash"]) if style["dash"] else "-"
    axis.plot(x, y, color=color, ls=dashes, lw=style["width"], marker=style["marker"], ms=6.5 if learned else 4.5,
              mfc=color if len(style["dash"]) < 2 or style["kind"] == "untrained" else "white", mec=color, label=name,
              zorder=3 if learned else 2)  # fmt: skip
    if value == "score":
        low, high = [r["ci_low"] for r in points], [r["ci_high"] for r in points]
        axis.vlines(x, low, high, color=color, lw=1.6 if learned else 0.9, alpha=0.7 if learned else 0.4)
        if learned:
            axis.fill_between(x, low, high, alpha=0.08, color=color, lw=0)


def _panel(axis: "Axes", rows: list[dict], looks: dict[str, dict]) -> None:
    value = measure(rows[0])
    rows = [r for r in rows if r[value] is not None]
    for name, look in looks.items():
        points = [r for r in rows if r["policy"] == name]
        if points:
            _line(axis, points, value, name, look)
    for full in [r for r in rows if r["policy"] == "full"][:1]:
        axis.axhline(full[value], color="black", ls="--", lw=1)
        at, place = (0, full[value]), ("axes fraction", "data")
        axis.annotate("full cache", at, xytext=(3, 4), textcoords="offset points", xycoords=place, fontsize=9)
    if value == "score" and all(0 <= r["score"] <= 1 for r in rows):
        axis.set_ylim(-0.03, 1.03)
    least = min((r["bytes_ratio"] for r in rows), default=0.5)
    axis.set_xscale("log", base=2)
    axis.set_xlim(min(least, 0.5) / 1.2, 1.2)
    axis.set_xticks([t for t in TICKS if t > least / 1.2], minor=False)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}".removeprefix("0"))
    axis.minorticks_off()
    axis.set_xlabel("bytes held / bytes of the full cache, after prefill")
    axis.set_ylabel(LABELS[value])
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def frontier(results: dict, path: Path) -> None:
    """Write frontier.png: a panel per task and mode, a line per policy, 95 % intervals, the full cache dashed.

    results: {"rows": […]} as `recipes/evaluate.py` writes them; refused rows are left out. Without rows the picture
    says so. Needs matplotlib.
    """
    need("matplotlib", what="pictures")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in results["rows"] if r["score"] is not None]
    panels = list(dict.fromkeys((r["task"], r["mode"]) for r in rows))
    looks = styles([r["policy"] for r in rows])
    columns = min(3, max(1, len(panels)))
    lines = max(1, math.ceil(len(panels) / columns))
    size = (6.0 * columns + 1.8, 4.8 * lines)
    figure, grid = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    axes: list[Axes] = list(grid.flat)
    for axis, (task, mode) in zip(axes, panels):
        here = [r for r in rows if (r["task"], r["mode"]) == (task, mode)]
        _panel(axis, here, looks)
        axis.set_title(f"{task}, {mode}, n = {max(r['n'] for r in here)}", fontsize=11)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    if not panels:
        axes[0].text(0.5, 0.5, "nothing was measured", ha="center", va="center", transform=axes[0].transAxes)
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
    if handles:
        order = [name for name in looks if name in handles]
        figure.legend([handles[n] for n in order], order, fontsize=9, frameon=False, loc="outside right upper",
                      handlelength=3.2)  # fmt: skip
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
