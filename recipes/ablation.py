"""Train every recipe of a folder on the same tokens, score them on the same samples, write one table.

    python recipes/ablation.py                                   # recipes/configs/ablation, two at a time: hours
    python recipes/ablation.py --only default,gate-linear --n 20 # a quarter of an hour
    python recipes/ablation.py --out docs/ablation               # table.md and results.json there

A recipe is a YAML file of `recipes/cpt.py` options. What is trained or scored already is not done again.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gatekv.config import check_choice, option
from gatekv.hardware import cores
from gatekv.options import load
from gatekv.recipes.common import run
from gatekv.report.tables import ablation_table as table

HERE = Path(__file__).resolve().parent
BASELINES = "snapkv+ada,snapkv,h2o,l2,sinks_recent,random"


@dataclass
class AblationOptions:
    """Which recipes, scored how."""

    configs: str = option(str(HERE / "configs" / "ablation"), "Folder of YAML files, one recipe each.")
    only: list[str] = option([], "Names of recipes, without .yaml.")
    work: str = option("checkpoints/ablation", "Where adapters land.")
    out: str = option("", "Where the table goes; left out: as work.")
    budgets: list[float] = option([0.25, 0.125], "Shares of the prompt's tokens.")
    n: int = option(100, "Scored answers of a recipe.")
    n_ppl: int = option(16, "Stretches of 128 tokens for ppl.")
    seed: int = option(2, "Of the evaluation's samples.")
    jobs: int = option(2, "Recipes at a time, which share the cores.")


def call(script: str, options: list[str], log: Path, threads: int) -> None:
    """Run a recipe as its user would; what it prints goes to a file."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(HERE / script), *options]
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=env).returncode
    if code:
        raise ValueError(f"{script} failed on {log.stem}: {log} says why.")


def one(name: str, args: AblationOptions) -> dict:
    """Train and score one recipe, or training-free policies and the untrained gate where name is "baselines"."""
    folder, threads = Path(args.work) / name, cores() // args.jobs or 1
    folder.mkdir(parents=True, exist_ok=True)
    scores = folder / f"scores-{args.seed}-{args.n}-{args.n_ppl}"
    options = [
        "--budgets",
        ",".join(map(str, args.budgets)),
        "--n",
        str(args.n),
        "--n_ppl",
        str(args.n_ppl),
        "--seeds",
        str(args.seed),
    ]
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
    args = load(argv, AblationOptions, __doc__)
    known = sorted(p.stem for p in Path(args.configs).glob("*.yaml"))
    names = args.only or known
    for name in names:
        check_choice("recipe", name, known)
    with ThreadPoolExecutor(max(1, args.jobs)) as pool:
        results = list(pool.map(lambda name: one(name, args), ["baselines", *names]))
    out = Path(args.out or args.work)
    out.mkdir(parents=True, exist_ok=True)
    text = table(results, args.budgets)
    (out / "table.md").write_text(text + "\n")
    (out / "results.json").write_text(json.dumps(results, indent=1))
    print(text)


if __name__ == "__main__":
    run(main)
