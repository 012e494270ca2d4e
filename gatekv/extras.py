"""Packages that only some uses need; what is missing is said with the command that installs it."""

from importlib.util import find_spec

EXTRAS = {"matplotlib": "plot", "datasets": "data", "lm_eval": "eval", "gguf": "demo", "sentencepiece": "demo"}
EXTRAS |= {"google.protobuf": "demo", "jieba": "eval", "rouge": "eval"}


def missing(*modules: str) -> list[str]:
    """Those of the modules that are not installed."""
    found = []
    for name in modules:
        try:
            found += [] if find_spec(name) else [name]
        except ModuleNotFoundError:  # of a package's part, where the package is missing
            found.append(name)
    return found


def need(*modules: str, what: str) -> None:
    """ImportError, with the cure, where one of the modules is missing. what: needs them, as in "pictures"."""
    if absent := missing(*modules):
        extra = ",".join(dict.fromkeys(EXTRAS[name] for name in absent))
        raise ImportError(f'{what} need {", ".join(absent)}: pip install "gatekv[{extra}]".')
