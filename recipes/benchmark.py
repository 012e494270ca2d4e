"""Speed and memory as ratios, measured interleaved in one run. Last line: JSON.

    python recipes/benchmark.py decode --quick       # time per token against a full cache and against the limit
    python recipes/benchmark.py cache --quick        # bytes held and prefill time
    python recipes/benchmark.py train --quick        # a training step against the frozen model's forward + backward

*limit*: a plain cache that holds keep x context tokens, the best that any eviction can do. CPU time is process CPU
seconds; medians of --repeats.
"""

import argparse
import json
import statistics
import time

from common import load_model, run


def clock(device: str):
    """Seconds of work so far: process CPU seconds, or wall time after a synchronisation on a GPU."""
    if device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(work: dict, repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each callable, run in turn `repeats` times after one warm-up round."""
    times = {name: [] for name in work}
    for r in range(repeats + 1):
        for name, call in work.items():
            start = clock(device)
            call()
            if r:
                times[name].append(clock(device) - start)
    return {name: statistics.median(t) for name, t in times.items()}


def plain_cache(model, ids):
    """A DynamicCache that holds exactly these tokens."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, logits_to_keep=1)
    return cache


def step(model, cache, batch: int):
    """One decoding step; the cache grows by a token."""
    import torch

    token = torch.full((batch, 1), 5, device=model.device)
    return lambda: model(token, past_key_values=cache, logits_to_keep=1)


def decode(model, args) -> list[dict]:
    import torch

    import gatekv

    rows = []
    for context in args.contexts:
        for batch in args.batches:
            ids = torch.randint(3, model.config.vocab_size, (batch, context), device=model.device)
            undecided = gatekv.KVCache.undecided(model)
            model(ids, past_key_values=undecided, logits_to_keep=1)
            full = plain_cache(model, ids)
            for keep in args.keeps:
                limit = plain_cache(model, ids[:, : max(1, int(keep * context))])
                caches = {"even": undecided.decide("random", keep), "uneven": undecided.decide("random+global", keep)}
                ratios = {name: c.memory()["ratio"] for name, c in caches.items()}
                caches |= {"full": full, "limit": limit}
                times = interleaved(
                    {n: step(model, c, batch) for n, c in caches.items()}, args.repeats, model.device.type
                )
                for name in ratios:
                    rows.append({
                        "context": context, "batch": batch, "keep": keep, "heads": name,
                        "bytes_ratio": round(ratios[name], 4), "ms_per_token": round(1e3 * times[name], 2),
                        "time_vs_full": round(times[name] / times["full"], 3),
                        "time_vs_limit": round(times[name] / times["limit"], 3),
                    })  # fmt: skip
    return rows


def cache(model, args) -> list[dict]:
    import torch

    import gatekv

    rows = []
    for context in args.contexts:
        for batch in args.batches:
            ids = torch.randint(3, model.config.vocab_size, (batch, context), device=model.device)
            for keep in args.keeps:
                held = {}

                def prefill(policy=None, keep=keep, held=held, ids=ids):
                    cache = gatekv.KVCache(model, policy, keep)
                    model(ids, past_key_values=cache, logits_to_keep=1)
                    held[policy] = cache.memory()["ratio"]

                work = {p: (lambda p=p: prefill(p)) for p in ("snapkv", "snapkv+ada", "random+global")}
                work["full"] = lambda ids=ids: plain_cache(model, ids)
                times = interleaved(work, args.repeats, model.device.type)
                for policy, ratio in held.items():
                    rows.append({
                        "context": context, "batch": batch, "keep": keep, "policy": policy,
                        "bytes_ratio": round(ratio, 4), "time_vs_full": round(times[policy] / times["full"], 3),
                        "time_vs_limit": None,
                    })  # fmt: skip
    return rows


def train(model, args) -> list[dict]:
    import torch
    from peft import get_peft_model

    from gatekv import GateKVConfig, detach
    from gatekv.modules import gates_off
    from gatekv.training.objective import Objective

    peft = get_peft_model(model, GateKVConfig()).train()
    rows = []
    for context in args.contexts:
        ids = torch.randint(3, model.config.vocab_size, (1, context), device=model.device)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "weights": torch.ones(1, context)}
        batch["weights"][:, -1] = 0

        def plain(ids=ids):
            embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
            with gates_off(peft):
                model(inputs_embeds=embeds, labels=ids, use_cache=False).loss.backward()

        work = {"plain": plain}
        for kind in ("lm", "kl"):
            objective = Objective(peft, objective=kind, sparsity="abs", scope="global", sparsity_weight=1.0)
            work[kind] = lambda o=objective, b=batch: o(b, 0.5)["loss"].backward()
        times = interleaved(work, args.repeats, model.device.type)
        for kind in ("lm", "kl"):
            ratio = round(times[kind] / times["plain"], 3)
            rows.append({"context": context, "batch": 1, "keep": None, "bytes_ratio": None, "objective": kind,
                         "time_vs_full": ratio, "time_vs_limit": None})  # fmt: skip
    detach(peft)
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["decode", "cache", "train"])
    parser.add_argument("--quick", action="store_true", help="one context, two ratios, under 45 s on two cores")
    parser.add_argument("--model", default="")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--contexts", default="1024,2048,4096")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--keeps", default=".5,.25,.125")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    import torch

    if args.quick:
        args.contexts, args.batches, args.keeps = (
            ("512", "1", ".25") if args.what != "decode" else ("1024", "1", ".25,.125")
        )
        args.repeats = 5 if args.what == "decode" else 3
    args.contexts, args.batches = ([int(v) for v in t.split(",")] for t in (args.contexts, args.batches))
    args.keeps = [float(v) for v in args.keeps.split(",")]
    torch.manual_seed(0)
    model, _ = load_model(args.model, args.dtype)
    with torch.set_grad_enabled(args.what == "train"):
        rows = {"decode": decode, "cache": cache, "train": train}[args.what](model, args)
    for row in rows:
        print("  ".join(f"{k} {v}" for k, v in row.items() if v is not None))
    print(
        json.dumps({"rows": rows, "what": args.what, "device": model.device.type, "threads": torch.get_num_threads()})
    )


if __name__ == "__main__":
    run(main)
