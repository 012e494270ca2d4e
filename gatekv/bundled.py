"""What comes with the package: text to train and evaluate on, a small task, a trained adapter."""

from pathlib import Path

ASSETS = Path(__file__).resolve().parent / "assets"
TRAIN = ASSETS / "sample" / "train"  # text files that the default recipe reads
HELDOUT = ASSETS / "sample" / "heldout"  # whole sources that no bundled gate was trained on
TASK = ASSETS / "sample" / "sft.jsonl"  # who of four people owns a thing
# The first was trained for eviction, the second to be read in few bits (`rate`).
ADAPTERS = {name: ASSETS / name for name in ("smollm2-135m-gate", "smollm2-135m-rate")}


def adapter_path(name: str) -> str:
    """The folder of an adapter that comes with the package; any other name, folder or Hub repository, as it is.

    `AutoPeftModelForCausalLM.from_pretrained(gatekv.adapter_path("smollm2-135m-gate"))`
    """
    return str(ADAPTERS[name]) if name in ADAPTERS and not Path(name).is_dir() else name
