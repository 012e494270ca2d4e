"""Write which tokens of a corpus a policy keeps, for each layer and KV head: what an engine of one's own would evict.

    python recipes/export.py --adapter checkpoints/demo --budget .25                   # the bundled held-out texts
    python recipes/export.py --adapter DIR --data notes.txt,more.txt --tokens 2048 --rows 1000 --out flags
    python recipes/export.py --policy snapkv+ada --budget .125                               # training-free

Texts are cut into rows of --tokens tokens, each judged as a prompt of its own. Writes flags-00000.safetensors, … to
--out: `input_ids` int32 [rows, tokens]; `keep` uint8 [rows, layers, kv_heads, tokens / 8], eight tokens to a byte, the
first in the highest bit (numpy.unpackbits). The metadata names policy, budget, model, adapter and layers.
"""

import argparse
from pathlib import Path

from common import base_of, load_model, run

SHARD = 256  # rows a file


def rows_of(texts: list[str], tokenizer, tokens: int, most: int) -> list[list[int]]:
    """At most `most` rows of `tokens` tokens, in order; what is left at the end of a text is dropped."""
    rows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        rows += [ids[a : a + tokens] for a in range(0, len(ids) - tokens + 1, tokens)]
        if len(rows) >= most:
            break
    return rows[:most]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="", help="folder or Hub name; empty: training-free policies")
    parser.add_argument("--model", default="", help="base model; empty: the adapter's, or the embedded one")
    parser.add_argument("--policy", default="", help="empty: gate+global with an adapter, snapkv+ada without")
    parser.add_argument("--budget", default=".25", help="a share like .25, or tokens like 512")
    parser.add_argument("--data", default="", help="text files, with commas; empty: the bundled held-out ones")
    parser.add_argument("--tokens", type=int, default=1024, help="a row")
    parser.add_argument("--rows", type=int, default=64, help="at most")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", default="flags", help="folder")
    args = parser.parse_args(argv)
    if args.tokens < 8 or args.tokens % 8:
        raise ValueError(f"--tokens {args.tokens}: eight flags go into a byte, so use a multiple of 8.")
    if args.rows < 1:
        raise ValueError(f"--rows {args.rows}: at least 1.")
    import numpy
    import torch
    from peft import PeftModel
    from safetensors.torch import save_file
    from tqdm import tqdm

    import gatekv
    from gatekv.evaluation.tasks import heldout_texts
    from gatekv.fingerprint import gates_sha256
    from gatekv.modules import wrappers
    from gatekv.policies.amount import read_budget

    base = base_of(args.adapter) if args.adapter and not args.model else (args.model, None)
    model, tokenizer = load_model(base[0], args.dtype, base[1])
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter).eval()
    rows = rows_of(heldout_texts([d for d in args.data.split(",") if d]), tokenizer, args.tokens, args.rows)
    if not rows:
        raise ValueError(f"no text of --data is as long as --tokens {args.tokens}: lower it.")
    policy = args.policy or ("gate+global" if args.adapter else "snapkv+ada")
    budget, out = read_budget(args.budget), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for shard, first in enumerate(range(0, len(rows), SHARD)):
        part, keep = torch.tensor(rows[first : first + SHARD], dtype=torch.int32), []
        for row in tqdm(part, desc=f"shard {shard}"):
            kept = gatekv.flags(model, row[None].long().to(model.device), policy=policy, budget=budget, strict=True)
            keep.append(torch.from_numpy(numpy.packbits(kept[:, 0].cpu().numpy(), axis=-1)))
        said = {
            "policy": policy, "budget": str(budget), "tokens": str(args.tokens), "gatekv": gatekv.__version__,
            "model": args.model or base[0] or "embedded", "adapter": gates_sha256(model) or "",
            "layers": ",".join(str(w.layer_idx) for w in wrappers(model)),
        }  # fmt: skip
        save_file({"input_ids": part, "keep": torch.stack(keep)}, out / f"flags-{shard:05}.safetensors", said)
    print(f"wrote {len(rows)} rows of {args.tokens} tokens under {policy} at {budget} to {out}")


if __name__ == "__main__":
    run(main)
