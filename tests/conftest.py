"""Random two-layer models of each family, and gates with something to say."""

import copy
import functools
import gc
import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # read when torch is imported, and by the processes that tests start
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: kernels run on the CPU

import huggingface_hub
import printed
from covering import covering
from hub_server import Hub
from huggingface_hub import constants
from huggingface_hub.utils import _http
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import hub as transformers_hub

import gatekv
from gatekv import GateKVConfig
from gatekv.attention import AttentionCall
from gatekv.modules import base_model, wrappers
from gatekv.ops import naive

FAMILIES = ["llama", "qwen3"]  # of the large matrices; test_families.py runs the laws in short over all of KINDS
VOCAB = 97
EXPERTS = dict(num_experts_per_tok=2, output_router_logits=False)
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
HALF_SLIDING = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8)
# Name -> (transformers' model type, what differs from SHAPE). Sliding layers keep transformers' own cache.
KINDS = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", dict(sliding_window=None)),
    "ministral": ("ministral", HALF_SLIDING),
    "gemma3": ("gemma3_text", dict(HALF_SLIDING, query_pre_attn_scalar=8)),
    "phi3": ("phi3", dict(pad_token_id=0, bos_token_id=None, eos_token_id=None)),
    "mixtral": ("mixtral", dict(EXPERTS, num_local_experts=4, sliding_window=None)),
    "gpt_oss": ("gpt_oss", dict(HALF_SLIDING, **EXPERTS, num_local_experts=4, rope_parameters=PLAIN_ROPE)),
    "lfm2": ("lfm2", dict(layer_types=["conv", "full_attention"])),
    "qwen3_moe": ("qwen3_moe", dict(EXPERTS, num_experts=4, moe_intermediate_size=32)),
}
SHAPE = dict(
    hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3, head_dim=8,
    vocab_size=VOCAB, max_position_embeddings=512, initializer_range=0.3, tie_word_embeddings=False,
)  # fmt: skip


BUILT = None  # in pytest: (function, arguments) -> (model, state of the generator behind it), of which tests get copies


def pytest_sessionstart():
    global BUILT
    BUILT = {}


def built_once(make):
    """Copies of what `make` built for the same arguments, which takes a third of the time; a `model` is not copied."""

    @functools.wraps(make)
    def copied(*args, **kwargs):
        if BUILT is None or len(args) > 3 or kwargs.get("model") is not None:
            return make(*args, **kwargs)
        key = make.__name__, repr(args), repr(sorted(kwargs.items()))
        if key not in BUILT:
            BUILT[key] = make(*args, **kwargs), torch.get_rng_state()
        model, state = BUILT[key]
        torch.set_rng_state(state)
        return copy.deepcopy(model)

    return copied


@built_once
def tiny(family: str = "llama", dtype=torch.float64, seed: int = 0, **changes):
    """A random model whose attention is peaked enough that evicting the wrong token shows."""
    torch.manual_seed(seed)
    model_type, own = KINDS[family]
    config = AutoConfig.for_model(model_type, **{**SHAPE, **own, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).eval()
    if "num_experts_per_tok" in own:
        model.set_experts_implementation("eager")  # the default, a grouped matrix product, has no float64
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


@built_once
def gated(family: str = "llama", dtype=torch.float64, seed: int = 0, model=None, **spec):
    """A tiny PEFT model whose random gates drop about half of the tokens."""
    model = model or tiny(family, dtype, seed)
    peft = get_peft_model(model, GateKVConfig(**spec)).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    for w in wrappers(peft):
        for name, p in w.gatekv_gate["default"].named_parameters() if w.active() else ():
            if name in ("out.weight", "out_weight", "distance"):
                with torch.no_grad():
                    p.copy_(torch.randn(p.shape, generator=generator))
            if name in ("out.bias", "out_bias"):
                torch.nn.init.zeros_(p)
    return peft.eval()


def padded_batch(lengths, seed: int = 3):
    """(ids, mask) of left-padded random rows."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(1, VOCAB, (len(lengths), width), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    return ids * mask, mask


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def positions_of(mask):
    """Each row counts from its first real token."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def parallel_logits(model, ids, mask, form="hard"):
    """The form that is trained: one pass, the gates as a mask."""
    with gatekv.parallel(model, form):
        return plain_logits(model, ids, mask)


@torch.no_grad()
def recurrent_logits(model, ids, mask, cache, cuts):
    """The form that is deployed: tokens arrive in several calls, cut at `cuts`, and leave the cache."""
    edges, positions = [0, *cuts, ids.shape[1]], positions_of(mask)
    pieces = [
        model(ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], past_key_values=cache).logits
        for a, b in zip(edges, edges[1:])
    ]
    return torch.cat(pieces, 1)


@torch.no_grad()
def plain_logits(model, ids, mask):
    return model(ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False).logits


def assert_close(a, b, mask, dtype=torch.float64):
    """Equal at real tokens, relative to the largest."""
    scale = b[mask.bool()].abs().max()
    assert ((a - b)[mask.bool()].abs().max() / scale) <= TOLERANCE[dtype]


class MaskedMemory:
    """Answers attention densely under a fixed mask: the reference that evicts nothing."""

    def __init__(self, live):
        self.live = live

    def attend(self, call, q, k, v, mask, scaling):
        groups = q.shape[1] // k.shape[1]
        k, v, live = (t.repeat_interleave(groups, 1) for t in (k, v, self.live.expand(-1, k.shape[1], -1, -1)))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=live, scale=scaling)


