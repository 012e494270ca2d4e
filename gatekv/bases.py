"""What the base of an adapter is called, so that others find the same weights.

The demo's base has two names: the Hub's, which adapters bear, and a folder of this user's cache. So an adapter that was
trained on the folder can be loaded by anyone, and here without a network.
"""

from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_ASSETS_CACHE
from huggingface_hub.errors import HFValidationError

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Where `gatekv fetch` puts it: what huggingface_hub.cached_assets_path names, which makes folders as it is asked.
FOLDER = Path(HF_ASSETS_CACHE) / "gatekv" / "bases" / "SmolLM2-135M-Instruct"


def public_name(base: str | None) -> str | None:
    """The name by which others find a base: the Hub's for the embedded model's folder, else what it is called here."""
    here = base and Path(base).is_dir() and FOLDER.is_dir() and FOLDER.samefile(base)
    return HUB_NAME if here else base


def local_name(base: str | None, revision: str | None) -> str | None:
    """The embedded model's folder, where that is meant and was fetched; else `base`.

    revision: of the Hub's repository; an adapter that has one was trained on those very weights, not on the folder's.
    """
    return str(FOLDER) if base == HUB_NAME and revision is None and FOLDER.is_dir() else base


def commit_of(base: str | None) -> str | None:
    """The commit of a Hub repository's main branch that a model was just loaded from; None for a folder."""
    if not base or Path(base).is_dir():
        return None
    try:
        config = try_to_load_from_cache(base, "config.json")
    except HFValidationError:  # a folder that is gone
        return None
    return Path(config).parent.name if isinstance(config, str) else None
