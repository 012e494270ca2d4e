"""Train every recipe of a folder on the same tokens, score them on the same samples, write one table.

    python recipes/ablation.py                                   # recipes/configs/ablation, two at a time: hours
    python recipes/ablation.py --only default,gate-linear --n 20 # a quarter of an hour
    python recipes/ablation.py --out docs/ablation               # table.md and results.json there

A recipe is a YAML file of `recipes/cpt.py` options. What is trained or scored already is not done again.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import ROOT, run

from gatekv.report.tables import ablation_table as table

CONFIGS = ROOT / "recipes" / "configs" / "ablation"
BASELINES = "snapkv+ada,snapkv,h2o,l2,sinks_recent,random"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", default=str(CONFIGS), help="folder of YAML files, one recipe each")
    parser.add_argument("--only", default="", help="names of recipes, without .yaml")
    parser.add_argument("--work", default=str(ROOT / "checkpoints" / "ablation"), help="where adapters land")
    parser.add_argument("--out", default="", help="where the table goes; empty: --work")
    parser.add_argument("--budgets", default=".25,.125")
    parser.add_argument("--n", type=int, default=100, help="scored answers a recipe")
    parser.add_argument("--n_ppl", type=int, default=16)
    parser.add_argument("--seed", type=int, default=2, help="of the evaluation's samples")
    parser.add_argument(
        "--jobs", type=int, default=2, help="recipes at a time, one thread each where there are several"
    )
    return parser.parse_args(argv)


def call(script: str, options: list[str], log: Path, threads: int) -> None:
    """Run a recipe as its user would; what it prints goes to a file."""
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, str(ROOT / "recipes" / script), *options]
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=env).returncode
    if code:
        raise ValueError(f"{script} failed on {log.stem}: {log} says why.")


def one(name: str, args: argparse.Namespace) -> dict:
    """Train and score one recipe, or training-free policies and the untrained gate where name is "baselines"."""
    folder, threads = Path(args.work) / name, 1 if args.jobs > 1 else 0
    folder.mkdir(parents=True, exist_ok=True)
    scores = folder / f"scores-{args.seed}-{args.n}-{args.n_ppl}"
    options = ["--budgets", args.budgets, "--n", str(args.n), "--n_ppl", str(args.n_ppl), "--seeds", str(args.seed)]
    if name == "baselines":
        options += ["--policies", BASELINES]
    else:
        if not (folder / "adapter_model.safetensors").is_file():
            config = str(Path(args.configs) / f"{name}.yaml")
            call("cpt.py", ["--config", config, "--output_dir", str(folder)], folder / "train.log", threads)
        spec = json.loads((folder / "adapter_config.json").read_text())
        policy = "gate+decay" if spec["relaxation"] == "decay" else "gate_alone+global"
        more = ",gate+global,untrained_alone+global" if name == "default" else ""
        options += ["--adapter", str(folder), "--policies", policy + more]
    if not (scores / "results.json").is_file():
        scores.mkdir(exist_ok=True)
        call("evaluate.py", [*options, "--out", str(scores)], folder / "evaluate.log", threads)
    found = json.loads((scores / "results.json").read_text())["rows"]
    training = folder / "training.json"
    trained = json.loads(training.read_text()) if training.is_file() else {}
    return {"name": name, "rows": found, "seconds": trained.get("seconds"), "gap": trained.get("soft_hard")}


def main(argv: list[str]) -> None:
    args = parse(argv)
    known = sorted(p.stem for p in Path(args.configs).glob("*.yaml"))
    from gatekv.config import check_choice

    names = [n for n in args.only.split(",") if n] or known
    for name in names:
        check_choice("recipe", name, known)
    with ThreadPoolExecutor(max(1, args.jobs)) as pool:
        results = list(pool.map(lambda name: one(name, args), ["baselines", *names]))
    out = Path(args.out or args.work)
    out.mkdir(parents=True, exist_ok=True)
    budgets = [float(b) for b in args.budgets.split(",")]
    text = table(results, budgets)
    (out / "table.md").write_text(text + "\n")
    (out / "results.json").write_text(json.dumps(results, indent=1))
    print(text)


if __name__ == "__main__":
    run(main)
