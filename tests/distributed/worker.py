"""Run by `accelerate launch` in test_two_processes: trains tiny gates, writes losses and weights from rank 0."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "unit")]

import json
import os

import torch
from accelerate import Accelerator, InitProcessGroupKwargs


def main(out: str, batch_size: int, settings: str) -> None:
    from test_training import ToyData, config, make

    from gatekv.training import checkpoint
    from gatekv.training.loop import train

    if "deepspeed" in out:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a minute of compiling
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if several else [])
    options = json.loads(settings)
    module = make(sparsity=options.get("sparsity", "abs"), scope="layer", dtype=torch.float32)
    folder = Path(out)
    records = train(module, ToyData(), config(folder, batch_size=batch_size, max_steps=4, **options), accelerator)
    if accelerator.is_main_process:
        weights = torch.cat([p.detach().flatten() for p in checkpoint.trained(module).values()])
        result = {"losses": [r["loss"] for r in records], "sum": float(weights.double().abs().sum())}
        (folder / "result.json").write_text(json.dumps(result | {"world": accelerator.num_processes}))
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
