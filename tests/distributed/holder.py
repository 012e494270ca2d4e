"""Run by `accelerate launch` in test_dry_run: takes one step and writes what this process then holds, in bytes."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "unit")]

import json

import torch
from accelerate import Accelerator, InitProcessGroupKwargs


def main(out: str) -> None:
    from test_dry_run import held
    from test_training import ToyData, make

    from gatekv.training import checkpoint
    from gatekv.training.dry_run import memory, plan_of

    accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    module = make()
    said = memory(module, plan_of("auto"))
    learning = list(checkpoint.trained(module).values())
    wrapped, optimizer = accelerator.prepare(module, torch.optim.AdamW(learning))
    batch = ToyData().batch(accelerator.process_index, 1)
    for _ in range(2):  # DDP lays its buckets out anew after the first
        optimizer.zero_grad()
        accelerator.backward(wrapped(batch, 0.5)["loss"])
    optimizer.step()
    frozen = [p for p in module.parameters() if not p.requires_grad] + list(module.buffers())
    found = {
        "frozen": held(frozen),
        "trained": held(learning),
        "gradients": held(p.grad for p in learning),
        "optimizer": held(v for state in optimizer.optimizer.state.values() for v in state.values()),
        "buckets": sum(int(n) for n in wrapped._get_ddp_logging_data()["bucket_sizes"].split(",")),
    }
    if accelerator.is_main_process:
        Path(out).write_text(json.dumps({"said": vars(said), "found": found}))
    del wrapped
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
