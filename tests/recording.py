"""Tiny models, every policy, and one batch that goes through a cache: for tests/unit/test_recorded_cache.py."""

import hashlib
from collections.abc import Callable

import numpy
import torch
from conftest import gated, tiny

import gatekv
from gatekv.gates.calibration import Calibration
from gatekv.modules import wrappers
from gatekv.policies import D2O, ElasticCache, L2Norm, StreamingLLM

TOKENS, LENGTHS, QUESTION = 251, [90, 77, 64], 5
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gemma3": dict(num_hidden_layers=3, layer_types=["full_attention", "sliding_attention", "full_attention"]),
    "phi3": {},
}
ADAPTERS = {  # "plain" has none
    "mlp": dict(window=6, sinks=2),
    "late": dict(window=20, sinks=2),  # from 16 on, the gate reads late
    "attention": dict(gate="attention", window=16, sinks=2, context_window=9),
    "linear": dict(gate="linear", window=1, sinks=0),
    "key_mlp": dict(gate="key_mlp", window=6, sinks=2),
    "prompt": dict(gate="attention", context="prompt", window=6, sinks=2),
    "prompt unmasked": dict(gate="attention", context="prompt", mask_prompt=False, window=6, sinks=2),
    "decay": dict(relaxation="decay", window=8, sinks=2, hidden=16, initial_logit=3.0),
    "less": dict(window=6, sinks=2, less_rank=3, less_hidden=12),
    "centroids": dict(window=6, sinks=2, less_rank=3, less_hidden=12, less_form="centroids"),
    "calibrated": dict(window=6, sinks=2),
}
KEEP, DENSE, SPARSE = dict(decode="keep"), dict(prefill="dense"), dict(prefill="sparse")
SLOTS = StreamingLLM(positions="cache")
POLICIES = {  # name -> (adapter, policy, budget, options)
    "full": ("plain", "full", None, {}),
    "random": ("mlp", "random", 0.5, {}),
    "sinks_recent": ("mlp", "sinks_recent", 0.5, {}),
    "value_norm": ("mlp", "value_norm", 0.5, {}),
    "l2": ("mlp", L2Norm(skip_layers=(0,)), 0.5, {}),
    "l2 evict": ("mlp", L2Norm(skip_layers=(0,)), 0.5, dict(decode="evict")),
    "keydiff": ("mlp", "keydiff", 0.5, {}),
    "keydiff pages of 5": ("mlp", "keydiff", 0.5, dict(block_size=5)),
    "snapkv": ("plain", "snapkv", 0.6, {}),
    "snapkv tokens": ("plain", "snapkv", 40, {}),
    "snapkv short": ("plain", "snapkv", 0.4, {}),  # the shortest row is held whole
    "snapkv strict": ("plain", "snapkv", 0.4, dict(strict=True)),
    "snapkv+ada": ("mlp", "snapkv+ada", 0.6, {}),
    "snapkv+pyramid": ("mlp", "snapkv+pyramid", 0.6, dict(window=8)),
    "snapkv+global": ("mlp", "snapkv+global", 0.6, {}),
    "keydiff+ada+pyramid": ("mlp", "keydiff+ada+pyramid", 0.5, {}),
    "tova": ("plain", "tova", 0.5, {}),
    "h2o": ("plain", "h2o", 0.5, {}),
    "h2o tokens": ("plain", "h2o", 30, {}),
    "h2o keep": ("plain", "h2o", 0.5, KEEP),
    "h2o+ada": ("plain", "h2o+ada", 0.5, {}),
    "h2o+variance": ("plain", "h2o+variance", 0.5, {}),
    "streaming_llm": ("plain", "streaming_llm", 0.5, {}),
    "streaming_llm slot": ("plain", SLOTS, 0.5, {}),
    "nacl": ("plain", "nacl", 0.5, {}),
    "fastgen": ("plain", "fastgen", None, {}),
    "fastgen kinds": ("plain", "fastgen", None, dict(kinds=True)),
    "fastgen budget": ("plain", "fastgen", 0.5, dict(kinds=True)),
    "d2o": ("plain", D2O(skip_layers=(0,)), 0.5, {}),
    "elastic": ("plain", ElasticCache(window=8), 0.5, {}),
    "snapkv+merge_near": ("mlp", "snapkv+merge_near", 0.6, {}),
    "keydiff+merge_similar": ("mlp", "keydiff+merge_similar", 0.5, {}),
    "snapkv+think": ("mlp", "snapkv+think", 0.7, {}),
    "qaq": ("mlp", "qaq", None, {}),
    "qaq budget": ("mlp", "qaq", 0.5, KEEP),
    "h2o+qaq keep": ("mlp", "h2o+qaq", 0.8, KEEP),
    "snapkv+less": ("less", "snapkv+less", 0.6, {}),
    "snapkv+less centroids": ("centroids", "snapkv+less", 0.6, {}),
    "h2o+less": ("less", "h2o+less", 0.5, {}),
    "gate": ("mlp", "gate", None, {}),
    "gate late": ("late", "gate", None, {}),
    "gate dense": ("mlp", "gate", None, DENSE),
    "gate keep": ("mlp", "gate", None, KEEP),
    "gate attention": ("attention", "gate", None, {}),
    "gate linear": ("linear", "gate", None, {}),
    "gate key_mlp": ("key_mlp", "gate", None, {}),
    "gate budget": ("calibrated", "gate", 0.5, {}),
    "gate tokens": ("calibrated", "gate", 40, {}),
    "gate+uniform": ("mlp", "gate+uniform", 0.5, {}),
    "gate+ada": ("mlp", "gate+ada", 0.5, {}),
    "gate+global": ("mlp", "gate+global", 0.5, {}),
    "gate+global tokens": ("mlp", "gate+global", 40, {}),
    "gate+global attention": ("attention", "gate+global", 0.5, {}),
    "gate+global keep": ("mlp", "gate+global", 0.5, KEEP),
    "gate+global sparse": ("calibrated", "gate+global", 0.5, SPARSE),
    "gate+uniform sparse": ("calibrated", "gate+uniform", 0.5, SPARSE),
    "gate_alone+global": ("mlp", "gate_alone+global", 0.5, {}),
    "gate+global+merge_near": ("mlp", "gate+global+merge_near", 0.5, KEEP),
    "gate+decay": ("decay", "gate+decay", 0.5, {}),
    "gate+less": ("less", "gate+less", None, {}),
    "gate+global+less": ("less", "gate+global+less", 0.5, {}),
    "gate prompt": ("prompt", "gate", None, {}),
    "gate prompt unmasked": ("prompt unmasked", "gate", None, {}),
    "gate+global prompt": ("prompt", "gate+global", 0.5, {}),
}
ALSO_GEMMA3 = ["snapkv", "h2o", "gate attention", "gate+global"]  # all stages, with sliding layers between ours

