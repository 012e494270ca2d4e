"""Modules of others, which register policies when they are imported."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def import_plugins(names: Sequence[str]) -> list[ModuleType]:
    """Import what `--plugins` names: modules, or .py files. What is imported already is not run again.

    Raises:
        ValueError: no such module or file. What a plugin raises itself passes through.
    """
    return [_from_file(Path(name)) if name.endswith(".py") else _by_name(name) for name in names]


def _by_name(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the plugin is there, and asks for what is not
        raise ValueError(
            f"--plugins {name}: no such module can be imported: name a .py file, or install the package, or put its "
            "folder into PYTHONPATH."
        ) from error


def _from_file(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"--plugins {path} is no file: name a .py file that registers policies, or a module.")
    name = f"gatekv plugin {path}"  # no importable module's: a file called random.py is not to stand in for random
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
