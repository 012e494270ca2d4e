"""What the benchmark measures with: clocks, memory, and caches filled without a prefill."""

import ctypes
import gc
import random
import statistics
import sys
import time
from pathlib import Path

CYCLE = 16  # decoding steps after which everything that a cache does has happened once (gatekv.cache.gate_stream.FOLD)


def clock(device: str) -> float:
    """Seconds of work so far: process CPU seconds, or wall time after a synchronisation on a GPU."""
    if device == "cpu":
        return time.process_time()
    import torch

    torch.accelerator.synchronize()
    return time.perf_counter()


def interleaved(work: dict, repeats: int, device: str, cycle: int = 1, warm_up: bool = True) -> dict[str, float]:
    """Median over `repeats` cycles of the mean seconds of each callable, run in turn after one warm-up round.

    cycle: calls until what a callable does comes round again. A callable that returns a number has measured itself.
    """
    times = {name: [] for name in work}
    for r in range(0 if warm_up else 1, repeats * cycle + 1):
        for name, call in work.items():
            start = clock(device)
            own = call()
            if r:
                times[name].append(own if isinstance(own, float) else clock(device) - start)
    starts = range(0, repeats * cycle, cycle)
    return {name: statistics.median(statistics.mean(t[i : i + cycle]) for i in starts) for name, t in times.items()}


def _status(field: str) -> int:
    line = next(ln for ln in Path("/proc/self/status").read_text().splitlines() if ln.startswith(field))
    return int(line.split()[1]) * 1024


def resident(device: str) -> int:
    """Bytes held now: by CUDA's allocator, or by this process after unused memory went back to the system."""
    gc.collect()
    if device != "cpu":
        import torch

        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def peak(work, device: str) -> tuple[object, int]:
    """(what work() returns, most bytes held while it ran, above those held before)."""
    before = resident(device)
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
        result = work()
        return result, _status("VmHWM") - before
    import torch

    torch.cuda.reset_peak_memory_stats()
    result = work()
    return result, torch.cuda.max_memory_allocated() - before


def small_llama(dtype):
    """A random Llama of 30 million parameters: 10 layers, 8 heads over 2 KV heads of 64."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1280, num_hidden_layers=10, num_attention_heads=8, num_key_value_heads=2,
        head_dim=64, vocab_size=8192, max_position_embeddings=131072, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def skewed():
    """A scorer of random scores under which heads that compete end up very unequal: weights spread over 1/4 … 4."""
    import torch

    from gatekv.policies import Scorer

    class Skewed(Scorer):
        sinks, window = 4, 32

        def score(self, view):
            rng = random.Random(view.layer_idx)
            weights = [4 ** rng.uniform(-1, 1) for _ in range(view.keys.shape[1])]
            weights = torch.tensor(weights, device=view.keys.device)
            return torch.rand(view.keys.shape[:3], device=view.keys.device) ** (1 / weights[:, None])

    return Skewed()


def full_cache(model, batch: int, context: int):
    """A DynamicCache of random keys and values: time and bytes of a step depend on shapes alone."""
    import torch
    from transformers import DynamicCache

    config = model.config
    cache = DynamicCache(config=config)
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads, context, head_dim)
    for i in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)), i)
    return cache


def undecided_from(model, full):
    """A KVCache that has seen what `full` holds, its tensors shared, and has decided nothing yet."""
    import torch

    import gatekv
    from gatekv.modules import wrappers

    cache = gatekv.KVCache.undecided(model, queries=0)
    gate = wrappers(model)[0].gate()
    for mine, theirs in zip(cache.evicting(), full.layers):
        b, kv, n, _ = theirs.keys.shape
        mine.lazy_initialization(theirs.keys, theirs.values)
        valid = torch.ones(b, n, dtype=torch.bool, device=theirs.keys.device)
        mine.window.append(theirs.keys, theirs.values, valid[:, None].expand(b, kv, n), valid)
        mine.seen, mine.real = n, torch.full_like(mine.real, n)
        width = 2 * kv * theirs.keys.shape[-1] if gate and gate.reads == "keys" else model.config.hidden_size
        mine.evidence.hidden = torch.randn(b, n, width, dtype=model.dtype, device=model.device)
    return cache


def with_adapter(model, gate: str, less: str):
    """The model under a PEFT adapter with random gates and low-rank maps of those forms: they cost what trained ones
    cost."""
    import torch
    from peft import get_peft_model

    import gatekv
    from gatekv.modules import wrappers

    rank = {"": 0, "kernel": 8, "centroids": 4}[less]  # the same bytes
    maps = {"less_form": less or "kernel", "less_rank": rank}
    peft = get_peft_model(model, gatekv.GateKVConfig(gate=gate or "none", **maps))
    for w in wrappers(peft) if gate else ():
        for name, parameter in w.gate().named_parameters():
            if name in ("out.weight", "out_weight"):
                torch.nn.init.normal_(parameter)
    return peft.eval()


def policy_of(scorer, rule: str, remainder=None):
    """A policy that ranks by `scorer` and shares the budget by `rule`."""
    from gatekv.policies import BUDGETS, Policy

    return Policy(scorer, BUDGETS[rule](), None, remainder=remainder)


def compressed(undecided, keep: float, gate: str, less: str) -> dict:
    """The same prompt with equal heads, with very unequal ones, under a gate that goes on judging, with a remainder."""
    from gatekv.policies.less import Less

    if keep == 1:
        return {"even": undecided.decide("full")}
    policies = {"even": policy_of(skewed(), "uniform"), "uneven": policy_of(skewed(), "global")}
    if gate:
        policies[f"{gate} gate"] = "gate+global"
    if less:
        policies[f"even, {less}"] = policy_of(skewed(), "uniform", Less())
    return {name: undecided.decide(policy, keep) for name, policy in policies.items()}


def step(model, cache, batch: int):
    """One decoding step; the cache grows by a token."""
    import torch

    token = torch.full((batch, 1), 5, device=model.device)

    def one():
        model(token, past_key_values=cache, logits_to_keep=1)

    return one


def report(rows: list[dict]) -> None:
    """Print rows as they come: a long run shows what it has."""
    for row in rows:
        print("  ".join(f"{k} {v}" for k, v in row.items() if v is not None), flush=True)


if __name__ == "__main__":
    sys.exit("measure.py holds what benchmark.py measures with; run that.")
