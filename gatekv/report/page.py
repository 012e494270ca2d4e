"""One self-contained page: frontier, the text coloured by what is kept, keep rates, needle maps, provenance."""

import json
import math
from pathlib import Path

from gatekv.report.needle import grid, placed
from gatekv.report.style import measure, styles

HERE = Path(__file__).parent


def _plain(value: object) -> object:
    """The same data with NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _needles(rows: list[dict]) -> list[dict]:
    """The maps of rows whose cells are places, gridded as in needle.png."""
    out = []
    for row in placed(rows):
        depths, lengths, scores = grid(row["cells"])
        entry = {k: row[k] for k in ("policy", "budget", "task", "mode")}
        out.append(entry | {"depths": depths, "lengths": lengths, "scores": scores})
    return out


def embed(data: dict) -> str:
    """JSON that may stand in a script element: no "<" is left, so no text in it can end the element or open another."""
    return json.dumps(_plain(data), ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def page(results: dict, maps: dict | None, path: Path) -> None:
    """Write report.html: no network, no other file; sections without data are left out.

    results: a results.json ("rows", and where there are any "comparisons" and "run"). maps: what
    `gatekv.evaluation.keepmap.keep_map` returns, or None; its own "run", if it has one, joins the provenance.
    """
    rows = [{k: v for k, v in r.items() if k != "cells"} | {"measure": measure(r)} for r in results["rows"]]
    kept = maps if maps and maps["maps"] else None
    names = [r["policy"] for r in rows] + [m["policy"] for m in (kept["maps"] if kept else [])]
    data = {
        "rows": rows,
        "comparisons": results.get("comparisons", []),
        "run": results.get("run", {}),
        "maps": kept,
        "refused": maps["refused"] if maps else [],
        "needles": _needles(results["rows"]),
        "styles": styles(names),
    }
    text = (HERE / "page.html").read_text(encoding="utf-8")
    # The data last: what it says must not be taken for a place to fill.
    for place, filling in (("__STYLE__\n", "page.css"), ("__SCRIPT__\n", "page.js")):
        text = text.replace(place, (HERE / filling).read_text(encoding="utf-8"))
    before, after = text.split("__DATA__")
    Path(path).write_text(before + embed(data) + after, encoding="utf-8")
