"""200 damaged and hostile adapter folders: each is a clear error or the very tensors that were saved, in bounded memory."""

import copy
import json
import random
import resource
import shutil
import struct
import time

import pytest
import torch
from conftest import gated, tiny
from peft import PeftModel
from safetensors.torch import load, load_file, save

from gatekv import GateKVConfig
from gatekv.adapter import set_calibration
from gatekv.adapter_file import MOST_CONFIG
from gatekv.fingerprint import tensors_sha256
from gatekv.gates.calibration import Calibration
from gatekv.modules import wrappers

CLEAR = (ValueError, TypeError, OSError)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = [dict(gate="linear"), dict(gate="mlp", hidden=6), dict(gate="key_mlp", hidden=4), dict(gate="none")]
LESS = dict(less_rank=3, less_hidden=5, less_policy="snapkv", less_budget=0.5)
HUGE = [
    10**6,
    2**20,
    10**9,
    2**31 - 1,
    2**31,
    10**12,
    10**30,
    -1,
    0,
    3.5,
    "8",
    None,
    True,
    [8],
    float("nan"),
    float("inf"),
]
ODD = ["", "../../secrets", "\x00", "x" * 10_000, None, 7, -1, 1e400, [], {}, [[[]]], {"a": {"b": 1}}, True, "ü" * 50]
SIZES = ["hidden", "heads", "head_dim", "context_window", "window", "sinks", "less_rank", "less_hidden"]
NUMBERS = ["threshold", "temperature", "logit_scale", "initial_logit", "less_dropout", "less_budget"]
WORDS = ["gate", "context", "relaxation", "less_form", "less_policy", "target_modules", "calibration", "peft_type",
         "base_fingerprint", "task_type", "weights_sha256", "mask_prompt", "revision", "auto_mapping", "inference_mode"]  # fmt: skip
