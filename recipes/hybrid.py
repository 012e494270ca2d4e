"""Train a gate on a small hybrid that recalls facts, and compare it with training-free methods at the same bytes.

    python recipes/hybrid.py                                  # Qwen3.5's kind: a quarter of an hour on one core
    python recipes/hybrid.py --kind sinks                     # gpt-oss's kind: sliding layers, learned sinks, experts
    python recipes/hybrid.py --steps 150 --n 400              # the base is found in its folder, and not made again

The base is pre-trained here, from nothing (hybrid_base.py says on what). Facts are asked for behind a context that was
compressed before any question was seen. Writes the base, the adapter, records.jsonl and results.json; the last line
is JSON.
"""

import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gatekv.config import option
from gatekv.options import load
from gatekv.recipes.common import announce, run

FREE = (
    "snapkv,snapkv+ada,snapkv+global,h2o,h2o+global,tova,l2_everywhere,keydiff,keydiff+global,"
    "value_norm,streaming_llm,random"
)
LEARNED = "gate+global,gate+uniform,gate_alone+global,untrained_alone+global"
SINKS, WINDOW = 2, 4  # protected under every policy
FURTHER = 8  # tokens behind a fact's first
GATE = dict(gate="mlp", hidden=32, relaxation="ste", initial_logit=-5.0, sinks=SINKS, window=WINDOW)


@dataclass
class HybridOptions:
    """The base, the gate and the comparison."""

    kind: str = option("hybrid", "Of the base.", choices=("hybrid", "wide", "sinks", "dense"))
    out: str = option("", "Folder; left out: checkpoints/small-KIND. A base that lies in it is used as it is.")
    base_steps: int = option(900, "Of the base's pre-training.")
    context: int = option(256, "Tokens of a context.")
    facts: int = option(24, "Facts in a context.")
    steps: int = option(300, "Of the gate's training.")
    rows: int = option(4, "Of a step.")
    learning_rate: float = option(3e-3, "Of the gate.")
    n: int = option(400, "Questions, 8 a context.")
    budgets: list[float] = option([0.25, 0.125], "Shares of the context's tokens.")
    policies: list[str] = option((LEARNED + "," + FREE).split(","), "To compare.")
    seed: int = option(0, "Of everything that is drawn.")


