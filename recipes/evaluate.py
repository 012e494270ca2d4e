"""Score policies at the same bytes, on the same samples, in one run.

    python recipes/evaluate.py --adapter checkpoints/demo                      # ppl and retrieval, question unseen
    python recipes/evaluate.py --adapter checkpoints/demo --n 8 --budgets .25 --tasks niah_multikey     # one minute
    python recipes/evaluate.py --adapter DIR --policies gate+global,snapkv+ada,l2 --mode aware --out DIR

Writes results.json, frontier.png and the table to --out, and renews the adapter's card.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from common import ROOT, load_model, run

POLICIES = "gate+global,gate,snapkv,snapkv+ada,l2,value_norm,sinks_recent,random,untrained+global"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--adapter", default="", help="folder or Hub name of a gatekv adapter; empty: training-free only"
    )
    parser.add_argument("--model", default="", help="base model; empty: the adapter's, or the embedded one")
    parser.add_argument("--policies", default=POLICIES)
    parser.add_argument("--budgets", default=".25,.125")
    parser.add_argument("--tasks", default="niah_multikey,ppl")
    parser.add_argument("--mode", default="agnostic", help="agnostic, aware, or both with a comma")
    parser.add_argument("--n", type=int, default=100, help="scored answers per task")
    parser.add_argument("--n_ppl", type=int, default=16, help="stretches of 128 tokens for ppl")
    parser.add_argument("--tokens", type=int, help="of the contexts; left out: 600 to 1000")
    parser.add_argument("--data", default="", help="held-out text files; empty: the bundled ones")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="", help="folder for the results; empty: the adapter's")
    return parser.parse_args(argv)


def checked(argument: str, text: str, known) -> list[str]:
    from gatekv.config import check_choice

    names = [t for t in text.split(",") if t]
    for name in names:
        check_choice(argument, name, known)
    return names


def print_table(rows: list[dict], comparisons: list[dict]) -> None:
    print(
        f"{'task':14} {'mode':9} {'policy':18} {'budget':>6} {'bytes':>6} {'at end':>6} {'score':>7} {'KL':>7} {'n':>4}"
    )
    for r in rows:
        head = f"{r['task']:14} {r['mode']:9} {r['policy']:18} {r['budget']:6.3f}"
        if r["score"] is None:
            print(f"{head} refused: {r['refused']}")
            continue
        kl = "" if r["kl"] is None else f"{r['kl']:7.3f}"
        print(f"{head} {r['bytes_ratio']:6.3f} {r['bytes_ratio_end']:6.3f} {r['score']:7.3f} {kl:>7} {r['n']:4}")
    for c in comparisons:
        what = "KL" if c["task"] == "ppl" else "score"
        print(
            f"{c['task']} {c['mode']} at {c['budget']}: {c['learned']} {what} {c['learned_value']:.3f} against "
            f"{c['training_free']} {c['training_free_value']:.3f} (full cache {c['full_value']:.3f}), "
            f"difference {c['difference']:+.3f} [{c['ci_low']:+.3f}, {c['ci_high']:+.3f}]"
        )


def provenance(argv: list[str]) -> dict:
    import peft
    import torch
    import transformers

    import gatekv

    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    versions = {m.__name__: m.__version__ for m in (gatekv, torch, transformers, peft)}
    command = "python recipes/evaluate.py " + " ".join(argv)
    return {"commit": git.stdout.strip(), "versions": versions, "command": command}


def main(argv: list[str]) -> None:
    args = parse(argv)
    import torch
    from peft import PeftConfig, PeftModel

    from gatekv import policies, report
    from gatekv.evaluation import frontier, tasks
    from gatekv.training.card import write_card

    torch.manual_seed(args.seed)
    names = [p for p in args.policies.split(",") if p and p != "full"]
    budgets = [float(b) for b in args.budgets.split(",") if b]
    for name in names:
        for budget in budgets:
            policies.resolve(name.replace(frontier.UNTRAINED, "gate"), budget)
    chosen = checked("task", args.tasks, tasks.TASKS)
    modes = checked("mode", args.mode, tasks.MODES)
    if args.n < 1 or args.n_ppl < 1:
        raise ValueError("--n and --n_ppl count scored answers and must be at least 1.")
    if args.tokens is not None and args.tokens < 64:
        raise ValueError(f"--tokens {args.tokens} leaves no room for facts: use at least 64.")
    if not args.adapter:
        names = [p for p in names if not p.startswith(("gate", frontier.UNTRAINED))]

    base = args.model
    if args.adapter:
        config = PeftConfig.from_pretrained(args.adapter)
        base = base or config.base_model_name_or_path
    model, tokenizer = load_model(base, args.dtype)
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter)
    model.eval()
    texts = tasks.heldout_texts([d for d in args.data.split(",") if d])

    rows, comparisons = [], []
    for task in chosen:
        for mode in modes if task != "ppl" else ["agnostic"]:
            n = args.n_ppl if task == "ppl" else args.n
            cells = frontier.evaluate(model, tokenizer, texts, names, budgets, task, mode, n, args.seed, args.tokens)
            rows += frontier.rows(cells, task, mode, args.seed)
            comparisons += frontier.comparisons(cells, task, mode)
    results = {"rows": rows, "comparisons": comparisons, "run": provenance(argv)}
    out = Path(args.out or args.adapter or "results")
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    report.frontier(results, out / "frontier.png")
    if (out / "training.json").is_file():
        write_card(out, json.loads((out / "training.json").read_text())["config"])
    print_table(rows, comparisons)
    print(f"wrote {out}/results.json and {out}/frontier.png", file=sys.stderr)


if __name__ == "__main__":
    run(main)
