"""Score policies at the same bytes, on the same samples, in one run.

    python recipes/evaluate.py --adapter checkpoints/demo                      # ppl and retrieval, question unseen
    python recipes/evaluate.py --adapter checkpoints/demo --n 8 --budgets .25 --tasks niah_multikey     # one minute
    python recipes/evaluate.py --adapter DIR --policies gate+global,snapkv+ada,l2 --mode aware --out DIR
    python recipes/evaluate.py --policies snapkv,l2,random --tasks passkey,ruler,recall,classification --seeds 0,1
    python recipes/evaluate.py --policies snapkv --tasks longbench_qasper,longbench_trec,ruler_vt --mode aware

Every sample's result goes to records.jsonl in --out at once; the same command again does only what is missing, and more
policies, budgets, tasks, seeds or samples are added to what is there. Writes results.json, frontier.png and the table
of all records, and renews the adapter's card.
"""

import argparse
import functools
import json
import subprocess
import sys
from pathlib import Path

from common import ROOT, base_of, load_model, run

POLICIES = "gate+global,gate,snapkv,snapkv+ada,h2o,l2,value_norm,sinks_recent,random,untrained_alone+global"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--adapter", default="", help="folder or Hub name of a gatekv adapter; empty: training-free only"
    )
    parser.add_argument("--maps", default="", help="a second adapter, with low-rank maps beside --adapter's gate")
    parser.add_argument("--model", default="", help="base model; empty: the adapter's, or the embedded one")
    parser.add_argument("--policies", default=POLICIES, help="names of the README's tables: nacl, d2o, fastgen, …")
    parser.add_argument("--budgets", default=".25,.125", help="shares like .25, tokens like 512")
    parser.add_argument("--tasks", default="niah_multikey,ppl")
    parser.add_argument("--mode", default="agnostic", help="agnostic, aware, or both with a comma")
    parser.add_argument("--n", type=int, default=100, help="scored answers per task and seed")
    parser.add_argument("--n_ppl", type=int, default=16, help="stretches of 128 tokens for ppl, per seed")
    parser.add_argument("--seeds", default="0", help="of the samples, with commas")
    parser.add_argument("--tokens", type=int, help="of the contexts; left out: each task's own, 600 to 1280")
    parser.add_argument("--data", default="", help="held-out text files; empty: the bundled ones")
    parser.add_argument("--choices", default="", help="JSONL for classification: context, question, choices, answer")
    parser.add_argument("--longbench", default="", help="folder of its .jsonl files, or Hub name; empty: the original")
    parser.add_argument("--ruler", default="", help="folder or Hub name of a RULER set; empty: samples are made")
    parser.add_argument(
        "--decode", default="keep", help="keep: tokens after the prompt stay; evict: policies that stream go on"
    )
    parser.add_argument("--sinks", type=int, help="protected by every policy; left out: what its paper protects")
    parser.add_argument("--window", type=int, help="as --sinks, of recent tokens")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", default="", help="folder for the results; empty: the adapter's, or results")
    parser.add_argument("--fresh", action="store_true", help="throw away the records in --out")
    return parser.parse_args(argv)


def checked(argument: str, text: str, known) -> list[str]:
    from gatekv.config import check_choice

    names = [t for t in text.split(",") if t]
    for name in names:
        check_choice(argument, name, known)
    return names


def refusal(reason: str) -> str:
    """A refused cell in the table; `unreachable`: layers that a policy leaves whole cost more than the budget."""
    return "unreachable" if "is unreachable" in reason else f"refused: {reason}"


def print_table(rows: list[dict], comparisons: list[dict]) -> None:
    columns = f"{'policy':18} {'budget':>6} {'bytes':>6} {'at end':>6} {'score':>7} {'KL':>7} {'n':>4}"
    print(f"{'task':24} {'mode':9} {columns}  spread over seeds")
    for r in rows:
        head = f"{r['task']:24} {r['mode']:9} {r['policy']:18} {r['budget']:6{'.3f' if r['budget'] <= 1 else ''}}"
        if r["score"] is None:
            print(f"{head} {refusal(r['refused'])}")
            continue
        kl = "" if r["kl"] is None else f"{r['kl']:7.3f}"
        spread = "" if r["seed_spread"] is None else f"  {r['seed_spread']:.3f}"
        print(
            f"{head} {r['bytes_ratio']:6.3f} {r['bytes_ratio_end']:6.3f} {r['score']:7.3f} {kl:>7} {r['n']:4}{spread}"
        )
        for cell in r.get("cells", []) if r["policy"] == "full" else []:  # of the others in results.json
            place = ", ".join(f"{k} {v}" for k, v in cell.items() if k not in ("score", "kl", "n"))
            print(f"{'':34} {place:37} {'':6} {cell['score']:7.3f} {'':7} {cell['n']:4}")
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