# What tells little more in another family is fed to one alone.
LLAMA_ALONE = [
    "keydiff pages of 5", "snapkv tokens", "snapkv short", "snapkv strict", "keydiff+ada+pyramid", "h2o tokens", "h2o+ada",
    "h2o+variance", "fastgen kinds", "snapkv+merge_near", "keydiff+merge_similar", "qaq budget", "snapkv+less centroids",
    "gate late", "gate keep", "gate linear", "gate tokens", "gate+global tokens", "gate+global attention",
    "gate+uniform sparse", "gate+global+merge_near", "gate prompt unmasked", "gate+global prompt",
]  # fmt: skip

MODELS: dict[tuple[str, str], torch.nn.Module] = {}


def model_of(family: str, adapter: str) -> torch.nn.Module:
    """A random model, made once; caches leave nothing behind in it."""
    if (family, adapter) not in MODELS:
        model = tiny(family, vocab_size=TOKENS, **FAMILIES[family])
        if adapter != "plain":
            model = gated(model=model, **ADAPTERS[adapter])
        for w in wrappers(model):
            if adapter == "calibrated":
                w.calibrations["default"] = Calibration(
                    [1.0, 0.25], [0.0, 0.5, 1.0], [[3.0, 0.0, -3.0], [2.0, -0.5, -3.0]]
                )
            for name, p in w.less().named_parameters() if w.less() else ():  # a remainder that weighs something
                torch.nn.init.normal_(p, std=0.4, generator=torch.Generator().manual_seed(len(name) + w.layer_idx))
        MODELS[family, adapter] = model
    return MODELS[family, adapter]


