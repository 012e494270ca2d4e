"""Keep rates: what share of a text each head of each layer still holds."""

import math
from pathlib import Path
from typing import Any

from gatekv.evaluation.keepmap import unpack
from gatekv.extras import need
from gatekv.policies.amount import budget_text

COLUMNS = 3


def keep(maps: dict, path: Path) -> bool:
    """Write keep.png: a map of layer by head per policy and budget, coloured by the share of tokens kept.

    maps: what `gatekv.evaluation.keepmap.keep_map` returns. All maps share one scale. Returns whether there were any;
    without, nothing is written. Needs matplotlib.
    """
    if not maps["maps"]:
        return False
    need("matplotlib", what="pictures")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shape = (maps["layers"], maps["heads"], len(maps["tokens"]))
    rates = [unpack(m["keep"], shape).mean(-1) for m in maps["maps"]]
    columns = min(COLUMNS, len(rates))
    lines = math.ceil(len(rates) / columns)
    size = (4.6 * columns + 0.9, (0.9 + min(2.6, 0.24 * shape[1])) * lines + 0.4)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    image: Any = None
    top = max(r.max() for r in rates)
    for axis, entry, rate in zip(axes.flat, maps["maps"], rates):
        image = axis.imshow(rate.T, cmap="viridis", vmin=0, vmax=top, aspect="auto")
        budget = "its own threshold" if entry["budget"] is None else budget_text(entry["budget"])
        axis.set_title(f"{entry['policy']} at {budget}: {rate.mean():.1%} kept", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.locator_params(integer=True)
    for axis in list(axes.flat)[len(rates) :]:
        axis.set_axis_off()
    figure.supxlabel("layer", fontsize=9)
    figure.supylabel("KV head", fontsize=9)
    figure.colorbar(
        image, ax=axes, label="share of tokens kept", fraction=0.03, pad=0.01, format=lambda x, _: f"{x:.0%}"
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
