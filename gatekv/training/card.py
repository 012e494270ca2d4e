"""The adapter's model card: what its files say, put together; front matter that the Hub accepts.

Sources: adapter_config.json (what it is), training.json (how it came about), results.json (what was measured).
"""

import json
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData

from gatekv.bases import HUB_NAME
from gatekv.bundled import ADAPTERS
from gatekv.evaluation.names import learned
from gatekv.training.options import FREE

WEIGHTS = "adapter_model.safetensors"
UNITS = {"ppl": "nats per token"}  # of a task's score; the others are shares of 1

GATE = """Small gates ({gate}) in every full-attention layer flag tokens of the KV cache for eviction: what they flag
leaves memory. The last {window} tokens and the first {sinks} always stay. Any budget works: thresholds are calibrated,
and one-shot policies such as `gate+global` rank the gates' logits."""

MAPS = """Low-rank maps ({form}, rank {rank}) for what a cache evicts: evicted tokens are poured into a state of
constant size, {rank} · ({times} D + 1) numbers per KV head of width D, which all later tokens still query. They decide
nothing themselves: a policy evicts, and `+less` behind its name keeps the rest. These were trained for `{policy}` at
budget {budget:g}. Under another policy or budget they work too, with a warning: measure there before relying on it."""

LORA = """LoRA of rank {r} on {targets}, tuned under the same cache. It is part of this adapter: loaded, switched off
and deleted with it; `model.merge_lora()` folds it into the base."""

LIMITS = """- Trained on one base ({base}), on rows of up to {length} tokens of {text}: other lengths, languages and
  tasks have to be measured.
- What is evicted is gone{state}: verbatim quotation suffers first as the budget falls.
- Scores are of the tasks and texts named above, with their sample sizes. The base's own faults are still there."""


def results_table(rows: list[dict]) -> str:
    """A Markdown table of results.json rows."""
    lines = ["| task | mode | policy | budget | bytes held | score | KL | n |", "|---|---|---|---|---|---|---|---|"]
    for r in rows:
        head = f"| {r['task']} | {r['mode']} | {r['policy']} | {r['budget']:g} |"
        if r["score"] is None:
            lines.append(f"{head} – | refused | | |")
            continue
        kl = "" if r["kl"] is None else f"{r['kl']:.4f}"
        lines.append(f"{head} {r['bytes_ratio']:.3f} | {r['score']:.3f} | {kl} | {r['n']} |")
    return "\n".join(lines)


def _called(name: str) -> str:
    """The argument with which an adapter's folder of that name is loaded."""
    return f'gatekv.adapter_path("{name}")' if name in ADAPTERS else f'"{name}"'


def _sets(sources: list[str]) -> list[str]:
    """Names on the Hub among a run's data sources ("name:configuration:column=weight", files, folders)."""
    names = [source.partition("=")[0].partition(":")[0] for source in sources]
    return [n for n in names if n.count("/") == 1 and not n.startswith((".", "/")) and not Path(n).exists()]


def _measured(rows: list[dict]) -> list[EvalResult]:
    """The adapter's own rows, as the Hub's model index has them."""
    found = []
    for r in rows:
        if r["score"] is None or not learned(r):
            continue
        where = {"mode": r["mode"], "policy": r["policy"], "budget": r["budget"], "bytes_ratio": r["bytes_ratio"]}
        name = f"{r['task']}, {r['mode']}, {r['policy']} at {r['budget']:g}"
        values = {"score": r["score"]} if r["kl"] is None else {"score": r["score"], "kl": r["kl"]}
        for metric, value in values.items():
            unit = "KL to the full cache" if metric == "kl" else UNITS.get(r["task"], "score")
            found.append(
                EvalResult(
                    task_type="text-generation", dataset_type=f"gatekv-{r['task']}", dataset_name=name,
                    metric_type=metric, metric_value=value, metric_name=unit, dataset_args=where,
                )
            )  # fmt: skip
    return found


