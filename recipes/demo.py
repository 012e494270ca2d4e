"""Train a gate, generate with it, compare it with methods that need no training, and draw three curves.

    gatekv demo                    # at most a quarter of an hour on two CPU cores; a GPU needs a minute or two
    gatekv demo --minutes 6        # a shorter one

A step is timed first, and the run is sized by it: fewer steps, then shorter rows, where steps are slow. Writes the
adapter, results.json and curves.png to --output_dir.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from gatekv.config import option
from gatekv.hardware import Hardware, choose
from gatekv.options import HardwareOptions, load
from gatekv.recipes.common import announce, run

STEPS, ROWS = 140, (640, 384)  # the default recipe's, and shorter rows for slow machines
FEWEST = 50  # steps that teach a gate something
CURVES = {
    "gate+global": ("trained gate", "#1f5fbf"),
    "snapkv+ada": ("Ada-SnapKV, no training", "#d55e00"),
    "sinks_recent": ("newest tokens", "#767676"),
}
BUDGETS, FACTS, TOKENS = ".5,.25,.125,.0625", 40, 1024


@dataclass
class DemoOptions(HardwareOptions):
    """How long, and where to."""

    minutes: float = option(13.0, "That the whole may take; what is left after training is for the comparison.")
    output_dir: str = option("checkpoints/demo", "Folder for the adapter, the results and the picture.")


def step_seconds(hardware: Hardware, length: int) -> tuple[float, float]:
    """Seconds of a training step on the oracle alone, and of one with a student, on a row of `length` tokens."""
    import torch
    from peft import get_peft_model

    from gatekv import GateKVConfig
    from gatekv.config import GateSpec
    from gatekv.presets import preset
    from gatekv.recipes.common import load_model
    from gatekv.training.objective import Objective
    from gatekv.training.options import GATE_OPTIONS

    recipe = preset("default")
    spec = GateSpec(**{name: value for name, value in recipe.items() if name in GATE_OPTIONS})
    model = get_peft_model(load_model("", hardware)[0], GateKVConfig(task_type="CAUSAL_LM", **vars(spec))).train()
    objective = Objective(model, oracle_weight=recipe["oracle_weight"])
    ids = torch.arange(length, device=hardware.device)[None] % 1000 + 10
    weights = torch.ones(ids.shape, device=hardware.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "weights": weights}
    batch["split"] = torch.full((1,), length // 2, device=hardware.device)
    found = []
    for warm in (True, True, False):  # the first also makes what later ones find
        start = time.perf_counter()
        objective(batch, recipe["target_keep"], warm=warm)["loss"].backward()
        if hardware.device.type != "cpu":
            torch.accelerator.synchronize()
        found.append(time.perf_counter() - start)
    return found[1], found[2]


def sized(seconds: float, warm: float, student: float) -> tuple[int, int]:
    """(steps, tokens of a row) that fit into `seconds`, where steps on the longest rows take `warm` and `student`."""
    mean = (warm + student) / 2
    steps = int(seconds / mean)
    if steps >= FEWEST:
        return min(STEPS, steps), ROWS[0]
    return min(STEPS, max(FEWEST, int(seconds / mean * ROWS[0] / ROWS[1]))), ROWS[1]


def main(argv: list[str]) -> None:
    options = load(argv, DemoOptions, __doc__)
    if options.minutes <= 0:
        raise ValueError(f"minutes is the time the demo may take, above 0; got {options.minutes}.")
    from gatekv.recipes import cpt, evaluate, generate
    from gatekv.report.curves import curves

    hardware = choose(options.device, options.dtype, options.threads)
    announce(hardware)
    start, out = time.monotonic(), Path(options.output_dir)
    warm, student = step_seconds(hardware, ROWS[0])
    comparison = 24 * student  # generating, and 40 facts under three policies at four budgets; in steps, so it scales
    steps, rows = sized(60 * options.minutes - comparison - (time.monotonic() - start), warm, student)
    less = "" if (steps, rows) == (STEPS, ROWS[0]) else f", where the default is {STEPS} on {ROWS[0]}"
    total = (steps * (warm + student) / 2 * rows / ROWS[0] + comparison) / 60
    print(f"a step takes {warm:.1f} to {student:.1f} s here: {steps} steps on rows of {rows} tokens{less}; "
          f"about {total:.0f} minutes in all", file=sys.stderr, flush=True)  # fmt: skip

    where = ["--device", options.device, "--dtype", hardware.dtype_name, "--threads", str(hardware.threads)]
    cpt.main([*where, "--max_steps", str(steps), "--sequence_length", str(rows), "--output_dir", str(out)])
    generate.main([*where, "--adapter", str(out), "--budget", ".25"])
    asked = ["--tasks", "niah_multikey", "--n", str(FACTS), "--tokens", str(TOKENS), "--budgets", BUDGETS]
    found = evaluate.main([*where, "--adapter", str(out), "--policies", ",".join(CURVES), "--fresh", *asked])
    title = f"What a {TOKENS}-token text still answers when most of its cache is gone"
    curves(found["rows"], CURVES, out / "curves.png", title)
    print(f"done in {(time.monotonic() - start) / 60:.1f} minutes; look at {out / 'curves.png'}")


if __name__ == "__main__":
    run(main)
