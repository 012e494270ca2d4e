"""Generate with a smaller cache: prints the text, what was kept, and the bytes.

python recipes/generate.py --adapter checkpoints/demo --budget .25
python recipes/generate.py --policy snapkv --budget .25 --prompt "…"
python recipes/generate.py --adapter checkpoints/demo --file notes.txt --question "Who owns the lantern?"
"""

import argparse
import random
from pathlib import Path

from common import base_of, load_model, run


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="")
    parser.add_argument("--model", default="")
    parser.add_argument("--policy", default="", help="empty: the adapter's gate, else full")
    parser.add_argument("--budget", default="", help="a share like .25, or tokens like 512; empty: .25")
    parser.add_argument("--prompt", default="", help="empty: a held-out text with four facts written in")
    parser.add_argument("--file", default="", help="context to read from a file")
    parser.add_argument("--question", default="", help="asked after the context was compressed")
    parser.add_argument("--max_new_tokens", type=int, default=24)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args(argv)
    from peft import PeftModel

    import gatekv
    from gatekv.evaluation.tasks import heldout_texts
    from gatekv.facts import chat_frame, make_sample
    from gatekv.policies.amount import read_budget

    base = base_of(args.adapter) if args.adapter and not args.model else (args.model, None)
    model, tokenizer = load_model(base[0], args.dtype, base[1])
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter)
    policy = args.policy or (None if args.adapter else "full")  # None: the adapter's gate
    budget = read_budget(args.budget) if args.budget else None if policy in ("full", "gate") else 0.25
    question, inputs = args.question or None, Path(args.file).read_text() if args.file else args.prompt
    if not inputs:
        rng, frame = random.Random(1), chat_frame(tokenizer)
        sample = make_sample(heldout_texts([])[0], rng, facts=4, characters=3000, split="heldout", frame=frame)
        inputs = tokenizer(sample.context, add_special_tokens=False, return_tensors="pt")
        question = sample.questions[0].query  # up to where the number stands
        print(f"asked: {question.strip().splitlines()[0]}  expected:{sample.questions[0].answer}")
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