def train_gate(model, data, options: HybridOptions):
    """The base with a gate that was trained to give the full cache's answers, at budgets drawn around a fifth."""
    import torch
    from peft import get_peft_model

    from gatekv import GateKVConfig
    from gatekv.training.objective import Objective
    from gatekv.training.schedule import learning_rate_factor, sampled_keep

    torch.manual_seed(options.seed)
    gated = get_peft_model(model, GateKVConfig(task_type="CAUSAL_LM", **GATE)).train()
    objective = Objective(gated, objective="kl", prefill="dense", sparsity="budget", oracle_weight=0.3)
    learned = [p for p in gated.parameters() if p.requires_grad]
    optimizer, start = torch.optim.AdamW(learned, weight_decay=0.0), time.monotonic()
    for step in range(options.steps):
        optimizer.param_groups[0]["lr"] = options.learning_rate * learning_rate_factor(step, options.steps, 0.07, 0.1)
        batch = data.batch(step * options.rows, options.rows)
        found = objective(batch, sampled_keep(step, options.seed, 0.2, 2.2), warm=step < options.steps // 3)
        found["loss"].backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            said = {k: round(found[k].item(), 4) for k in ("task", "oracle", "keep")}
            print(f"gate {time.monotonic() - start:4.0f} s step {step + 1}: {said}", file=sys.stderr, flush=True)
    return gated.eval()


def compare(model, options: HybridOptions, records) -> tuple[list[dict], list[dict]]:
    """Rows and paired comparisons, as `recipes/evaluate.py` has them. Beside them the cache that attention leaves empty
    but for what is protected: what the model answers then, it remembers elsewhere."""
    from gatekv.bundled import HELDOUT
    from gatekv.evaluation import frontier, results
    from gatekv.evaluation.tasks import Item
    from gatekv.policies import register_policy
    from gatekv.recipes.hybrid_base import L2Everywhere, Recall

    register_policy("l2_everywhere", L2Everywhere)
    texts = [path.read_text() for path in sorted(HELDOUT.glob("*.txt"))]
    held = Recall(options.context, options.facts, 8, f"held/{options.seed}", texts)

    def item(tokenizer, texts, mode, index, seed, tokens) -> Item:
        ids = held.row(index)
        asks = [(ids[i : i + 2], ids[i + 2 : i + 3]) for i in range(held.context, held.length, 3)]
        return Item(ids[: held.context], asks)

    score = partial(frontier.evaluate, model, None, texts, build=item, sinks=SINKS, window=WINDOW, block_size=2)
    where = ("facts", "agnostic", options.n, options.seed, records)
    score(options.policies, options.budgets, *where)
    score(["sinks_recent"], [SINKS + WINDOW + 1], *where)
    chosen = ("gate+global", *(p for p in options.policies if p not in LEARNED.split(",")), "full")  # no gate is picked
    return results.rows(records.lines), results.comparisons([r for r in records.lines if r["policy"] in chosen])


def inspect(model, options: HybridOptions) -> dict:
    """What is no key or value of full attention in a full cache's bytes ("states"). At the last budget, under the gate
    and under the best of the others here, the share of heads that keep a token, by its distance behind FACT: 0, 1 the
    key, 2 the value, 3 … 7, and further."""
    import torch

    import gatekv
    from gatekv.recipes.hybrid_base import FACT, Recall

    held = Recall(options.context, options.facts, 8, f"held/{options.seed}")
    ids = held.batch(0, 16)["input_ids"][:, : held.context]
    cache = gatekv.KVCache(model, "full")
    with torch.no_grad():
        model(ids, past_key_values=cache)
    size, places = cache.memory(), torch.arange(held.context).expand_as(ids)
    behind = (places - torch.where(ids == FACT, places, -FURTHER).cummax(1).values).clamp_max(FURTHER)
    found = {"states": round(1 - size["gated_full_bytes"] / size["full_bytes"], 3)}
    for policy in ("gate+global", "keydiff+global"):
        flags = gatekv.flags(model, ids, policy=policy, budget=options.budgets[-1], sinks=SINKS, window=WINDOW)
        kept = torch.cat(list(flags), 1).float().mean(1)  # over the heads of all layers: [rows, tokens]
        found[policy] = [round(kept[behind == d].mean().item(), 3) for d in range(FURTHER + 1)]
    return found


def main(argv: list[str]) -> dict:
    options = load(argv, HybridOptions, __doc__)
    from transformers import AutoModelForCausalLM

    from gatekv.evaluation.records import Records, settings
    from gatekv.hardware import choose
    from gatekv.recipes.hybrid_base import Recall, pretrain, recalled

    announce(choose("cpu", "float32"))
    out = Path(options.out or f"checkpoints/small-{options.kind}")
    if not (out / "base" / "config.json").is_file():
        base = pretrain(options.kind, options.context, options.facts, options.base_steps, seed=options.seed)
        base.save_pretrained(out / "base")
    model = AutoModelForCausalLM.from_pretrained(out / "base", attn_implementation="eager").eval()
    full = recalled(model, Recall(options.context, options.facts, 16, options.seed))
    print(f"the base answers {full:.3f}", file=sys.stderr)
    model = train_gate(model, Recall(options.context, options.facts, 16, f"gate/{options.seed}"), options)
    model.save_pretrained(out / "gate")
    records = Records(out / "records.jsonl", settings(model, options.kind, {"dtype": "float32"}, [], None), fresh=True)
    rows, comparisons = compare(model, options, records)
    found = inspect(model, options)
    states = found["states"]
    print(f"{'policy':24} budget  bytes: keys and values, of all    answered")
    for row in rows:
        ratio = row.get("bytes_ratio", 0.0)
        score = f"{row['score']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]" if row["n"] else row["refused"]
        print(f"{row['policy']:24} {row['budget']:6}  {(ratio - states) / (1 - states):.3f}  {ratio:.3f}  {score}")
    found |= {"kind": options.kind, "full": full, "rows": rows, "comparisons": comparisons}
    (out / "results.json").write_text(json.dumps(found, indent=1))
    left = ("full_value", "contexts", "task", "mode")
    found["comparisons"] = [{k: v for k, v in c.items() if k not in left} for c in comparisons]
    print(json.dumps({k: v for k, v in found.items() if k != "rows"}))
    return found


if __name__ == "__main__":
    run(main)
