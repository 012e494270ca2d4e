"""One process of two in test_stopping: stopper.py BACKEND FOLDER FACTOR trains toy gates, slowly, and says who it is."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[i]) for i in (1, 2)] + [str(Path(__file__).parents[1] / "unit")]

import os
import time

from accelerate import Accelerator
from backends import on_cpu
from test_training import ToyData, config, make

from gatekv.recipes.common import run
from gatekv.training.loop import train


class SlowData(ToyData):
    """Takes a while to read, so that a signal comes in the middle; notes each process that got to step 2."""

    def __init__(self, folder: Path):
        self.folder = folder

    def batch(self, first, rows, **kwargs):
        time.sleep(0.05)
        if 4 <= first < 10**6:
            (self.folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
        return super().batch(first, rows, **kwargs)


def main(argv: list[str]) -> None:
    backend, folder, factor = argv[0], Path(argv[1]), float(argv[2])
    on_cpu(backend)
    accelerator = Accelerator()
    module, calls = make(sparsity="lagrange"), []

    def spoil(module, args, out):
        calls.append(1)
        wrong = len(calls) == 4 and accelerator.process_index == 1
        return out | {"loss": out["loss"] * (factor if wrong else 1)}

    module.register_forward_hook(spoil)
    settings = config(folder, sparsity="lagrange", max_steps=1000, batch_size=1, save_every=3, resume="auto")
    train(module, SlowData(folder), settings, accelerator)


if __name__ == "__main__":
    run(main)
