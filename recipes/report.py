"""Draw a results.json, and show on a text which tokens the policies keep: pictures and one page for a browser.

    python recipes/report.py --adapter checkpoints/demo --budgets .25,.125       # its results, and a text
    python recipes/report.py --results docs/results.json                         # those of the documentation
    python recipes/report.py --text notes.txt --policies snapkv,snapkv+ada,l2    # only the text

Writes report.html, frontier.png, tables.md and keep.png to --out; bits.png, where tokens are in few bits; needle.png,
where the results have needle cells.
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from gatekv.config import option
from gatekv.options import LoadOptions, load
from gatekv.recipes.common import load_adapted, run

LEARNED, FREE = ["gate+global", "gate"], ["snapkv", "snapkv+ada", "l2", "sinks_recent", "random"]


@dataclass
class ReportOptions(LoadOptions):
    """What is drawn."""

    results: str = option("", "A results.json that evaluate wrote; left out: the adapter's, where it has one.")
    policies: list[str] = option([], "Left out: the adapter's gates and the training-free ones.")
    budgets: list[str] = option([".25"], "Shares of the tokens like .25, or tokens like 512.")
    text: str = option("", "File to read; left out: a held-out text with four facts written in.")
    out: str = option("results", "Folder for the pictures and the page.")


def sample_text(tokenizer, path: str) -> str:
    """The file behind the chat header, or a bundled text that no gate was trained on."""
    from gatekv.evaluation.tasks import heldout_texts
    from gatekv.facts import chat_frame, make_sample
    from gatekv.textfiles import read_text

    frame = chat_frame(tokenizer)
    if path:
        text = read_text(path, f"--text {path}")
        if not text.strip():
            raise ValueError(f"--text {path} is empty: name a file with a text in it.")
        return frame[0] + text
    rng = random.Random(1)
    return make_sample(heldout_texts([])[0], rng, facts=4, characters=3000, split="heldout", frame=frame).context


def read_results(path: str, adapter: str) -> dict:
    if not path:
        beside = Path(adapter) / "results.json"
        if not (adapter and beside.is_file()):
            return {"rows": []}
        path = str(beside)
    if not Path(path).is_file():
        raise ValueError(f"--results {path} is no file: run evaluate, or leave it out for the text alone.")
    results = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(results, dict) or "rows" not in results:
        raise ValueError(f"--results {path} has no rows: name a results.json that recipes/evaluate.py wrote.")
    return results


def main(argv: list[str]) -> None:
    args = load(argv, ReportOptions, __doc__)
    from gatekv.bundled import adapter_path

    results = read_results(args.results, adapter_path(args.adapter))

    from gatekv import report
    from gatekv.evaluation.keepmap import keep_map
    from gatekv.policies.amount import read_budget

    names = args.policies or ([*LEARNED, *FREE] if args.adapter else FREE)
    model, tokenizer, _, _ = load_adapted(args)
    ids = tokenizer(sample_text(tokenizer, args.text), add_special_tokens=False, return_tensors="pt").input_ids
    maps = keep_map(model, tokenizer, ids.to(model.device), names, [read_budget(b) for b in args.budgets])
    for entry in maps["refused"]:
        print(f"{entry['policy']} at {entry['budget']} refused: {entry['refused']}", file=sys.stderr)
    maps["run"] = {"command": "python recipes/report.py " + " ".join(argv), "tokens": ids.shape[1]}

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    wrote = ["report.html"]
    if results["rows"]:
        report.frontier(results, out / "frontier.png")
        (out / "tables.md").write_text(report.tables(results["rows"]), encoding="utf-8")
        wrote += ["frontier.png", "tables.md"]
    wrote += ["keep.png"] if report.keep(maps, out / "keep.png") else []
    wrote += ["bits.png"] if report.bits(maps, out / "bits.png") else []
    wrote += ["needle.png"] if report.needle(results, out / "needle.png") else []
    report.page(results, maps, out / "report.html")
    print(f"wrote {', '.join(wrote)} to {out}")


if __name__ == "__main__":
    run(main)
