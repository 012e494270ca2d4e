"""Pictures of a results.json: the frontier, score against bytes really held."""

from pathlib import Path

# Learned policies in a strong blue; training-free in warm and grey tones; the untrained control dotted.
LEARNED, COLORS = "#1f5fbf", ["#d1495b", "#e08e45", "#8c6bb1", "#5b8c5a", "#7a7a7a", "#b0b0b0", "#c2a83e"]
LABELS = {"ppl": "KL to the full cache, nats per token (lower is better)"}


def _line(axis, points: list[dict], value: str, **style) -> None:
    points = sorted(points, key=lambda r: r["bytes_ratio"])
    x, y = [r["bytes_ratio"] for r in points], [r[value] for r in points]
    axis.plot(x, y, marker="o", **style)
    if value == "score":
        axis.fill_between(
            x, [r["ci_low"] for r in points], [r["ci_high"] for r in points], alpha=0.1, color=style["color"]
        )


def frontier(results: dict, path: Path) -> None:
    """Write frontier.png: a panel per task and mode, a line per policy, 95 % intervals, the full cache dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in results["rows"] if r["score"] is not None]
    panels = list(dict.fromkeys((r["task"], r["mode"]) for r in rows))
    names = list(dict.fromkeys(r["policy"] for r in rows if r["policy"] != "full"))
    free = [n for n in names if not n.startswith(("gate", "untrained"))]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.2 * len(panels), 4.6), squeeze=False)
    for axis, (task, mode) in zip(axes[0], panels):
        value = "kl" if task == "ppl" else "score"
        here = [r for r in rows if (r["task"], r["mode"]) == (task, mode)]
        for name in names:
            points = [r for r in here if r["policy"] == name]
            if not points:
                continue
            style = {"color": COLORS[free.index(name) % len(COLORS)], "lw": 1.4, "ms": 4} if name in free else {}
            if name.startswith("gate"):
                style = {"color": LEARNED, "lw": 2.6, "ms": 6, "ls": "-" if "+" in name else "--"}
            if name.startswith("untrained"):
                style = {"color": LEARNED, "lw": 1.2, "ms": 4, "ls": ":"}
            _line(axis, points, value, label=name, **style)
        full = [r for r in here if r["policy"] == "full"]
        if full and value == "score":
            axis.axhline(full[0]["score"], color="black", ls="--", lw=1)
            place = (0.01, full[0]["score"] + 0.015)
            axis.annotate("full cache", place, xycoords=("axes fraction", "data"), fontsize=9)
        axis.set_xlabel("bytes held / bytes of the full cache, after prefill")
        axis.set_ylabel(LABELS.get(task, "share of answers right"))
        axis.set_title(f"{task}, {mode}, n = {here[0]['n']}", fontsize=11)
        if value == "score":
            axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][-1].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