def checked_arguments(args: argparse.Namespace) -> tuple[list[str], list[float | int], list[str], list[str], list[int]]:
    """(policies, budgets, tasks, modes, seeds), or ValueError before anything is loaded."""
    from gatekv import policies
    from gatekv.config import check_choice
    from gatekv.evaluation import frontier, tasks
    from gatekv.policies.amount import read_budget

    names = [p for p in args.policies.split(",") if p and p != "full"]
    alone = ["+".join(part for part in p.split("+") if part != "less") for p in names]  # LESS's control, unasked
    names = list(dict.fromkeys([*names, *alone]))
    budgets = [read_budget(b) for b in args.budgets.split(",") if b]
    for name in names:
        for budget in budgets:
            policies.resolve(name.replace(frontier.UNTRAINED, "gate"), budget)
    chosen, modes = checked("task", args.tasks, tasks.NAMES), checked("mode", args.mode, tasks.MODES)
    check_choice("decode", args.decode, ("keep", "evict"))
    if args.n < 1 or args.n_ppl < 1:
        raise ValueError("--n and --n_ppl count scored answers and must be at least 1.")
    if args.tokens is not None and args.tokens < 64:
        raise ValueError(f"--tokens {args.tokens} leaves no room for facts: use at least 64.")
    try:
        seeds = [int(s) for s in args.seeds.split(",") if s]
    except ValueError as error:
        raise ValueError(f"--seeds {args.seeds!r} must be whole numbers with commas, like 0,1.") from error
    if args.maps and not args.adapter:
        raise ValueError(
            "--maps stand beside a gate: name its adapter with --adapter; maps alone are an --adapter too."
        )
    return names, budgets, chosen, modes, seeds or [0]


def main(argv: list[str]) -> None:
    args = parse(argv)
    import torch
    from peft import PeftModel

    from gatekv import report
    from gatekv.evaluation import frontier, results, tasks
    from gatekv.evaluation.records import Records, settings
    from gatekv.evaluation.tasks.classification import classification, load_choices
    from gatekv.modules import gate_spec
    from gatekv.training.card import write_card

    torch.manual_seed(0)
    names, budgets, chosen, modes, seeds = checked_arguments(args)
    examples = load_choices(args.choices) if args.choices else None
    if examples and "classification" in chosen and len(examples) < args.n:
        raise ValueError(f"--choices has {len(examples)} examples: lower --n from {args.n}.")
    texts = tasks.heldout_texts([d for d in args.data.split(",") if d])
    published = {t: tasks.published(t, args.longbench, args.ruler) for t in chosen if t in tasks.PUBLISHED}

    base, revision = base_of(args.adapter) if args.adapter and not args.model else (args.model, None)
    model, tokenizer = load_model(base, args.dtype, revision)
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter)
    if args.maps:
        if model.peft_config["default"].less_rank:
            raise ValueError(f"{args.adapter} has low-rank maps of its own: leave --maps out.")
        model.load_adapter(args.maps, "maps")
        frontier.use_gate(model, "default")
    model.eval()
    if gate_spec(model) is None:
        names = [p for p in names if not p.startswith(("gate", frontier.UNTRAINED))]

    beside = args.adapter if Path(args.adapter).is_dir() else ""  # a folder named as a repository would be taken for it
    out = Path(args.out or beside or "results")
    options = {"tokens": args.tokens, "decode": args.decode, "sinks": args.sinks, "window": args.window}
    pinned = {"dtype": args.dtype, **options, "longbench": args.longbench or None, "ruler": args.ruler or None}
    pinned = settings(model, base, pinned, texts, examples)
    records = Records(out / "records.jsonl", pinned, args.fresh)
    for task in chosen:
        n = args.n_ppl if task == "ppl" else args.n
        build = functools.partial(classification, examples=examples) if task == "classification" else None
        if task in published:
            room = model.config.get_text_config().max_position_embeddings
            build, n = functools.partial(published[task][0], room=room), min(n, published[task][1] or n)
        for mode in modes if task not in tasks.AGNOSTIC_ONLY else ["agnostic"]:
            for seed in seeds:
                where = (names, budgets, task, mode, n, seed, records)
                frontier.evaluate(model, tokenizer, texts, *where, build=build, **options)
    rows, comparisons = results.rows(records.lines), results.comparisons(records.lines)
    found = {"rows": rows, "comparisons": comparisons, "run": provenance(argv)}
    (out / "results.json").write_text(json.dumps(found, indent=1))
    print_table(rows, comparisons)
    report.frontier(found, out / "frontier.png")
    if (out / "training.json").is_file():
        write_card(out)
    print(f"wrote {out}/records.jsonl, results.json and frontier.png", file=sys.stderr)


if __name__ == "__main__":
    run(main)
