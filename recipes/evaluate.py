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

import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from gatekv.config import option
from gatekv.evaluation import tasks as known
from gatekv.extras import missing
from gatekv.hardware import DTYPES, Hardware
from gatekv.options import LoadOptions, load
from gatekv.recipes.common import load_adapted, run

POLICIES = [
    "gate+global", "gate", "snapkv", "snapkv+ada", "h2o", "l2", "value_norm", "sinks_recent", "random",
    "untrained_alone+global",
]  # fmt: skip
DECODES = ("keep", "evict")


@dataclass
class EvaluateOptions(LoadOptions):
    """What is scored, and how."""

    policies: list[str] = option(POLICIES, "Names of the methods page: gate+global, snapkv+ada, h2o, …")
    budgets: list[str] = option([".25", ".125"], "Shares of the tokens like .25, or tokens like 512.")
    tasks: list[str] = option(["niah_multikey", "ppl"], "Names of the evaluation page.", choices=known.NAMES)
    mode: list[str] = option(
        ["agnostic"], "Compress the context before the question is seen, with it, or both.", choices=known.MODES
    )
    n: int = option(100, "Scored answers of each task and seed.")
    n_ppl: int = option(16, "Stretches of 128 tokens for ppl, of each seed.")
    seeds: list[int] = option([0], "Of the samples.")
    tokens: int | None = option(None, "Of the contexts; left out: each task's own, 600 to 1280.")
    data: list[str] = option([], "Held-out text files; left out: the bundled ones.")
    choices: str = option("", "JSONL for classification: context, question, choices, answer.")
    longbench: str = option("", "Folder of its .jsonl files, or Hub name; left out: the original.")
    ruler: str = option("", "Folder or Hub name of a RULER set; left out: samples are made.")
    maps: str = option("", "A second adapter, whose low-rank maps stand beside the first one's gate.")
    decode: str = option("keep", "Tokens after the prompt stay, or policies that stream go on.", choices=DECODES)
    sinks: int | None = option(None, "Protected by every policy; left out: what its paper protects.")
    window: int | None = option(None, "As sinks, of recent tokens.")
    cache_dtype: str = option("", "Of what is held, as bfloat16; left out: the model's.", choices=("", *DTYPES))
    out: str = option("", "Folder for the results; left out: the adapter's, or results.")
    fresh: bool = option(False, "Throw away the records that are there.")


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


def provenance(argv: list[str], hardware: Hardware) -> dict:
    """What made a result: commit (of a checkout), versions, command, kind of machine."""
    import peft
    import torch
    import transformers

    import gatekv

    source = Path(gatekv.__file__).parent
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=source, capture_output=True, text=True)
    versions = {m.__name__: m.__version__ for m in (gatekv, torch, transformers, peft)}
    command = "python recipes/evaluate.py " + " ".join(argv)
    machine = {"machine": hardware.machine, "threads": hardware.threads, "dtype": hardware.dtype_name}
    return {"commit": git.stdout.strip(), "versions": versions, "command": command, **machine}


def check(options: EvaluateOptions) -> tuple[list[str], list[float | int]]:
    """(policies to score, LESS's controls among them; budgets), or ValueError before anything is loaded."""
    from gatekv.evaluation.names import resolved, without_maps
    from gatekv.policies.amount import read_budget

    names = [p for p in options.policies if p != "full"]
    names = list(dict.fromkeys([*names, *map(without_maps, names)]))  # the control of maps, unasked
    budgets = [read_budget(text) for text in options.budgets]
    for name in names:
        for budget in budgets:
            resolved(name, budget)
    if options.n < 1 or options.n_ppl < 1:
        raise ValueError("--n and --n_ppl count scored answers and must be at least 1.")
    if options.tokens is not None and options.tokens < 64:
        raise ValueError(f"--tokens {options.tokens} leaves no room for facts: use at least 64.")
    if options.maps and not options.adapter:
        raise ValueError(
            "--maps stand beside a gate: name its adapter with --adapter; maps alone are an --adapter too."
        )
    return names, budgets


def main(argv: list[str]) -> dict:
    """Returns what results.json holds: {"rows", "comparisons", "run"}."""
    options = load(argv, EvaluateOptions, __doc__)
    import torch

    from gatekv import report
    from gatekv.bundled import adapter_path
    from gatekv.evaluation import frontier, results
    from gatekv.evaluation.names import resolved
    from gatekv.evaluation.records import Records, pinned_dtype, settings
    from gatekv.evaluation.tasks.classification import classification, load_choices
    from gatekv.modules import gate_spec
    from gatekv.training.card import write_card

    torch.manual_seed(0)
    (names, budgets), chosen = check(options), options.tasks
    examples = load_choices(options.choices) if options.choices else None
    if examples and "classification" in chosen and len(examples) < options.n:
        raise ValueError(f"--choices has {len(examples)} examples: lower --n from {options.n}.")
    texts = known.heldout_texts(options.data)
    published = {t: known.published(t, options.longbench, options.ruler) for t in chosen if t in known.PUBLISHED}

    beside = (
        options.adapter if Path(options.adapter).is_dir() else ""
    )  # a folder named as a repository would be taken for it
    out = Path(options.out or beside or "results")
    earlier = "" if options.fresh else pinned_dtype(out / "records.jsonl")
    model, tokenizer, hardware, base = load_adapted(options, earlier)
    if options.maps:
        if model.peft_config["default"].less_rank:
            raise ValueError(f"{options.adapter} has low-rank maps of its own: leave --maps out.")
        model.load_adapter(adapter_path(options.maps), "maps")
        frontier.use_gate(model, "default")
        model.eval()
    if gate_spec(model) is None:
        names = [p for p in names if not resolved(p, 1.0).needs.gate]

    protection = {name: getattr(options, name) for name in ("tokens", "decode", "sinks", "window")}
    if options.cache_dtype:
        protection["cache_dtype"] = options.cache_dtype
    pinned = {"dtype": hardware.dtype_name, **protection}
    pinned |= {"longbench": options.longbench or None, "ruler": options.ruler or None}
    records = Records(out / "records.jsonl", settings(model, base, pinned, texts, examples), options.fresh)
    for task in chosen:
        n = options.n_ppl if task == "ppl" else options.n
        build = functools.partial(classification, examples=examples) if task == "classification" else None
        if task in published:
            room = model.config.get_text_config().max_position_embeddings
            build, n = functools.partial(published[task][0], room=room), min(n, published[task][1] or n)
        for mode in options.mode if task not in known.AGNOSTIC_ONLY else ["agnostic"]:
            for seed in options.seeds or [0]:
                where = (names, budgets, task, mode, n, seed, records)
                frontier.evaluate(model, tokenizer, texts, *where, build=build, **protection)
    rows, comparisons = results.rows(records.lines), results.comparisons(records.lines)
    found = {"rows": rows, "comparisons": comparisons, "run": provenance(argv, hardware)}
    (out / "results.json").write_text(json.dumps(found, indent=1))
    print_table(rows, comparisons)
    drawn = not missing("matplotlib")
    if drawn:
        report.frontier(found, out / "frontier.png")
    if (out / "training.json").is_file():
        write_card(out)
    last = "frontier.png" if drawn else 'no picture, which needs pip install "gatekv[plot]"'
    print(f"wrote {out}/records.jsonl, results.json and {last}", file=sys.stderr)
    return found


if __name__ == "__main__":
    run(main)
