"""The house keeps its own rules: sizes, arrows, public names, no machine's paths, a README that is true."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gatekv

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(ROOT.glob("gatekv/**/*.py"))
# From the top down: a file may import only from its own level or lower ones.
LEVELS = [
    ["cli", "__main__"],
    ["report", "evaluation", "training", "integrations"],
    ["adapter"],
    ["lora"],
    ["generation"],
    ["cache"],
    ["modules", "fingerprint", "adapter_file"],
    ["passes", "recompute"],
    ["attention"],
    ["masks"],
    ["policies", "presets", "prompts", "questions", "fetch", "options"],
    ["cache.segments"],  # memory that answers: a width's or a remainder's file names the one that it needs
    ["gates", "less"],
    [
        "parts",
        "ops",
        "config",
        "facts",
        "support",
        "version",
        "bases",
        "hardware",
        "bundled",
        "extras",
        "textfiles",
        "precision",
        "rotary",
        "geometry",
        "latent",
    ],
]


def level(module: str) -> int:
    """Of a dotted name inside gatekv: the most of it that LEVELS knows."""
    parts = module.split(".")
    known = next(name for n in (2, 1) if (name := ".".join(parts[:n])) in {m for names in LEVELS for m in names})
    return next(i for i, names in enumerate(LEVELS) if known in names)


@pytest.mark.parametrize("path", [f for f in FILES if f.name != "__init__.py" or f.parent.name != "gatekv"], ids=str)
def test_arrows_go_down_and_layers_stay_free_of_their_guests(path):
    mine = ".".join(path.relative_to(ROOT / "gatekv").with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            parts = name.split(".")
            if parts[0] == "gatekv" and parts[1:2] != ["recipes"]:
                targets = [".".join(parts[1:])] if len(parts) > 1 else [a.name for a in node.names]
                for target in targets:
                    assert level(target) >= level(mine), f"{path.name} imports {name} from above"
            if parts[0] == "peft":
                assert level(mine) <= level("lora"), f"{path.name} imports peft below the adapter"
            if parts[0] == "accelerate":
                assert level(mine) <= level("training"), f"{path.name} imports accelerate below training"


def test_sizes():
    sizes = sorted(len(f.read_text().splitlines()) for f in FILES)
    assert sizes[-1] <= 600 and sizes[len(sizes) // 2] <= 150
    for recipe in ROOT.glob("recipes/*.py"):
        assert len(recipe.read_text().splitlines()) <= 200, recipe
    for policy in ROOT.glob("gatekv/policies/*.py"):
        assert len(policy.read_text().splitlines()) <= 150, policy


def test_public_names():
    assert len(gatekv.__all__) <= 15
    for name in gatekv.__all__:
        assert getattr(gatekv, name).__doc__, f"{name} has no docstring"


def test_public_functions_and_classes_have_docstrings():
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) is not None or not tree.body, path
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_no_pickle_and_no_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in tracked:
        if name.endswith((".py", ".toml", ".txt", ".yaml", "Makefile", "run")) and not name.startswith("gatekv/assets"):
            text = (ROOT / name).read_text()
            assert not re.search(r"(?<![\w.])/(work|root|home|tmp)/", text), name
            assert not re.search(r"(pickle|torch)\.load\(", text), name


def test_the_annotated_tree_is_true():
    tree = (
        (ROOT / "docs" / "architecture.md").read_text().split("<!-- tree -->")[1].split("```")[1].removeprefix("text")
    )
    stack, named = [], set()
    for line in tree.strip().splitlines():
        match = re.match(r"^( *)([\w./-]+)(?: |$)", line)
        if not match:
            continue
        depth = len(match[1]) // 2
        stack = [*stack[:depth], match[2].rstrip("/")]
        path = ROOT.joinpath(*stack)
        assert path.exists(), f"the tree in docs/architecture.md names {path.relative_to(ROOT)}, which does not exist"
        named.add(path)
    for path in [
        *ROOT.glob("gatekv/*.py"),
        *ROOT.glob("recipes/*.py"),
        *(p.parent for p in ROOT.glob("gatekv/*/__init__.py")),
    ]:
        assert path in named or path.name in ("__init__.py", "py.typed"), (
            f"the tree in docs/architecture.md leaves out {path.relative_to(ROOT)}"
        )


def test_the_method_tables_list_every_policy_and_its_file():
    page = (ROOT / "docs" / "methods.md").read_text()
    names = (
        gatekv.policies.SCORERS,
        gatekv.policies.BUDGETS,
        gatekv.policies.LAYERS,
        gatekv.policies.WIDTHS,
        gatekv.policies.REMAINDERS,
    )
    for name in (n for known in names for n in known):
        assert f"`{name}`" in page, name
    for file in re.findall(r"`(gatekv/[\w./]+)`", page):
        assert (ROOT / file).exists(), f"docs/methods.md names {file}, which does not exist"


def test_readme_is_one_page_that_opens_with_a_picture_and_ten_lines_that_run():
    lines = (ROOT / "README.md").read_text().splitlines()
    picture = next(i for i, line in enumerate(lines) if line.startswith("!["))
    assert picture < 15 and (ROOT / re.search(r"\((.*?)\)", lines[picture])[1]).is_file()
    start = next(i for i, line in enumerate(lines) if line == "```python")
    end = lines.index("```", start)
    assert end - start - 1 <= 10 and start < 30 and len(lines) <= 150


def test_every_package_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {".".join(f.parent.relative_to(ROOT).parts) for f in ROOT.glob("gatekv/**/__init__.py")}
    assert set(settings["packages"]) == folders | {"gatekv.recipes"}
    assert settings["package-dir"] == {"gatekv.recipes": "recipes"}


@pytest.mark.exhaustive
def test_tests_have_the_same_names_in_every_process():
    """Workers collect at different seconds and with different hash seeds; a name that differs stops the whole run."""

    def names(seed: int) -> list[str]:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests"]
        ran = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": str(seed)}
        )
        assert ran.returncode == 0, ran.stdout[-2000:]
        return [line for line in ran.stdout.splitlines() if "::" in line]

    first, second = names(1), names(2)
    assert first == second and len(first) > 1000
