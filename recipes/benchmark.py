"""Speed and memory as ratios, measured interleaved in one run. Last line: JSON.

    python recipes/benchmark.py decode --quick       # time per token against a full cache and against the limit
    python recipes/benchmark.py cache --quick        # prefill time, peak memory, bytes held, resident memory
    python recipes/benchmark.py train --quick        # a training step against the frozen model's forward + backward
    python recipes/benchmark.py decode --contexts 1024,2048,4096,8192,16384,32768 --batches 1,8
    make peer && python recipes/benchmark.py decode --peer kvpress --contexts 8192 --keeps .125

*limit*: a plain cache that holds keep x context tokens, the best that any eviction can do. *even*: all heads hold as
many; *uneven*: heads that compete for one budget and end up very unequal. CPU time is process CPU seconds; medians of
--repeats. `decode` fills caches with random keys and values (a peer prefills in earnest) and counts 16 tokens as one
repeat, because that often a cache folds its window and a gate reads. `train` takes one row at a time; contexts beyond
4096 are run once. Its JSON says how peak memory grows with the context. On a GPU it also times the frozen model under
FlexAttention with its dense causal mask ("flex").
"""

import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gatekv.config import LESS_FORMS, option
from gatekv.hardware import choose
from gatekv.modules import base_model
from gatekv.options import HardwareOptions, load
from gatekv.recipes import measure, measure_training
from gatekv.recipes.common import announce, load_model, run
from gatekv.recipes.measure import full_cache, interleaved, report, resident
from gatekv.recipes.peer import Peer

PEER_PYTHON = Path(".venv-peer") / "bin" / "python"  # `make peer` makes it
QUICK = {
    "decode": {"contexts": [1024, 4096], "keeps": [0.25, 0.125], "repeats": 2},
    "cache": {"contexts": [512], "keeps": [0.25]},
    "train": {"contexts": [256, 512], "keeps": [1.0]},
}


@dataclass
class BenchmarkOptions(HardwareOptions):
    """What is measured, and how often."""

    what: str = option("", "decode, cache or train.", choices=tuple(QUICK), positional=True)
    quick: bool = option(False, "One context, few ratios: under a minute on two cores.")
    model: str = option("", "Folder or Hub name; left out: the embedded one; small: a random Llama of 30 M parameters.")
    contexts: list[int] = option([1024, 2048, 4096, 8192], "Tokens.")
    batches: list[int] = option([1, 8], "Rows.")
    keeps: list[float] = option([1, 0.5, 0.25, 0.125, 0.0625], "Shares of the tokens.")
    repeats: int = option(3, "Of which the median counts.")
    memory: float = option(12.0, "GiB that one row's caches may take.")
    gate: str = option("", "decode: also with random gates of this form, judging as they go.")
    less: str = option("", "decode: also with a remainder.", choices=("", *LESS_FORMS))
    peer: str = option("", "decode: beside this library, in an environment of its own.", choices=("", "kvpress"))
    gradient_checkpointing: bool = option(False, "train: the plain model's steps too.")


def decode(model, args: BenchmarkOptions) -> list[dict]:
    rows, device = [], model.device.type
    for context in args.contexts:
        for batch in args.batches:
            full = full_cache(model, batch, context)
            size = sum(t.nbytes for layer in full.layers for t in (layer.keys, layer.values))
            if size * (1 + 3 * sum(args.keeps)) > args.memory * 2**30:
                print(f"context {context}, batch {batch} skipped: its caches need more than --memory {args.memory} GiB")
                continue
            undecided = measure.undecided_from(model, full)
            made = {k: measure.compressed(undecided, k, args.gate, args.less) for k in args.keeps}
            caches = {(k, name): c for k, held in made.items() for name, c in held.items()}
            ratios = {key: c.memory()["ratio"] for key, c in caches.items()}
            caches |= {(k, "limit"): full_cache(model, batch, max(1, int(k * context))) for k in args.keeps if k < 1}
            work = {key: measure.step(model, c, batch) for key, c in caches.items()}
            work["full"] = measure.step(model, full, batch)
            peers = [(k, n, Peer(str(PEER_PYTHON), base_model(model), n))
                     for k in args.keeps if args.peer and k < 1 for n in ("snap", "ada")]  # fmt: skip
            for k, name, peer in peers:
                held = peer.ask(context=context, batch=batch, keep=k)
                ratios[k, f"kvpress {name}"] = held["bytes"] / held["full_bytes"]
                work[k, f"kvpress {name}"] = lambda peer=peer: peer.ask(step=True)["seconds"]
            times = interleaved(work, args.repeats, device, measure.CYCLE)
            for _, _, peer in peers:
                peer.close()
            for (keep, name), ratio in ratios.items():
                mine = times[keep, name]
                rows.append({
                    "context": context, "batch": batch, "keep": keep, "heads": name, "bytes_ratio": round(ratio, 4),
                    "ms_per_token": round(1e3 * mine, 2), "time_vs_full": round(mine / times["full"], 3),
                    "time_vs_limit": round(mine / times.get((keep, "limit"), times["full"]), 3),
                    "time_vs_even": round(mine / times[keep, "even"], 3),
                })  # fmt: skip
            report(rows[-len(ratios) :])
    for batch in args.batches:
        for name in dict.fromkeys(r["heads"] for r in rows):
            here = [r["time_vs_limit"] for r in rows if (r["batch"], r["heads"]) == (batch, name) and r["keep"] < 1]
            if here:
                print(
                    f"median over {len(here)} rows, batch {batch}, {name} heads: {statistics.median(here):.2f} x limit"
                )
    return rows


