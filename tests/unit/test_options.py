"""Options: one dataclass gives the command line, YAML, the help and the checks."""

import importlib
import json
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from gatekv import cli
from gatekv.config import option
from gatekv.options import LoadOptions, load
from gatekv.training.config import CPTConfig
from gatekv.training.options import load_config
from gatekv.training.sft_config import SFTConfig


@dataclass
class Mine(LoadOptions):
    """Of this test."""

    what: str = option("", "A word.", choices=("red", "green"), positional=True)
    sizes: list[int] = option([1, 2], "Numbers.")
    share: float | None = option(None, "A share.")
    fields: dict = option({}, "Columns.")
    deep: bool = option(True, "On unless switched off.")
    again: str = option("", "Go on.", bare="auto")
    dtype: str = "float32"


def test_each_kind_of_value_is_read():
    words = ["red", "--sizes", "3,4", "--share=.5", "--fields", '{"a": 1}', "--no_deep", "--again", "--adapter", "x"]
    found = load(words, Mine)
    assert (found.what, found.sizes, found.share, found.fields) == ("red", [3, 4], 0.5, {"a": 1})
    assert (found.deep, found.again, found.adapter, found.dtype) == (False, "auto", "x", "float32")
    assert load(["green", "--deep", "false", "--again", "folder"], Mine).again == "folder"
    assert load(["green"], Mine) == Mine(what="green") and load(["green"], Mine).sizes is not Mine(what="red").sizes


def test_a_file_is_read_by_the_same_rules_and_the_command_line_wins(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("sizes: [5, 6]\nshare: 1e-3\nfields: {a: '{x}'}\ndeep: false\nagain: true\ndtype: bfloat16\n")
    found = load(["red", "--config", str(file), "--dtype", "float16"], Mine)
    assert (found.sizes, found.share, found.fields, found.deep) == ([5, 6], 1e-3, {"a": "{x}"}, False)
    assert (found.again, found.dtype) == ("auto", "float16")
    for text, match in (
        ("size: 1", "c.yaml.*Did you mean 'sizes'"), ("[1, 2]", "holds a list, not options"), ("a: [", "is not YAML"),
        ("share: lots", "--share: invalid float value: 'lots'"), ("what: blue", "unknown key 'what'"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises((TypeError, ValueError), match=match) as error:
            load(["red", "--config", str(file)], Mine)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("words,match", [
    (["red", "--size", "3"], "unknown key 'size' in the command line. Did you mean 'sizes'"),
    (["red", "--sizes", "3,x"], "--sizes: invalid list of int, with commas value: '3,x'"),
    (["red", "--share", "x"], "--share: invalid float value: 'x'"), (["red", "--share"], "--share: expected one argument"),
    (["blue"], "unknown what 'blue'"), (["red", "green"], "expected --key value, got 'green'"), ([], "required: what"),
    (["red", "--fields", "[1]"], "--fields: invalid"), (["red", "--dtype", "float17"], "Did you mean 'float16'"),
    (["red", "--config", "nowhere.yaml"], "nowhere.yaml: no such file"), (["red", "--no_share"], "unknown key 'no_share'"),
])  # fmt: skip
def test_errors_are_one_line_that_names_the_option(words, match):
    with pytest.raises((TypeError, ValueError), match=match) as error:
        load(words, Mine)
    assert "\n" not in str(error.value)


def test_configs_of_the_recipes_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("paper", "paper.yaml"):
        assert load_config(["--config", name], CPTConfig).preset == "attention-gate"
    assert load_config(["--config", "sft/boolq"], SFTConfig).data == ["google/boolq"]


def test_help_has_groups_types_defaults_and_a_sentence_each(capsys):
    with pytest.raises(SystemExit) as stop:
        load(["--help"], Mine, "What this recipe does.")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.index("What this recipe does.") < text.index("this recipe:")
    assert text.index("this recipe:") < text.index("model:") < text.index("hardware:")
    assert "--sizes INT,…" in text and "Numbers. (default: 1, 2)" in text and "--share FLOAT" in text
    assert "--dtype auto|bfloat16" in text and "(default: float32)" in text, "a subclass's default, its parent's words"


def test_a_preset_changes_defaults_and_nothing_that_was_given():
    def defaults(given):
        assert given["sizes"] == "9"
        return {"share": 0.25, "sizes": [7]}

    found = load(["red", "--sizes", "9"], Mine, defaults=defaults)
    assert (found.share, found.sizes) == (0.25, [9])


def test_every_recipe_says_what_its_options_are(capsys, monkeypatch):
    for name in cli.recipes():
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(f"gatekv.recipes.{name}").main(["--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0 and "this recipe:" in text, name
        assert "(default" in text or name == "fetch", name


def test_the_command_lists_recipes_and_names_the_nearest(capsys, monkeypatch):
    cli.main([])
    text = capsys.readouterr().out
    assert {"cpt", "evaluate", "generate", "fetch", "demo"} <= set(cli.recipes()) and "  evaluate " in text
    assert "peer_kvpress" not in text and "measure " not in text, "parts of a recipe are no recipes"
    with pytest.raises(SystemExit, match="Did you mean 'evaluate'"):
        cli.main(["evalute"])
    cli.main(["--version"])
    ran = []
    modules = SimpleNamespace(import_module=lambda name: SimpleNamespace(main=ran.append))
    monkeypatch.setattr(cli, "importlib", modules)
    cli.main(["evaluate", "--n", "2"])
    assert ran == [["--n", "2"]]


def test_options_can_be_written_as_json():
    assert json.loads(json.dumps(vars(load(["red"], Mine))))["what"] == "red"


def test_plugins_are_imported_before_a_policy_is_looked_up(tmp_path, monkeypatch):
    from gatekv.policies import SCORERS
    from gatekv.policies.plugins import import_plugins

    text = (
        "from gatekv.policies import KeyDiff, register_policy\n"
        "class Mine(KeyDiff):\n    'A scorer.'\n"
        "register_policy(NAME, Mine)\n"
    )
    (tmp_path / "random.py").write_text("NAME = 'by_file'\n" + text)
    (tmp_path / "by_module_of_mine.py").write_text("NAME = 'by_module'\n" + text)
    (tmp_path / "broken_plugin_of_mine.py").write_text("import no_such_package_of_mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        words = ["--plugins", f"{tmp_path / 'random.py'},by_module_of_mine"]
        for _ in range(2):  # a second time nothing is run again, and no name is taken
            assert load(words, LoadOptions).plugins == words[1].split(",")
        assert {"by_file", "by_module"} <= set(SCORERS) and sys.modules["random"].Random
    finally:
        SCORERS.pop("by_file", None), SCORERS.pop("by_module", None)
        for name in ("by_module_of_mine", f"gatekv plugin {(tmp_path / 'random.py').resolve()}"):
            sys.modules.pop(name, None)
    for name, match in (("no_such_plugin", "no such module can be imported"), ("no/such.py", "is no file: name a .py")):
        with pytest.raises(ValueError, match=f"--plugins .*{name.split('/')[0]}.*{match}"):
            import_plugins([name])
    for name in ("broken_plugin_of_mine", str(tmp_path / "broken_plugin_of_mine.py")):
        with pytest.raises(ModuleNotFoundError, match="no_such_package_of_mine"):
            import_plugins([name])