TARGETS = [
    ["mlp"],
    ["q_proj"],
    [".*"],
    "all-linear",
    "(a+)+$",
    ["../self_attn"],
    ["layers.0.self_attn"],
    [],
    ["self_attn"] * 9,
]
CALIBRATIONS = [
    {"ratios": [1.0], "levels": [0.0, 1.0], "table": [[1.0]]},
    {"ratios": [0.5, 1.0], "levels": [0.0, 1.0], "table": [[1.0, -1.0]] * 2},
    {"ratios": [1.0], "levels": [0.0, float("nan")], "table": [[1.0, -1.0]]},
    {"ratios": [1.0], "levels": [0.0, 1.0], "table": [["a", -1.0]]},
    {"ratios": [], "levels": [], "table": []},
    {"ratios": "1", "levels": 2, "table": None},
    {"ratios": [1.0], "levels": [0.0, 1.0], "table": [[10**400, -1.0]]},
    {"ratios": [1.0]},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """[(a base to load on, the files of an adapter by name)], one for each of KINDS."""
    out = []
    for i, kind in enumerate(KINDS):
        base, folder = tiny(dtype=torch.float32), tmp_path_factory.mktemp(f"kind{i}")
        spec = dict(window=5, sinks=2, task_type="CAUSAL_LM", **kind, **(LESS if i in (1, 3) else {}))
        model = gated(model=copy.deepcopy(base), dtype=torch.float32, **spec)
        if kind["gate"] != "none":
            set_calibration(model, Calibration([1.0, 0.25], [0.0, 1.0], [[2.0, -2.0], [1.0, -1.0]]))
        model.save_pretrained(folder)
        out.append((base, {p.name: p.read_bytes() for p in folder.iterdir()}))
    return out


def edited(files: dict, **changes) -> dict:
    config = json.loads(files[CONFIG])
    config.update(changes)
    return files | {CONFIG: json.dumps(config).encode()}


def with_tensors(files: dict, tensors: dict, rng: random.Random) -> dict:
    """Half of the time with a hash that fits: an attacker can count, a damaged disk cannot."""
    files = files | {WEIGHTS: save(tensors)}
    return edited(files, weights_sha256=tensors_sha256(tensors)) if rng.random() < 0.5 else files


def header_of(content: bytes) -> tuple[dict, bytes]:
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# Each takes an adapter's files by name and a generator, and gives other files.
def truncated(files, rng):
    name = rng.choice([CONFIG, WEIGHTS])
    return files | {name: files[name][: rng.randrange(len(files[name]))]}


def bits_flipped(files, rng):
    name = rng.choice([CONFIG, WEIGHTS])
    content = bytearray(files[name])
    for _ in range(rng.choice([1, 1, 3, 50])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return files | {name: bytes(content)}


def reshaped(files, rng):
    tensors = load(files[WEIGHTS])
    name = rng.choice(sorted(tensors))
    t = tensors[name]
    other = [t.flatten(), t[None], t.repeat(2, *[1] * (t.dim() - 1)), t[:0], t.flatten()[:1], torch.zeros(3, 1000)]
    tensors[name] = rng.choice(other).contiguous()
    return with_tensors(files, tensors, rng)


def renamed(files, rng):
    tensors = load(files[WEIGHTS])
    name = rng.choice(sorted(tensors))
    others = [name + "x", "../../../etc/passwd", "", name.replace("layers.0", "layers.7"), name.replace("self_attn", "mlp"),
              name.replace("gatekv_", "lora_"), name.replace("gatekv_gate", "base_layer"), "x" * 5000]  # fmt: skip
    tensors[rng.choice(others)] = tensors.pop(name)
    return with_tensors(files, tensors, rng)


def more_or_fewer(files, rng):
    tensors = load(files[WEIGHTS])
    if rng.random() < 0.5:
        del tensors[rng.choice(sorted(tensors))]
    else:
        tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(97, 48)
    return with_tensors(files, tensors, rng)


def other_dtype(files, rng):
    tensors = load(files[WEIGHTS])
    name = rng.choice(sorted(tensors))
    kind = rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
    tensors[name] = tensors[name].to(kind)
    return with_tensors(files, tensors, rng)


def hostile_header(files, rng):
    content = files[WEIGHTS]
    header, data = header_of(content)
    name = rng.choice(sorted(k for k in header if k != "__metadata__"))
    case = rng.randrange(8)
    if case == 0:
        return files | {WEIGHTS: struct.pack("<Q", rng.choice([2**63, 2**40, 2**30, len(content), 0])) + content[8:]}
    if case == 1:
        header[name]["shape"] = [rng.choice([10**9, 2**62, -1, 0, "3", None]), 10**9]
    elif case == 2:
        header[name]["data_offsets"] = rng.choice([[0, 2**60], [-4, 4], [8, 0], [0, 1], "0", [2**63, 2**63 + 4]])
    elif case == 3:
        header[name]["dtype"] = rng.choice(["F128", "", "I64", "../F32", 7])
    elif case == 4:
        header |= {f"pad{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
    elif case == 5:
        header["__metadata__"] = rng.choice([{"a": 1}, [], "x", {"format": "tf" * 9999}])
    elif case == 6:
        return files | {WEIGHTS: struct.pack("<Q", 17 << 20) + b"{" * (17 << 20)}
    else:
        return files | {WEIGHTS: struct.pack("<Q", 4 << 20) + b"[" * (4 << 20)}
    return files | {WEIGHTS: with_header(header, data)}


def without_a_file(files, rng):
    gone = rng.choice([CONFIG, WEIGHTS])
    left = {n: c for n, c in files.items() if n != gone}
    return left | ({"adapter_model.bin": files[WEIGHTS]} if rng.random() < 0.5 else {})


def hostile_size(files, rng):
    return edited(files, **{rng.choice(SIZES): rng.choice(HUGE)})


def hostile_number(files, rng):
    return edited(files, **{rng.choice(NUMBERS): rng.choice([*HUGE, 1e300, -0.0, 2])})


def hostile_word(files, rng):
    name = rng.choice(WORDS)
    values = {"target_modules": TARGETS, "calibration": CALIBRATIONS}.get(name, ODD)
    return edited(files, **{name: rng.choice([*values, *ODD[-8:]])})


def other_gate(files, rng):
    """Another form, whose parts the file does not have, or has in other sizes."""
    return edited(
        files, gate=rng.choice(["linear", "mlp", "key_mlp", "attention"]), hidden=10**6, less_rank=rng.choice([0, 7])
    )


def unknown_key(files, rng):
    key = rng.choice(["windoww", "__class__", "file_shapes", "../x", "lora_r", "r"])
    return edited(files, **{key: 1})


def other_version(files, rng):
    version = rng.choice(["0.0.1", "0.1.0", "9.9.9", "9.9.9rc1", "", "not a version", None, 7, "1" * 5000])
    return edited(files, gatekv_version=version, **({"a_new_key": 1} if rng.random() < 0.5 else {}))


def other_json(files, rng):
    texts = [b"[]", b"null", b"3", b'"x"', b"", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe\x00", b"{}",
             b'{"peft_type": "LORA"}', b'{"peft_type": "GATEKV"}', b" " * (MOST_CONFIG + 1)]  # fmt: skip
    return files | {CONFIG: rng.choice(texts)}


MUTATIONS = [truncated, bits_flipped, reshaped, renamed, more_or_fewer, other_dtype, hostile_header, without_a_file,
             hostile_size, hostile_number, hostile_word, other_gate, unknown_key, other_version, other_json]  # fmt: skip


def parts(model) -> dict[str, torch.Tensor]:
    """What the model's gates and maps hold, by the names of a file."""
    found = [(w.layer_idx, n, p) for w in wrappers(model) for n, p in (("gate", w.gate()), ("less", w.less())) if p]
    place = "base_model.model.model.layers.{}.self_attn.gatekv_{}.{}"
    return {place.format(i, n, k): v for i, n, part in found for k, v in part.state_dict().items()}


def peak() -> int:
    """Most memory this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def outcome(folder, base) -> str:
    """ "loaded" or the error's first line; fails on anything else."""
    try:
        GateKVConfig.from_pretrained(folder)
    except CLEAR as error:
        checked = str(error)
        assert len(checked) > 20, f"{type(error).__name__}: {checked!r} names no cure"
    else:
        checked = None
    try:
        model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    except CLEAR as error:
        return f"{type(error).__name__}: {error}"
    except (KeyError, RecursionError) as error:  # PEFT's own reading of the config, before it knows whose adapter it is
        assert checked is not None, "what PEFT alone stumbles over, GateKVConfig.from_pretrained explains"
        return f"PEFT: {type(error).__name__}"
    assert checked is None, f"loaded although {checked}"
    got, wanted = parts(model), load_file(folder / WEIGHTS)
    assert got.keys() == wanted.keys(), "weights that nobody saved"
    assert all(torch.equal(got[k], wanted[k].float()) for k in got), "other weights than the file's"
    return "loaded"


@pytest.mark.parametrize("block", [0, 1, *(pytest.param(i, marks=pytest.mark.exhaustive) for i in range(2, 10))])
def test_two_hundred_mutated_folders(saved, tmp_path, block):
    before, start, found = peak(), time.process_time(), []
    for i in range(block * 20, block * 20 + 20):
        rng = random.Random(i)
        base, files = saved[rng.randrange(len(saved))]
        mutate = MUTATIONS[i % len(MUTATIONS)]
        folder = tmp_path / str(i)
        folder.mkdir()
        for name, content in mutate(files, rng).items():
            (folder / name).write_bytes(content)
        found.append((i, mutate.__name__, outcome(folder, base)))
        shutil.rmtree(folder)
    print("\n".join(f"{i} {name}: {what[:150]}" for i, name, what in found))
    assert peak() - before < 200, "memory follows the file, not what the config says"
    assert time.process_time() - start < 20, "seconds of a core for twenty folders"


def test_an_untouched_folder_loads(saved, tmp_path):
    for i, (base, files) in enumerate(saved):
        folder = tmp_path / str(i)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        assert outcome(folder, base) == "loaded"


@pytest.mark.parametrize("change,match", [
    (dict(hidden=10**6), "has shape .* the config asks for"), (dict(less_hidden=10**6), "has shape"), (dict(hidden=10**9), "hidden must be at least 1 and at most"),
    (dict(less_rank=10**6), "has shape"), (dict(less_hidden=10**9), "sizes of at most"), (dict(less_rank=10**30), "less_rank must be int"), (dict(hidden="8"), "hidden must be int"),
    (dict(threshold=float("nan")), "threshold must be float"), (dict(target_modules=["q_proj"]), "target_modules names .q_proj., and no full-attention layer"),
    (dict(target_modules="(a+)+$"), "target_modules must be list"), (dict(gatekv_version="9.9", new=1), "Saved by gatekv '9.9', this is .* pip install -U"),
    (dict(weights_sha256=None), "sha256"), (dict(task_type="SEQ_CLS"), "task_type='CAUSAL_LM' only"),
    (dict(peft_type="LORA"), "of type 'LORA', not GATEKV"), (dict(gate="attention", head_dim=2**20, heads=2**20), "missing tensor"),
])  # fmt: skip
def test_hostile_configs_are_told_apart(saved, tmp_path, change, match):
    base, files = saved[1]
    for name, content in edited(files, **change).items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CLEAR, match=match):
        GateKVConfig.from_pretrained(tmp_path)
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
