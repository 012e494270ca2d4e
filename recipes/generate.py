"""Generate with a smaller cache: prints the text, what was kept, and the bytes.

python recipes/generate.py --adapter checkpoints/demo --budget .25
python recipes/generate.py --policy snapkv --budget .25 --prompt "…"
python recipes/generate.py --adapter checkpoints/demo --file notes.txt --question "Who owns the lantern?"
"""

import random
from dataclasses import dataclass

from gatekv.config import option
from gatekv.options import LoadOptions, load
from gatekv.recipes.common import load_adapted, run


@dataclass
class GenerateOptions(LoadOptions):
    """What is read, asked and held."""

    policy: str = option("", "Left out: the adapter's gate, else full.")
    budget: str = option("", "A share like .25, or tokens like 512; left out: .25, or a gate's own threshold.")
    prompt: str = option("", "Text to read; left out: a held-out text with four facts written in.")
    file: str = option("", "File to read the context from.")
    question: str = option("", "Asked after the context was compressed.")
    max_new_tokens: int = option(24, "Tokens to generate.")


def budget_of(policy: str | None, text: str) -> float | int | None:
    """What was asked for, or .25; None for policies that evict nothing, or by a threshold of their own."""
    from gatekv.policies import resolve
    from gatekv.policies.amount import read_budget

    if text or policy is None:  # None: the adapter's gate
        return read_budget(text or ".25")
    known = resolve(policy, 0.25)
    return 0.25 if known.scorer.evicts and known.needs.scope != "token" else None


def main(argv: list[str]) -> None:
    args = load(argv, GenerateOptions, __doc__)

    import gatekv
    from gatekv.evaluation.tasks import heldout_texts
    from gatekv.facts import chat_frame, make_sample
    from gatekv.textfiles import read_text

    model, tokenizer, _, _ = load_adapted(args)
    policy = args.policy or (None if args.adapter else "full")  # None: the adapter's gate
    budget = budget_of(policy, args.budget)
    inputs = read_text(args.file, f"--file {args.file}") if args.file else args.prompt
    question = args.question or None
    if not inputs:
        rng, frame = random.Random(1), chat_frame(tokenizer)
        sample = make_sample(heldout_texts([])[0], rng, facts=4, characters=3000, split="heldout", frame=frame)
        inputs = tokenizer(sample.context, add_special_tokens=False, return_tensors="pt")
        question = sample.questions[0].query  # up to where the number stands
        print(f"asked: {question.split(frame[1])[0].strip()}  expected:{sample.questions[0].answer}")
    elif question is None and tokenizer.chat_template:
        inputs = [{"role": "user", "content": inputs}]
    found = gatekv.generate(
        model, inputs, policy, budget, question, tokenizer=tokenizer, return_dict=True, do_sample=False,
        max_new_tokens=args.max_new_tokens,
    )  # fmt: skip
    print(f"generated: {''.join(found.text).strip()}")
    cache = found.caches[0]
    kept = sum(int(f.sum()) for f in cache.flags()) / sum(f.numel() for f in cache.flags())
    for name, m in (("after prefill", found.prompt), ("at the end", found.memory())):
        if m is not None:
            print(f"{name}: {m['bytes']:,} of {m['full_bytes']:,} bytes, ratio {m['ratio']:.3f}")
    print(f"kept {kept:.3f} of all tokens; {cache}")


if __name__ == "__main__":
    run(main)
