"""Draw a results.json, and show on a text which tokens the policies keep: pictures and one page for a browser.

    python recipes/report.py                                     # the committed results; training-free policies
    python recipes/report.py --adapter checkpoints/demo --results checkpoints/demo/results.json --budgets .25,.125
    python recipes/report.py --results "" --text notes.txt --policies snapkv,snapkv+ada,l2      # only the text

Writes report.html, frontier.png, tables.md, keep.png and, where the results have needle cells, needle.png to --out.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from common import ROOT, base_of, load_model, run

LEARNED, FREE = "gate+global,gate", "snapkv,snapkv+ada,l2,sinks_recent,random"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=str(ROOT / "docs" / "results.json"), help="empty: only the text")
    parser.add_argument("--adapter", default="", help="folder or Hub name; empty: training-free policies only")
    parser.add_argument("--model", default="", help="base model; empty: the adapter's, or the embedded one")
    parser.add_argument("--policies", default="", help="empty: the adapter's gates and the training-free ones")
    parser.add_argument("--budgets", default=".25", help="shares of the tokens, or numbers of them, with commas")
    parser.add_argument("--text", default="", help="file to read; empty: a held-out text with four facts written in")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", default="results", help="folder for the pictures and the page")
    return parser.parse_args(argv)


def sample_text(tokenizer, path: str) -> str:
    """The file behind the chat header, or a bundled text that no gate was trained on."""
    from gatekv.evaluation.tasks import heldout_texts
    from gatekv.facts import chat_frame, make_sample

    frame = chat_frame(tokenizer)
    if path:
        text = Path(path).read_text(encoding="utf-8")
        if not text.strip():
            raise ValueError(f"--text {path} is empty: name a file with a text in it.")
        return frame[0] + text
    rng = random.Random(1)
    return make_sample(heldout_texts([])[0], rng, facts=4, characters=3000, split="heldout", frame=frame).context


def read_results(path: str) -> dict:
    if not path:
        return {"rows": []}
    if not Path(path).is_file():
        raise ValueError(f"--results {path} is no file: run recipes/evaluate.py, or leave it empty for the text alone.")
    results = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(results, dict) or "rows" not in results:
        raise ValueError(f"--results {path} has no rows: name a results.json that recipes/evaluate.py wrote.")
    return results


def main(argv: list[str]) -> None:
    args = parse(argv)
    results = read_results(args.results)
    from peft import PeftModel

    from gatekv import report
    from gatekv.evaluation.keepmap import keep_map
    from gatekv.policies.amount import read_budget

    names = args.policies or (f"{LEARNED},{FREE}" if args.adapter else FREE)
    names = [p for p in names.split(",") if p]
    budgets = [read_budget(b) for b in args.budgets.split(",") if b]
    base = base_of(args.adapter) if args.adapter and not args.model else (args.model, None)
    model, tokenizer = load_model(base[0], args.dtype, base[1])
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter).eval()
    ids = tokenizer(sample_text(tokenizer, args.text), add_special_tokens=False, return_tensors="pt").input_ids
    maps = keep_map(model, tokenizer, ids, names, budgets)
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
    wrote += ["needle.png"] if report.needle(results, out / "needle.png") else []
    report.page(results, maps, out / "report.html")
    print(f"wrote {', '.join(wrote)} to {out}")


if __name__ == "__main__":
    run(main)
