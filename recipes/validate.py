"""What a model, an adapter, policies and budgets come to, before anything runs; no weights of the model are read.

    python recipes/validate.py --adapter checkpoints/demo --budgets .25,.125 --prompt_tokens 512,1024,8192
    python recipes/validate.py --model Qwen/Qwen3-8B --policies snapkv+ada,l2,h2o --prompt_tokens 32768

For each policy, budget and length of prompt: the bytes that will be held, after it and behind --new_tokens more, pages'
ends, tables and states counted; or why it will be refused, in the words of that refusal, and from which length on it
will not. A model or adapter that gatekv does not serve is one line, and exit code 1. What only a model's weights or
attention can tell is not told: a base of the same shapes but other weights, arguments its layers pass to attention.
"""

import functools
from dataclasses import dataclass

from gatekv.config import option
from gatekv.hardware import choose
from gatekv.options import LoadOptions, load
from gatekv.recipes.common import base_of, read_shape, run


@dataclass
class ValidateOptions(LoadOptions):
    """What is asked of a cache that is not there yet."""

    policies: list[str] = option([], "Left out: gate+global with an adapter's gate, else snapkv.")
    budgets: list[str] = option(
        [".5", ".25", ".125", ".0625"], "Shares like .25, or tokens like 512; none: a gate's own threshold."
    )
    prompt_tokens: list[int] = option([1024, 8192], "Lengths of prompts.")
    new_tokens: int = option(128, "Generated behind each.")
    batch_size: int = option(1, "Rows.")
    prefill: str | None = option(None, "dense or sparse; left out: the policy's own.")
    decode: str | None = option(None, "keep or evict; left out: the policy's own.")
    sinks: int | None = option(None, "Left out: as trained, or as the policy's paper has it.")
    window: int | None = option(None, "As sinks, of recent tokens.")


def empty_model(adapter: str, model: str, dtype: str):
    """The model without weights, gates on it; ValueError where gatekv does not serve one, or not one on the other."""
    from peft import get_peft_model

    from gatekv import GateKVConfig
    from gatekv.modules import attach
    from gatekv.training.dry_run import on_meta

    base, revision = base_of(adapter) if adapter and not model else (model, None)
    config = GateKVConfig.from_pretrained(adapter) if adapter else None
    put_on = functools.partial(get_peft_model, peft_config=config) if config else lambda m: m
    found = on_meta(read_shape(base, revision), dtype, put_on)
    attach(found)
    return found


def examine(model, policy: str, budget: float | int | None, length: int, new: int, batch: int, options: dict) -> dict:
    """One row: {"forecast": …}, or {"refused": …, "from": the shortest prompt that is not}."""
    import gatekv
    from gatekv.cache.forecast import forecast, shortest
    from gatekv.policies.budgets import BudgetError

    row = {"policy": policy, "budget": budget, "prompt_tokens": length, "forecast": None, "refused": None, "from": None}
    try:
        cache = gatekv.KVCache(model, policy, budget, strict=True, **options)
        row["forecast"] = forecast(cache, length, new, batch)
    except BudgetError as error:
        row |= {"refused": str(error), "from": shortest(cache, length)}
    except ValueError as error:
        row["refused"] = str(error)
    return row


def text_of(row: dict, limit: int) -> str:
    budget = row["budget"]
    budget = "" if budget is None else f"{budget:.4f}" if isinstance(budget, float) else f"{budget:,}"
    head = f"{row['policy']:22} {budget:>6} {row['prompt_tokens']:>8,}"
    found = row["forecast"]
    if found is None:
        never = "" if row["from"] is None else f" (from {row['from']:,} tokens on it is not)"
        return f"{head}  refused: {row['refused']}{never}"
    least, most = min(found.tokens), max(found.tokens)
    tokens = f"{most:,}" if least == most else f"{least:,}–{most:,}"
    notes = ["at most: a threshold decides"] if found.at_most else []
    notes += ["new tokens are judged too: the end is at most"] if found.at_most_end and not found.at_most else []
    notes += [f"the model was made for {limit:,} positions"] if row["prompt_tokens"] > limit else []
    return (
        f"{head} {tokens:>13} {found.bytes / 1e6:>10,.2f} {found.full_bytes / 1e6:>10,.2f} {found.ratio:7.3f} "
        f"{found.ratio_end:7.3f}  {'; '.join(notes)}".rstrip()
    )


def main(argv: list[str]) -> list[dict]:
    args = load(argv, ValidateOptions, __doc__)
    from gatekv.bundled import adapter_path
    from gatekv.geometry import layers_by_kind
    from gatekv.modules import base_model, gate_spec
    from gatekv.policies.amount import read_budget

    budgets, lengths = [read_budget(text) for text in args.budgets], args.prompt_tokens
    adapter, hardware = adapter_path(args.adapter), choose(args.device, args.dtype)
    if min([*lengths, args.batch_size]) < 1 or args.new_tokens < 0:
        raise ValueError("--prompt_tokens and --batch_size count from 1, --new_tokens from 0.")
    model = empty_model(adapter, args.model, hardware.dtype_name)
    policies = args.policies or ["gate+global" if gate_spec(model) else "snapkv"]
    config = base_model(model).config.get_text_config(decoder=True)
    (first, evict), *others = layers_by_kind(base_model(model)).items()
    kinds = [f"{evict} layers {first}", *(f"{count} {kind}" for kind, count in others)]
    print(f"{config.model_type}: {', '.join(kinds)}; {hardware.dtype_name}")
    if args.adapter:
        own = sum(p.numel() for name, p in model.named_parameters() if "gatekv_" in name or "lora_" in name)
        print(f"{args.adapter}: {own:,} parameters beside the cache")
    heads = ("policy", 22), ("budget", 6), ("prompt", 8), ("tokens a head", 13), ("MB held", 10), ("MB full", 10)
    print(" ".join(f"{name:<{width}}" if name == "policy" else f"{name:>{width}}" for name, width in heads), end="")
    print("   ratio  at end")
    options = {name: vars(args)[name] for name in ("prefill", "decode", "sinks", "window")}
    rows = [
        examine(model, policy, budget, length, args.new_tokens, args.batch_size, options)
        for policy in policies for budget in budgets for length in lengths
    ]  # fmt: skip
    for row in rows:
        print(text_of(row, config.max_position_embeddings))
    return rows


if __name__ == "__main__":
    run(main)
