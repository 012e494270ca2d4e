"""Write which tokens of a corpus a policy keeps, for each layer and KV head: what an engine of one's own would evict.

    python recipes/export.py --adapter checkpoints/demo --budget .25                   # the bundled held-out texts
    python recipes/export.py --adapter DIR --data notes.txt,more.txt --tokens 2048 --rows 1000 --out flags
    python recipes/export.py --policy snapkv+ada --budget .125                               # training-free

Texts are cut into rows of --tokens tokens, each judged as a prompt of its own. Writes flags-00000.safetensors, … to
--out: `input_ids` int32 [rows, tokens]; `keep` uint8 [rows, layers, kv_heads, tokens / 8], eight tokens to a byte, the
first in the highest bit (numpy.unpackbits). The metadata names policy, budget, model, adapter and layers.
"""

from dataclasses import dataclass
from pathlib import Path

from gatekv.config import option
from gatekv.options import LoadOptions, load
from gatekv.recipes.common import load_adapted, run

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


@dataclass
class ExportOptions(LoadOptions):
    """Whose flags, of what."""

    policy: str = option("", "Left out: gate+global with an adapter, snapkv+ada without.")
    budget: str = option(".25", "A share of a row's tokens like .25, or tokens like 512.")
    data: list[str] = option([], "Text files; left out: the bundled held-out ones.")
    tokens: int = option(1024, "Of a row, a multiple of 8.")
    rows: int = option(64, "At most.")
    out: str = option("flags", "Folder.")


def main(argv: list[str]) -> None:
    args = load(argv, ExportOptions, __doc__)
    if args.tokens < 8 or args.tokens % 8:
        raise ValueError(f"--tokens {args.tokens}: eight flags go into a byte, so use a multiple of 8.")
    if args.rows < 1:
        raise ValueError(f"--rows {args.rows}: at least 1.")
    import numpy
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm

    import gatekv
    from gatekv.evaluation.tasks import heldout_texts
    from gatekv.fingerprint import gates_sha256
    from gatekv.modules import wrappers
    from gatekv.policies.amount import read_budget

    model, tokenizer, _, base = load_adapted(args)
    rows = rows_of(heldout_texts(args.data), tokenizer, args.tokens, args.rows)
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
            "policy": policy, "budget": str(args.budget), "tokens": str(args.tokens), "gatekv": gatekv.__version__,
            "model": base or "embedded", "adapter": gates_sha256(model) or "",
            "layers": ",".join(str(w.layer_idx) for w in wrappers(model)),
        }  # fmt: skip
        save_file({"input_ids": part, "keep": torch.stack(keep)}, out / f"flags-{shard:05}.safetensors", said)
    print(f"wrote {len(rows)} rows of {args.tokens} tokens under {policy} at {budget} to {out}")


if __name__ == "__main__":
    run(main)
