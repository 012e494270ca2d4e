"""Options of a recipe: a dataclass whose fields carry their help, read from a YAML file and the command line.

    @dataclass
    class Options(LoadOptions):
        n: int = option(100, "Scored answers per task.")

    options = load(argv, Options, __doc__)

The parser is transformers' `HfArgumentParser`. Fields stand in the help under the class that declares them, a subclass
may give a field another default alone, and a value in YAML is read exactly as it is on the command line.
"""

import argparse
import copy
import dataclasses
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from transformers import HfArgumentParser

from gatekv.config import check_keys, check_options, declared, nearest, option
from gatekv.hardware import AUTO, DTYPES

T = TypeVar("T")
SHOWN = 8  # choices that the help lists; of more an error lists them


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The recipe's docstring as it is written; each option under one name, its default behind its sentence."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", [], {}, argparse.SUPPRESS):
            return action.help
        shown = ", ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return f"{action.help} (default: {shown})".replace("%", "%%")


class OptionParser(HfArgumentParser):
    """HfArgumentParser that groups options by the class that declares them, and whose errors are one line.

    Raises:
        ValueError: instead of printing the usage and leaving the process.
    """

    def __init__(self, cls: type, doc: str | None = None, **kwargs: Any):
        super().__init__(cast(Any, cls), description=doc, formatter_class=_Formatter, allow_abbrev=False, **kwargs)
        places = [n for n, (_, field) in declared(cls).items() if field.metadata.get("positional")]
        self.usage = " ".join(["%(prog)s", *places, "[--option value] …"])
        self.add_argument("--config", metavar="FILE", help="YAML file of these options; the command line wins.")

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(re.sub(r"^argument (--\w+)(/--[\w-]+)*", r"\1", message))

    def _add_dataclass_arguments(self, dtype: type) -> None:
        kinds, own = typing.get_type_hints(dtype), {field.name: field for field in dataclasses.fields(dtype)}
        found = declared(dtype)
        for owner in dtype.__mro__:  # what is this recipe's alone comes first
            mine = {name: first for name, (declarer, first) in found.items() if declarer is owner}
            if mine:
                title = "this recipe" if owner is dtype else getattr(owner, "_argument_group_name", owner.__name__)
                group = self.add_argument_group(title)
                for name, first in mine.items():
                    _add(group, own[name], first.metadata, kinds[name])


def _add(group: Any, field: dataclasses.Field, said: Mapping[str, Any], kind: Any) -> None:
    """One field as an argument. said: the metadata of its first declaration."""
    known, bare = said.get("choices"), said.get("bare")
    shown = {"help": said.get("help", "")}
    if kind is not bool or field.default is not True:  # of True HfArgumentParser makes --name and --no_name
        shown["metavar"] = "|".join(known) if known and len(known) <= SHOWN else _metavar(kind)
    if said.get("positional"):
        many = {"nargs": "+"} if typing.get_origin(kind) is list else {}
        group.add_argument(field.name, help=shown["help"], **many)
        return
    if bare is not None:
        shown |= {"nargs": "?", "const": bare}
    bent: Any = dataclasses.field(default=field.default, default_factory=field.default_factory, metadata=shown)
    bent.name, bent.type = field.name, _reader(kind) or kind
    HfArgumentParser._parse_dataclass_field(group, bent)


def _metavar(kind: Any) -> str:
    names = {"str": "TEXT", "bool": "true|false", "dict": "JSON"}
    inner = [k for k in typing.get_args(kind) if k is not type(None)]
    if typing.get_origin(kind) is list:
        return f"{_metavar(inner[0])},…"
    name = getattr(inner[0] if inner else kind, "__name__", "VALUE")
    return names.get(name, name.upper())


def _reader(kind: Any) -> Callable[[str], Any] | None:
    """What argparse has no type for: lists stand with commas, dicts in JSON."""
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)

        def items(text: str) -> list:
            return [inner(part.strip()) for part in text.split(",") if part.strip()]

        items.__name__ = f"list of {inner.__name__}, with commas"
        return items
    return _json if kind is dict or typing.get_origin(kind) is dict else None


def _json(text: str) -> dict:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("not an object")
    return found