@torch.no_grad()
def dense_reference(model, ids, live):
    """Logits of one uncached pass in which each layer's queries see what live [1, kv_heads, tokens, tokens] says."""
    n, undo = torch.arange(ids.shape[1]), []
    for w, layer_live in zip(wrappers(model), live):
        memory = MaskedMemory(layer_live & (n[:, None] >= n))

        def forward(hidden_states, w=w, memory=memory, **kwargs):
            call = AttentionCall(hidden_states, w.layer_idx, memory=memory)
            return type(w.module).forward(w.module, hidden_states, gatekv=call, **kwargs)

        w.module.forward = forward
        undo.append(w.module)
    try:
        return base_model(model)(ids, use_cache=False).logits
    finally:
        for module in undo:
            del module.forward


class RoundedMemory:
    """Answers attention densely: behind the prompt, queries see its keys and values as `rounded(x, bits)` makes them.

    bits: [2, batch, kv_heads, tokens], of each key and value of the prompt, 0 where it is gone. rounded: (x [batch,
    kv_heads, n, head_dim], bits [batch, kv_heads, n], of what follows the prompt 0) -> x.
    """

    def __init__(self, bits, rounded):
        self.bits, self.rounded = bits, rounded

    def attend(self, call, q, k, v, mask, scaling):
        n, kv, prompt = k.shape[2], k.shape[1], self.bits.shape[-1]
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        bits = torch.nn.functional.pad(self.bits, (0, n - prompt))
        stays = (bits[0] > 0) | (torch.arange(n) >= prompt)
        coded = [self.rounded(x, b) for x, b in zip((k, v), bits)]
        outs = []
        for (keys, values), live, part in (((k, v), causal[None, None], slice(0, prompt)),
                                           (coded, causal & stays[:, :, None], slice(prompt, n))):  # fmt: skip
            live = live.expand(-1, kv, -1, -1)[:, :, part]
            answer = naive.dense_segment(q[:, :, part], keys, values, live, scaling)
            outs.append(naive.with_sinks(answer, call.sinks)[0])
        return torch.cat(outs, 2)


def rounded_logits(model, ids, memories):
    """Logits of one uncached pass in which memories, by layer index, answer; the model is not to be used again."""
    for w in wrappers(model):
        memory = memories[w.layer_idx]

        def forward(hidden_states, w=w, memory=memory, **kwargs):
            call = AttentionCall(hidden_states, w.layer_idx, memory=memory)
            return type(w.module).forward(w.module, hidden_states, gatekv=call, **kwargs)

        w.module.forward = forward
    return base_model(model)(ids, use_cache=False).logits


def axes(item) -> dict[str, str]:
    """What a test's case has on each axis: the names of one `parametrize` are one axis, a fixture's values another."""
    params = dict(item.callspec.params)
    names = [mark.args[0] for mark in item.iter_markers("parametrize")]
    lists = [[n.strip() for n in name.split(",")] if isinstance(name, str) else list(name) for name in names]
    found = {",".join(together): repr([params.pop(n) for n in together]) for together in lists}
    return found | {name: repr(value) for name, value in params.items()}


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """Mark as exhaustive what `make test` leaves to `make test-all`: of a test's cases all that `covering` does not
    choose. `pytest.mark.covering(1)` on a test, with the reason: every value once is enough of it in `make test`."""
    tests = {}
    for item in items:
        if item.path.parent.name == "distributed":  # one launch at a time: it is two processes already
            item.add_marker(pytest.mark.xdist_group("two processes"))
        if hasattr(item, "callspec") and not item.get_closest_marker("exhaustive"):
            tests.setdefault((item.path, item.originalname), []).append(item)
    for cases in tests.values():
        mark = cases[0].get_closest_marker("covering")
        chosen = covering([axes(case) for case in cases], *(mark.args if mark else ()))
        for place in set(range(len(cases))).difference(chosen):
            cases[place].add_marker("exhaustive")


def pytest_collection_finish():
    """Libraries and cases are here to stay: garbage is looked for in what tests make, not in a million objects more."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


THREADS = torch.get_num_threads()


def pytest_runtest_teardown():
    """A recipe takes all cores, which the tests beside it have too; more threads than cores wait for one another."""
    if torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def unreachable(monkeypatch):
    """The Hub's client does not wait between its tries to reach a Hub that is not there."""
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that the client of this process talks to, as nobody, with an empty cache."""
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


README = Path(__file__).resolve().parents[1] / "README.md"
SHORT = ["--max_steps", "2", "--save_every", "1", "--sequence_length", "64", "--dtype", "float32", "--threads", "1"]


@pytest.fixture(scope="session")
def printed_env(tmp_path_factory):
    """Variables under which the embedded model is found by its Hub name."""
    return printed.environment(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, printed_env) -> Path:
    """The folder that the README's training command writes, in two short steps and in an empty folder."""
    found = [words for words in printed.commands(README) if words[:2] == ["accelerate", "launch"]]
    words, folder = next(w for w in found if any("cpt" in word for word in w)), tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "accelerate.commands.launch", *words[2:], *SHORT]
    name = words[words.index("--output_dir") + 1]
    assert f"saved {name}" in printed.run(command, folder, printed_env)
    return folder / name
