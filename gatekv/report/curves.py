"""One picture for one glance: how much is still found with a part of the cache, a curve for each way to choose it."""

from pathlib import Path

from gatekv.extras import need

GREY = "#767676"
GAP = 6  # percent between labels


def curves(rows: list[dict], policies: dict[str, tuple[str, str]], path: Path, title: str) -> None:
    """Draw the scores of one task over the share of the cache's bytes, largest share first.

    Args:
        rows: of results.json, one task and mode; refused ones are left out. policies: name in the rows -> (what a
            reader calls it, colour). path: of the PNG. title: over the picture.

    Raises:
        ImportError: matplotlib is missing.
    """
    need("matplotlib", what="pictures")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in rows if r["score"] is not None]
    budgets = sorted({r["budget"] for r in rows if r["policy"] in policies}, reverse=True)
    figure, axis = pyplot.subplots(figsize=(7.6, 4.4), layout="constrained")
    ends = []
    for name, (label, color) in policies.items():
        scores = {r["budget"]: r["score"] for r in rows if r["policy"] == name}
        places = [i for i, budget in enumerate(budgets) if budget in scores]
        values = [100 * scores[budgets[i]] for i in places]
        axis.plot(places, values, color=color, marker="o", lw=2.6)
        if places:
            ends.append((values[-1], places[-1], label, color))
    lowest = -GAP
    for value, place, label, color in sorted(ends):  # labels of curves that end together stand above one another
        lowest = max(value, lowest + GAP)
        axis.annotate(label, (place, lowest), xytext=(9, 0), textcoords="offset points", color=color, va="center",
                      fontsize=11, fontweight="bold", annotation_clip=False)  # fmt: skip
    for full in [r["score"] for r in rows if r["policy"] == "full"][:1]:
        axis.axhline(100 * full, color=GREY, ls="--", lw=1.2)
        axis.annotate("whole cache", (0, 100 * full), xytext=(0, 5), textcoords="offset points", color=GREY)
    axis.set_xticks(range(len(budgets)), [f"{100 * b:g} %" for b in budgets])
    axis.set_xlim(-0.15, len(budgets) - 0.1)
    axis.set_ylim(0, 102)
    axis.set_xlabel("share of the cache's memory that is kept")
    axis.set_ylabel("facts found, %")
    axis.set_title(title, loc="left", fontsize=12)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