def drawn(rows: int, count: int, seed: int) -> torch.Tensor:
    """[rows, count] tokens, each at most once in a row: twins would tie in many scores."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(TOKENS - 1, generator=generator)[:count] + 1 for _ in range(rows)])


def digest(values: numpy.ndarray) -> str:
    """A short name for exactly these values."""
    return hashlib.blake2b(values.tobytes(), digest_size=4).hexdigest()


FIELDS = ["seen", "kept per layer", "where per layer", "bytes", "full_bytes", "whole_rows", "predicted", "predicted (all)",
          "logits"]  # fmt: skip


class Run:
    """One left-padded batch that goes through one cache; `found` is what will be compared, by checkpoint."""

    def __init__(self, family: str, name: str, **options: object) -> None:
        adapter, policy, budget, own = POLICIES[name]
        self.family = family
        self.model, self.found, self.at, self.seed = model_of(family, adapter), {}, 0, 0
        width, count = max(LENGTHS), len(LENGTHS)
        self.mask = (torch.arange(width) >= width - torch.tensor(LENGTHS)[:, None]).long()
        self.prompt = drawn(count, width, 1) * self.mask
        options = {**own, **options}
        if options.pop("kinds", False):
            options["kinds"] = (self.prompt % 5 == 0).long() * 2 - (self.prompt % 10 == 0).long()
        self.make: Callable = lambda: gatekv.KVCache(self.model, policy, budget, **options)
        self.said, self.cache = [], None
        self.decide_as = policy, budget, {k: v for k, v in options.items() if k != "prefill"}

    @torch.no_grad()
    def feed(self, ids: torch.Tensor) -> None:
        """One call of the model."""
        if self.cache is None:
            self.cache = self.make()
        new = ids.shape[1]
        missing = self.at + new - self.mask.shape[1]
        mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), max(missing, 0))], 1)[:, : self.at + new]
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, self.at :]
        out = self.model(ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache).logits
        self.mask = mask if missing > 0 else self.mask
        self.logits, self.real = out, mask[:, self.at :].bool()
        self.said.append(out.argmax(-1) * self.real)
        self.at += new

    def more(self, count: int, single: bool = False) -> None:
        """Drawn tokens, in one call or one by one."""
        self.seed += 1
        ids = drawn(len(self.mask), count, 100 + self.seed)
        for piece in ids.split(1, 1) if single else [ids]:
            self.feed(piece)

    def far(self) -> None:
        """Past a fold, and a few single tokens."""
        self.more(14)
        self.more(3, single=True)

    def begin(self) -> None:
        """Prompt, question, a few single tokens: where the other stages start."""
        self.feed(self.prompt)
        self.more(QUESTION)
        self.more(2, single=True)

    def branch(self, cache: gatekv.KVCache) -> "Run":
        """The same batch with another cache behind it, from here on; what it finds goes with this one's."""
        other = object.__new__(Run)
        vars(other).update(vars(self) | {"cache": cache, "said": []})
        return other

    def pick(self, method: str, rows: list[int]) -> None:
        """Beams or a smaller batch."""
        getattr(self.cache, method)(torch.tensor(rows))
        self.mask = self.mask[torch.tensor(rows)]

    def crop(self, count: int) -> None:
        """Take back the last tokens."""
        self.cache.crop(-count)
        self.at -= count
        self.mask = self.mask[:, : self.at]

    def note(self, checkpoint: str) -> None:
        """Record what the cache holds and what was said since the last checkpoint."""
        flags, size = self.cache.flags(), self.cache.memory()
        said = torch.cat([torch.zeros(len(self.mask), 0, dtype=torch.long), *self.said], 1)
        real = self.logits[self.real]
        some = [real.norm().item(), *(real[i, j].item() for i, j in ((0, 3), (0, 150), (-1, 77), (-1, 240)))]
        self.found[checkpoint] = [
            self.cache.get_seq_length(), [int(f.sum()) for f in flags], [digest(numpy.packbits(f.numpy())) for f in flags],
            size["bytes"], size["full_bytes"], size["whole_rows"],
            said[:, -1:].flatten().tolist(), digest(said.numpy()), [float(f"{x:.14g}") for x in some],
        ]  # fmt: skip
        self.said = []
