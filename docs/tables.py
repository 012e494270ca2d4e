"""Write the generated tables into the pages, from the committed results and from the library itself.

    python docs/tables.py            # renews every table between <!-- table: NAME --> and <!-- /table -->
    python docs/tables.py --check    # names the pages that are stale, and exits with 1

The numbers come from results.json in docs, docs/bits and docs/ablation, and from docs/sft/*.json; the tables of models
come from tests/fixtures/models.json, which `python tests/record_models.py` writes; the examples are docs/examples/*.py.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- /table -->)", re.S)

SHORT = {
    "gate+global": "trained gate (`gate+global`)",
    "gate+global+qaq": "the same, kept tokens in few bits (`gate+global+qaq`)",
    "h2o+qaq": "best training-free: few bits too (`h2o+qaq`)",
    "h2o": "best KL of the training-free that only evict (`h2o`)",
    "snapkv+ada": "Ada-SnapKV (`snapkv+ada`)",
}
TASKS = {
    ("recall", "agnostic"): "32 tokens word for word (`recall`), unseen",
    ("ruler", "agnostic"): "RULER families (`ruler`), unseen",
    ("classification", "agnostic"): "who of four (`classification`), unseen",
    ("passkey", "agnostic"): "passkey (`passkey`), unseen",
    ("niah_multikey", "aware"): "four facts, one asked (`niah_multikey`), in the context",
    ("recall", "aware"): "32 tokens word for word (`recall`), in the context",
    ("ruler", "aware"): "RULER families (`ruler`), in the context",
    ("classification", "aware"): "who of four (`classification`), in the context",
    ("passkey", "aware"): "passkey (`passkey`), in the context",
}


def read(name: str):
    return json.loads((ROOT / "docs" / name).read_text())


def frontier(render: Callable[[list[dict]], str], name: str = "results.json") -> str:
    from gatekv.report.tables import provenance

    results = read(name)
    return f"{render(results['rows']).strip()}\n\n{provenance(results['run'])}"


def fine_tuning(budget: float) -> str:
    from gatekv.report.tables import provenance, runs_table

    tasks = {name: read(f"sft/{name}.json") for name in ("squad", "family", "haystack", "syllogism")}
    run = tasks["squad"].get("run", {})
    return runs_table({n: t["rows"] for n, t in tasks.items()}, budget) + "\n" + provenance(run)


def ablation() -> str:
    from gatekv.report.tables import ablation_table, provenance

    results = read("ablation/results.json")
    return ablation_table(results, [0.25, 0.125]) + "\n\n" + provenance({})


def arguments_refused() -> str:
    """Arguments with which a model's attention layer says that it computes something else."""
    from gatekv.support import UNKNOWN_TO_THE_LAW

    lines = ["| argument | what such a layer does |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {what} |" for name, what in UNKNOWN_TO_THE_LAW.items())]) + "\n"


def options_of(module: str, name: str, *without: str) -> str:
    """The options of a dataclass: name, default and what `--help` says. without: classes whose options are left out."""
    from gatekv.config import declared

    cls = getattr(import_module(module), name)
    own = {field.name: field for field in dataclasses.fields(cls)}
    lines = ["| option | default | what |", "|---|---|---|"]
    for option, (owner, first) in declared(cls).items():
        if owner.__name__ in without or not first.metadata.get("help"):
            continue
        field = own[option]
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        shown = f"`{default}`" if default not in ("", [], {}, None) else ""
        choices = first.metadata.get("choices") or ()
        known = f" One of {', '.join(f'`{c}`' for c in choices)}." if 0 < len(choices) <= 8 else ""
        lines.append(f"| `{option}` | {shown} | {first.metadata['help']}{known} |")
    return "\n".join(lines) + "\n"


def example(path: Path) -> str:
    """A file of docs/examples, as it is."""
    return f'```python title="{path.relative_to(ROOT)}"\n{path.read_text(encoding="utf-8")}```\n'


def tables() -> dict[str, Callable[[], str]]:
    """Name -> what makes the Markdown of that table."""
    import models_page

    from gatekv.report import tables as sections
    from gatekv.report.tables import best_of, summary

    budgets, few = [0.5, 0.25, 0.125, 0.0625], [0.25, 0.125, 0.0625, 0.03125]
    quoted = {f"example-{path.stem}": partial(example, path) for path in sorted((ROOT / "docs/examples").glob("*.py"))}
    made = {
        "frontier-short": lambda: frontier(lambda rows: summary(rows, [0.25, 0.125], SHORT)),
        "frontier-summary": lambda: frontier(lambda rows: summary(rows, budgets)),
        "frontier-tasks": lambda: frontier(lambda rows: best_of(rows, TASKS, "gate+global", [0.25, 0.125])),
        "bits-summary": lambda: frontier(lambda rows: summary(rows, few), "bits/results.json"),
        "frontier-all": lambda: frontier(sections),
        "fine-tuning-372": lambda: fine_tuning(0.372),
        "fine-tuning-200": lambda: fine_tuning(0.2),
        "ablation": ablation,
        "models-short": models_page.short,
        "models-counts": models_page.counts,
        "models-causal": lambda: models_page.served("causal"),
        "models-image": lambda: models_page.served("image"),
        "models-untrained": models_page.untrained,
        "models-gaps": models_page.gaps,
        "models-refused": models_page.refused,
        "models-not-tried": models_page.not_tried,
        "arguments-refused": arguments_refused,
        "gate-options": lambda: options_of("gatekv.config", "GateSpec"),
        "cpt-options": lambda: options_of("gatekv.training.config", "CPTConfig", "GateSpec"),
    }
    return made | quoted


def pages() -> list[Path]:
    """Every page that has a table."""
    found = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if MARKED.search(page.read_text(encoding="utf-8"))]


def renewed(page: Path) -> str:
    """The page's text with its tables as they should be.

    Raises:
        ValueError: a page names a table that there is not.
    """
    known = tables()

    def table(match: re.Match) -> str:
        if match[2] not in known:
            raise ValueError(f"{page.name} names the table {match[2]!r}; there are {', '.join(known)}.")
        return f"{match[1]}\n{known[match[2]]().strip()}\n\n{match[3]}"

    return MARKED.sub(table, page.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a page is stale")
    check = parser.parse_args().check
    stale = [(page, text) for page in pages() if (text := renewed(page)) != page.read_text(encoding="utf-8")]
    for page, text in stale:
        print(f"{'stale' if check else 'renewed'}: {page.relative_to(ROOT)}")
        if not check:
            page.write_text(text, encoding="utf-8")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main())
