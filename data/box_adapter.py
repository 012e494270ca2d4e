"""Put a trained adapter into the package: half precision, its card, how it was trained, what was measured.

    python data/box_adapter.py checkpoints/demo smollm2-135m-gate

Writes gatekv/assets/NAME/: adapter_config.json, adapter_model.safetensors (float16), README.md, training.json, and
results.json where the adapter has been evaluated. Checkpoints, pictures and tokenizer files stay behind.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from gatekv.bundled import ASSETS  # noqa: E402
from gatekv.fingerprint import tensors_sha256  # noqa: E402
from gatekv.training.card import WEIGHTS, write_card  # noqa: E402

LIMIT = 6e6  # bytes: what a package may carry for an example


def box(source: Path, target: Path) -> None:
    """Copy the adapter in `source` to `target`, its weights in float16. ValueError where it is too large."""
    tensors = {name: t.to(torch.float16).contiguous() for name, t in load_file(source / WEIGHTS).items()}
    if not all(t.isfinite().all() for t in tensors.values()):
        raise ValueError(f"{source} has weights that float16 cannot hold.")
    size = sum(t.nbytes for t in tensors.values())
    if size > LIMIT:
        raise ValueError(
            f"{source} takes {size / 1e6:.1f} MB in float16, more than {LIMIT / 1e6:.0f}: train a smaller gate."
        )
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((source / "adapter_config.json").read_text())
    config["weights_sha256"] = tensors_sha256(tensors)
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("training.json", "results.json"):
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
    write_card(target)
    print(f"{target}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    box(Path(sys.argv[1]), ASSETS / sys.argv[2])