def as_arguments(settings: dict[str, Any]) -> list[str]:
    """What YAML says as words of a command line, so that both are read by the same rules."""
    words = []
    for name, value in settings.items():
        if value is None:
            text = ""
        elif isinstance(value, bool):
            text = str(value).lower()
        elif isinstance(value, list):
            text = ",".join(map(str, value))
        else:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
        words.append(f"--{name}={text}")
    return words


def load(
    argv: Sequence[str], cls: type[T], doc: str | None = None, defaults: Callable[[dict], dict] | None = None
) -> T:
    """Options of class `cls` from `--config FILE` and a command line, which wins. `--help` prints them and exits.

    Args:
        argv: words behind the recipe's name. doc: the recipe's docstring, shown above the options.
        defaults: called with the text of every option that was given; returns other defaults (a preset's).

    Raises:
        ValueError, TypeError: one line that names the option and the cure.
    """
    parser = OptionParser(cls, doc)
    known = declared(cls)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", nargs="?")
    path = first.parse_known_args(list(argv))[0].config
    named = [name for name, (_, field) in known.items() if not field.metadata.get("positional")]
    settings = _read_yaml(path, named) if path else {}
    bare = {name: field.metadata["bare"] for name, (_, field) in known.items() if field.metadata.get("bare")}
    settings |= {name: bare[name] for name, value in settings.items() if value is True and name in bare}
    words = [*as_arguments(settings), *_with_nearest(argv, known)]
    if defaults is not None:
        parser.set_defaults(**defaults(_given(words)))
    options, rest = parser.parse_args_into_dataclasses(words, return_remaining_strings=True, look_for_args_file=False)[
        ::2
    ]
    if rest:
        raise TypeError(f"expected --key value, got {rest[0]!r}.{nearest(rest[0], known)}")
    check_options(options)
    return options


def _given(words: Sequence[str]) -> dict[str, str]:
    """Option name -> text, of words in which values stand behind a space or an equals sign."""
    found = {}
    for word, following in zip(words, [*words[1:], ""]):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name.replace("-", "_")] = value if equals else following
    return found


def _with_nearest(argv: Sequence[str], known: dict) -> list[str]:
    """argv, or TypeError for an option that does not exist, with the nearest that does."""
    switches = [f"no_{name}" for name, (_, field) in known.items() if field.default is True]
    for word in argv:
        if word.startswith("--") and word not in ("--help", "--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            check_keys("the command line", [name], [*known, *switches, "config"])
    return list(argv)


def _bundled(name: str) -> list[Path]:
    """Where a config that comes with the recipes may lie: paper, sft/boolq, or with .yaml behind it."""
    spec = find_spec("gatekv.recipes")
    folders = [Path(place) / "configs" for place in spec.submodule_search_locations or ()] if spec else []
    return [folder / f"{name.removesuffix('.yaml')}.yaml" for folder in folders]


def _read_yaml(path: str, known: Sequence[str]) -> dict[str, Any]:
    file = next((f for f in (Path(path), *_bundled(path)) if f.is_file()), None)
    if file is None:
        raise ValueError(f"--config {path}: no such file.")
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--config {path} holds a {type(settings).__name__}, not options: write `name: value` lines.")
    check_keys(path, settings, known)
    return settings


@dataclass
class HardwareOptions:
    """Where a model runs."""

    _argument_group_name = "hardware"

    device: str = option(AUTO, "Where to run; auto takes an accelerator where there is one, else the CPU.")
    dtype: str = option(
        AUTO, "Of the frozen model; auto takes bfloat16 where it is fast, else float32.", choices=(AUTO, *DTYPES)
    )
    threads: int = option(0, "Of the CPU, for this process; 0 takes its share of the machine's cores.")


@dataclass
class LoadOptions(HardwareOptions):
    """What the recipes that use a model have in common."""

    _argument_group_name = "model"

    adapter: str = option("", "Folder, Hub name, or bundled name (smollm2-135m-gate, …-rate) of a gatekv adapter.")
    model: str = option("", "Base model, folder or Hub name; left out: the adapter's, or the embedded SmolLM2-135M.")
    device_map: str = option("", "As transformers has it, for a model on several devices: auto, balanced, …")
    plugins: list[str] = option([], "Modules or .py files that register policies of your own when imported.")

    def __post_init__(self) -> None:
        if self.plugins:  # before any policy is looked up by its name
            from gatekv.policies.plugins import import_plugins

            import_plugins(self.plugins)
