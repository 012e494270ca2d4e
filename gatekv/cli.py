"""The `gatekv` command: runs a recipe by its name, in a checkout or where gatekv is installed.

    gatekv                        # the recipes, a line each
    gatekv evaluate --help        # the options of one
    gatekv generate --adapter smollm2-135m-gate --budget .25

Training on several processes goes through Accelerate: `accelerate launch -m gatekv.recipes.cpt …`.
"""

import ast
import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

from gatekv.config import check_choice
from gatekv.version import VERSION


def recipes() -> dict[str, str]:
    """Name of each recipe that runs -> the first sentence of its docstring."""
    spec = find_spec("gatekv.recipes")
    if spec is None or spec.origin is None:
        raise ImportError("gatekv.recipes is not installed: run pip install -e . in the checkout.")
    found = {}
    for path in sorted(Path(spec.origin).parent.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "\n    run(main)\n" in source:  # the others are parts of these
            found[path.stem] = " ".join((ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].split())
    return found


def main(argv: list[str] | None = None) -> None:
    """Run `gatekv NAME …`. Exits with the recipe's code; 1 for a name that does not exist."""
    words = sys.argv[1:] if argv is None else argv
    known = recipes()
    if not words or words[0] in ("-h", "--help"):
        print(f"{__doc__}\nRecipes:")
        for name, said in known.items():
            print(f"  {name:10} {said}")
        return
    if words[0] == "--version":
        print(VERSION)
        return
    name, *rest = words
    try:
        check_choice("recipe", name, known)
    except ValueError as error:
        sys.exit(f"error: {error}")
    from gatekv.recipes.common import run

    sys.argv = [f"gatekv {name}", *rest]
    run(importlib.import_module(f"gatekv.recipes.{name}").main)


if __name__ == "__main__":
    main()
