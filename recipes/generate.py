"""Generate with a smaller cache: prints the text, what was kept, and the bytes.

python recipes/generate.py --adapter checkpoints/demo --budget .25
python recipes/generate.py --policy snapkv --budget .25 --prompt "…"
python recipes/generate.py --adapter checkpoints/demo --file notes.txt --question "Who owns the lantern?"
"""

import random
from dataclasses import dataclass
from pathlib import Path

from gatekv.config import option
from gatekv.options import LoadOptions, load
from gatekv.recipes.common import load_adapted, run


@dataclass
class GenerateOptions(LoadOptions):
    """What is read, asked and held."""

    policy: str = option("", "Left out: gate+global with an adapter, else full.")
    budget: float | None = option(None, "Share of the prompt's tokens to hold; left out: a quarter, or all of them.")
    prompt: str = option("", "Text to read; left out: a held-out text with four facts written in.")
    file: str = option("", "File to read the context from.")
    question: str = option("", "Asked after the context was compressed.")
    max_new_tokens: int = option(24, "Tokens to generate.")


def main(argv: list[str]) -> None:
    args = load(argv, GenerateOptions, __doc__)
    import torch

    import gatekv
    from gatekv.evaluation.tasks import heldout_texts
    from gatekv.facts import chat_frame, make_sample
    from gatekv.policies.fastgen import token_kinds

    model, tokenizer, _, _ = load_adapted(args)
    frame = chat_frame(tokenizer)
    if args.prompt or args.file:
        context = frame[0] + (Path(args.file).read_text() if args.file else args.prompt)
        query = (f"\n\n{args.question}" if args.question else "") + frame[1]
    else:
        rng = random.Random(1)
        sample = make_sample(heldout_texts([])[0], rng, facts=4, characters=3000, split="heldout", frame=frame)
        context, query = sample.context, sample.questions[0].query
        print(f"asked: {query.strip().splitlines()[0]}  expected:{sample.questions[0].answer}")

    encode = lambda text: tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(model.device)  # noqa: E731
    ids = encode(context)
    policy = args.policy or ("gate+global" if args.adapter else "full")
    kinds = token_kinds(tokenizer)[ids.cpu()] if policy.startswith("fastgen") else None
    budget = 0.25 if args.budget is None and policy != "full" else args.budget
    cache = gatekv.KVCache(model, policy, budget, kinds=kinds)
    model(input_ids=ids, past_key_values=cache, logits_to_keep=1)  # the context alone is the prompt that is compressed
    after_prefill = cache.memory()
    ids = torch.cat([ids, encode(query)], 1)
    out = model.generate(
        input_ids=ids, past_key_values=cache, max_new_tokens=args.max_new_tokens, do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    print(f"generated: {tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()}")
    kept = sum(int(f.sum()) for f in cache.flags()) / sum(f.numel() for f in cache.flags())
    for name, m in (("after prefill", after_prefill), ("at the end", cache.memory())):
        print(f"{name}: {m['bytes']:,} of {m['full_bytes']:,} bytes, ratio {m['ratio']:.3f}")
    print(f"kept {kept:.3f} of all tokens; {cache}")


if __name__ == "__main__":
    run(main)
