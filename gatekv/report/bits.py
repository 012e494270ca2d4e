"""Bits: how many each token of a text has, in every head of every layer."""

from pathlib import Path
from typing import Any

import numpy

from gatekv.evaluation.keepmap import widths
from gatekv.extras import need
from gatekv.policies.amount import budget_text

WHOLE = 16


def bits(maps: dict, path: Path) -> bool:
    """Write bits.png: for each policy and budget under which tokens are held in few bits, a map of heads by tokens.

    maps: what `gatekv.evaluation.keepmap.keep_map` returns. A line is a KV head, layer by layer from the top; its
    colour is the mean of the bits of a token's key and value, white where it is gone. Returns whether there were any;
    without, nothing is written. Needs matplotlib.
    """
    coded = [entry for entry in maps["maps"] if "bits" in entry]
    if not coded:
        return False
    need("matplotlib", what="pictures")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers, heads, tokens = maps["layers"], maps["heads"], len(maps["tokens"])
    size = (9, 0.9 + 2.6 * len(coded))
    figure, axes = pyplot.subplots(len(coded), 1, figsize=size, squeeze=False, layout="constrained")
    image: Any = None
    for axis, entry in zip(axes.flat, coded):
        mean = widths(entry["bits"], (layers, heads, tokens)).mean(-1).reshape(-1, tokens)
        shown = numpy.ma.masked_equal(mean, 0)
        image = axis.imshow(shown, cmap="viridis_r", vmin=2, vmax=WHOLE, aspect="auto", interpolation="nearest")
        held = f"{entry['ratio']:.1%} of the bytes, {(mean > 0).mean():.0%} of the tokens, {mean.mean():.2f} bits each"
        axis.set_title(f"{entry['policy']} at {budget_text(entry['budget'])}: {held}", fontsize=9)
        axis.set_yticks(range(0, layers * heads, 5 * heads), [str(i) for i in range(0, layers, 5)])
        axis.tick_params(labelsize=7)
    figure.supxlabel("token", fontsize=9)
    figure.supylabel("layer, its heads below each other", fontsize=9)
    figure.colorbar(image, ax=axes, label="bits a number", fraction=0.03, pad=0.01)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