def card(folder: Path) -> str:
    """The text of an adapter folder's card; results.json may be missing."""
    read = lambda name: json.loads((folder / name).read_text())  # noqa: E731
    spec, training = read("adapter_config.json"), read("training.json")
    results = read("results.json") if (folder / "results.json").is_file() else {"rows": []}
    settings, rows = training["config"], results["rows"]
    base, gate, maps = spec["base_model_name_or_path"], spec["gate"] != "none", bool(spec["less_rank"])
    shared = base is not None and not Path(base).is_dir()
    sets, own = _sets(settings["data"]), _measured(rows)
    tags = ["gatekv", "kv-cache", *(["attention-gate"] if gate else []), *(["less"] if maps else [])]
    tags += ["lora"] if spec.get("lora") else []
    data = ModelCardData(
        base_model=base if shared else None,
        datasets=sets or None,
        license="apache-2.0" if base == HUB_NAME else "other",
        library_name="peft",
        pipeline_tag="text-generation",
        tags=tags,
        model_name=folder.resolve().name,
        eval_results=own or None,
    )
    policy, budget = ("gate+global", 0.25) if gate else ("snapkv+ada", 0.25)
    if maps:
        policy = f"{policy if gate else spec['less_policy']}+less"
        budget = budget if gate else spec["less_budget"]
    kept = {k: v for k, v in sorted(settings.items()) if k not in FREE or k in ("batch_size", "accumulation")}
    pinned = f", revision {spec['revision']}" if spec["revision"] else ""
    size = (folder / WEIGHTS).stat().st_size
    parts = [f"---\n{data.to_yaml()}\n---", f"# A gatekv adapter for {base}"]
    if gate:
        parts.append(GATE.format(**{name: spec[name] for name in ("gate", "window", "sinks")}))
    if maps:
        times = 2 if spec["less_form"] == "centroids" else 1
        trained = {"policy": spec["less_policy"], "budget": spec["less_budget"]}
        parts.append(MAPS.format(form=spec["less_form"], rank=spec["less_rank"], times=times, **trained))
    if spec.get("lora"):
        targets = spec["lora"]["target_modules"]
        targets = targets if isinstance(targets, str) else ", ".join(targets)
        parts.append(LORA.format(r=spec["lora"]["r"], targets=targets))
    parts.append(
        f"The base, {base}{pinned}, is frozen and unchanged. The adapter takes {size:,} bytes."
        + ("" if shared else " It was loaded from a folder: name your copy when you load the adapter.")
    )
    parts.append(
        "```python\nimport gatekv\nfrom peft import AutoPeftModelForCausalLM\n\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({_called(folder.name)})\n"
        f'cache = gatekv.KVCache(model, policy="{policy}", budget={budget})\n'
        "model.generate(**inputs, past_key_values=cache)\n```"
    )
    if rows:
        picture = "![frontier](frontier.png)\n\n" if (folder / "frontier.png").is_file() else ""
        run = results["run"]
        versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
        parts.append(f"## Measured\n\n{picture}{results_table(rows)}")
        parts.append(f"```bash\n{run['command']}\n```\n\nWith {versions}; commit {run['commit']}.")
    recipe = training.get("recipe", "cpt.py" if gate else "less.py")  # logs before 2026-11-22 do not say
    parts.append(
        f"## Trained\n\nTo keep {settings['target_keep']:g} of the tokens, in {training['seconds'] / 60:.1f} minutes:"
        f"\n\n```bash\naccelerate launch recipes/{recipe} --config settings.yaml\n```\n\nwith this in "
        f"settings.yaml:\n\n```yaml\n{yaml.safe_dump(kept, sort_keys=True, width=110)}```"
    )
    state, text = " but for the maps' state" if maps else "", ", ".join(sets) or "English prose and code"
    where = {"base": base, "length": settings["sequence_length"], "text": text, "state": state}
    parts.append("## Limits\n\n" + LIMITS.format(**where))
    return "\n\n".join(parts) + "\n"


def write_card(folder: Path) -> None:
    """Write README.md of an adapter folder."""
    (folder / "README.md").write_text(card(folder))
