"""The adapter's model card: front matter for the Hub, how to load it, what was measured."""

import json
from pathlib import Path

TEMPLATE = """---
base_model: {model}
library_name: peft
license: apache-2.0
tags: [gatekv, kv-cache, attention-gate]
---
# A gatekv adapter for {model}

Small gates that decide which tokens stay in the KV cache. The base model is frozen and unchanged.

```python
import gatekv
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{folder}")
cache = gatekv.KVCache(model, policy="gate+global", budget=0.25)
model.generate(**inputs, past_key_values=cache)
```

## Training
```json
{settings}
```
{results}"""


def results_table(rows: list[dict]) -> str:
    """A Markdown table of results.json rows."""
    lines = ["| task | mode | policy | budget | bytes held | score | KL |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        if r["score"] is None:
            lines.append(f"| {r['task']} | {r['mode']} | {r['policy']} | {r['budget']} | – | refused | |")
            continue
        kl = "" if r["kl"] is None else f"{r['kl']:.4f}"
        lines.append(
            f"| {r['task']} | {r['mode']} | {r['policy']} | {r['budget']} | {r['bytes_ratio']:.3f} "
            f"| {r['score']:.3f} | {kl} |"
        )
    return "\n".join(lines)


def write_card(folder: Path, settings: dict) -> None:
    """README.md of an adapter folder; includes results.json if it lies there."""
    results = ""
    if (folder / "results.json").is_file():
        rows = json.loads((folder / "results.json").read_text())["rows"]
        results = "\n## Measured\n![frontier](frontier.png)\n\n" + results_table(rows) + "\n"
    model = settings["model"] or "HuggingFaceTB/SmolLM2-135M-Instruct"
    text = TEMPLATE.format(model=model, folder=folder.name, settings=json.dumps(settings, indent=1), results=results)
    (folder / "README.md").write_text(text)