def cache(model, args: BenchmarkOptions) -> list[dict]:
    from transformers import DynamicCache

    import gatekv

    rows, device = [], model.device.type

    def prefill(ids, policy, keep):
        made = DynamicCache(config=model.config)
        if policy != "plain":
            scorer, _, rule = policy.partition("+")
            made = gatekv.KVCache(
                model, measure.policy_of(measure.skewed(), rule) if scorer == "uneven" else policy, keep
            )
        model(ids, past_key_values=made, logits_to_keep=1)
        return made

    for context in args.contexts:
        for batch in args.batches:
            ids = torch.randint(3, model.config.vocab_size, (batch, context), device=model.device)
            policies = ("snapkv", "snapkv+ada", "uneven+ada", "uneven+global")
            cases = [("plain", 1.0), *((p, k) for p in policies for k in args.keeps if k < 1)]
            for case in cases[:: len(args.keeps)]:
                prefill(ids, *case)  # so that buffers made once count as nobody's memory
            held = {}
            for case in cases:
                before = resident(device)
                made, most = measure.peak(lambda c=case, i=ids: prefill(i, *c), device)
                held[case] = {"peak": most, "resident": resident(device) - before}
                held[case]["ratio"] = 1.0 if case[0] == "plain" else made.memory()["ratio"]
                del made
            work = {case: lambda c=case, i=ids: prefill(i, *c) for case in cases}
            times = interleaved(work, args.repeats, device)
            plain = cases[0]
            for case in cases[1:]:
                rows.append({
                    "context": context, "batch": batch, "keep": case[1], "policy": case[0],
                    "bytes_ratio": round(held[case]["ratio"], 4), "time_vs_full": round(times[case] / times[plain], 3),
                    "resident_vs_full": round(held[case]["resident"] / max(1, held[plain]["resident"]), 3),
                    "peak_vs_full": round(held[case]["peak"] / max(1, held[plain]["peak"]), 3), "time_vs_limit": None,
                })  # fmt: skip
            report(rows[-len(cases) + 1 :])
    return rows


def train(model, args: BenchmarkOptions) -> list[dict]:
    from peft import get_peft_model

    from gatekv import GateKVConfig, detach
    from gatekv.recompute import recompute_layers

    peft = get_peft_model(model, GateKVConfig()).train()
    if args.gradient_checkpointing:
        recompute_layers(peft)
    rows, device = [], model.device.type
    for step in measure_training.training_steps(peft, 64).values():
        step()  # so that buffers made once count as nobody's memory
    for context in args.contexts:
        work = measure_training.training_steps(peft, context)
        peaks, times = {}, {}
        for name, step in work.items():
            start = measure.clock(device)
            peaks[name] = measure.peak(step, device)[1]
            times[name] = measure.clock(device) - start
        if context <= 4096:
            times = interleaved(work, args.repeats, device, warm_up=False)
        for name in work:
            rows.append({
                "context": context, "batch": 1, "objective": name, "seconds": round(times[name], 3),
                "time_vs_full": round(times[name] / times["plain"], 3), "peak_mb": round(peaks[name] / 2**20),
                "peak_vs_full": round(peaks[name] / peaks["plain"], 3), "keep": None, "bytes_ratio": None,
                "time_vs_limit": None,
            })  # fmt: skip
        report(rows[-len(work) :])
    detach(peft)
    return rows


def main(argv: list[str]) -> None:
    args = load(argv, BenchmarkOptions, __doc__)
    args = replace(args, batches=[1], **QUICK[args.what]) if args.quick else args
    hardware = choose(args.device, args.dtype, args.threads)
    announce(hardware)
    torch.manual_seed(0)
    small = args.model == "small"
    model = measure.small_llama(hardware.dtype).to(hardware.device) if small else load_model(args.model, hardware)[0]
    if args.gate or args.less:
        model = measure.with_adapter(model, args.gate, args.less)
    with torch.set_grad_enabled(args.what == "train"):
        rows = {"decode": decode, "cache": cache, "train": train}[args.what](model, args)
    memory = {"memory": measure_training.memory(rows)} if args.what == "train" else {}
    where = {"device": str(hardware.device), "machine": hardware.machine, "dtype": hardware.dtype_name}
    where |= {"threads": hardware.threads, "model": args.model or "SmolLM2-135M-Instruct"}
    print(json.dumps({"rows": rows, "what": args.what, **where, **memory}))


if __name__ == "__main__":
    run(main)
