"""Adapters side by side on the same questions: one table of several evaluate.py runs, with paired intervals.

    python recipes/compare.py lora=out/lora-0,out/lora-1 both=out/both-0,out/both-1 --baseline lora:full

NAME=FOLDER,… is one arm: the folders that evaluate.py wrote to (--out), one for each training seed. All must have been
measured with the same model, data, dtype and protection. Writes arms.json and arms.md to --out, and prints the table:
score, its mean in each run, bytes held after the prompt as a share of the full cache's, and the difference to
--baseline (arm:policy) with a 95 % interval that resamples contexts.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from gatekv.config import option
from gatekv.options import load
from gatekv.recipes.common import run


@dataclass
class CompareOptions:
    """What is compared with what."""

    arms: list[str] = option([], "NAME=FOLDER,FOLDER,… for each arm.", positional=True)
    baseline: str = option("", "NAME:POLICY that all others are compared with.")
    out: str = option("results", "Folder for arms.json and arms.md.")


def parse(argv: list[str]) -> tuple[CompareOptions, dict[str, list[str]]]:
    options, arms = load(argv, CompareOptions, __doc__), {}
    for arm in options.arms:
        name, equals, folders = arm.partition("=")
        if not (name and equals and folders) or name in arms:
            raise ValueError(f"{arm!r} is not NAME=FOLDER,FOLDER,… with a name of its own.")
        arms[name] = folders.split(",")
    if ":" not in options.baseline:
        raise ValueError(f"--baseline {options.baseline!r} is not NAME:POLICY, as in {next(iter(arms))}:full.")
    return options, arms


def markdown(rows: list[dict]) -> str:
    first = next(r for r in rows if not r["refused"])
    lines = [f"{first['contexts']} samples, {len(first['by_run'])} runs.", ""]
    lines += ["| arm | policy | budget | bytes | score | each run | difference |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        if r["refused"]:
            lines.append(f"| {r['arm']} | `{r['policy']}` | {100 * r['budget']:g} % | – | refused | | |")
            continue
        each = " ".join(f"{x:.3f}" for x in r["by_run"])
        change = f"{r['difference']:+.3f} ({r['difference_low']:+.3f} … {r['difference_high']:+.3f})"
        lines.append(f"| {r['arm']} | `{r['policy']}` | {100 * r['budget']:g} % | {r['bytes_ratio']:.3f} | "
                     f"{r['score']:.3f} | {each} | {change} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> list[dict]:
    args, arms = parse(argv)
    from gatekv.evaluation.arms import read_arms, table

    rows = table(read_arms(arms), tuple(args.baseline.split(":", 1)))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "recipes/compare.py", *argv])
    (out / "arms.json").write_text(json.dumps({"command": command, "rows": rows}, indent=1))
    (out / "arms.md").write_text(markdown(rows))
    print(markdown(rows), end="")
    print(json.dumps({"arms": len(arms), "rows": len(rows), "out": str(out)}))
    return rows


if __name__ == "__main__":
    run(main)
