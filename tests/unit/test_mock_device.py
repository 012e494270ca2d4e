"""On a device that is not the CPU: nothing is left behind there, nothing is asked for in vain, and results are the same."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import gated, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from mock_device import MixedDevices, MockDevices, MockTensor, host

import gatekv
from gatekv.cache.layer import KVLayer
from gatekv.recipes import common

IDS = torch.randint(1, 90, (2, 160), generator=torch.Generator().manual_seed(0))
POLICIES = [
    ("full", None),
    ("snapkv+ada", 0.5),
    ("gate+global", 0.5),
    ("gate", None),
    ("streaming_llm", 0.4),
    ("h2o", 0.5),
]


def model_of():
    model = tiny(dtype=torch.float32, max_position_embeddings=4096)
    model.generation_config.eos_token_id = 94
    return gated(dtype=torch.float32, model=model, window=4, sinks=2)


@pytest.fixture
def devices():
    return MockDevices()


@pytest.fixture(scope="module")
def letters():
    """Characters as tokens, line ends among them."""
    core = Tokenizer(models.WordLevel({chr(i): i - 32 for i in range(32, 127)} | {"\n": 95}, unk_token="?"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="~", pad_token="|")


def test_the_device_computes_what_the_cpu_does(devices):
    weight, x = torch.randn(5, 4), torch.randn(3, 4)
    layer = torch.nn.Linear(4, 5, bias=False)
    layer.weight.data.copy_(weight)
    with devices:
        moved = devices.move(layer)
        y = moved(devices.tensor(x))
        y.sum().backward()
        assert y.device == torch.device("meta:0") and torch.equal(host(y), x @ weight.T)
        assert torch.allclose(host(moved.weight.grad), x.sum(0).expand(5, 4))
        z = torch.zeros(3, device=y.device)
        z += 1
        z[1:].mul_(2)
        assert isinstance(z, MockTensor) and host(z).tolist() == [1, 2, 2]
        assert not devices.reads and not devices.written


def test_mixed_devices_are_refused(devices):
    with devices:
        one, two = devices.tensor(torch.ones(3)), devices.tensor(torch.ones(3), "meta:1")
        for wrong in (lambda: one + two, lambda: one + torch.ones(3), lambda: torch.stack([torch.ones(3), one])):
            with pytest.raises(MixedDevices, match="mixes"):
                wrong()
        assert host(one * torch.tensor(2.0)).tolist() == [2, 2, 2], "a number may be anywhere"
        assert host(one + two.to("meta:0")).tolist() == [2, 2, 2]
        assert devices.written == {"meta:1 -> meta:0 elsewhere": 1}


def test_what_the_host_waits_for_is_counted(devices):
    with devices:
        x = devices.tensor(torch.arange(4.0))
        assert x[1].item() == 1 and x.tolist() == [0, 1, 2, 3] and bool((x > -1).all())
        assert host(x[x > 1]).tolist() == [2, 3] and host(x.nonzero()[:, 0]).tolist() == [1, 2, 3]
        assert x.cpu().device.type == "cpu"
        assert sorted(k.split()[0] for k in devices.reads) == ["__bool__", "cpu", "index", "item", "nonzero", "tolist"]
        torch.tensor([1, 2], device=x.device)
        x[torch.tensor([0, 1])]
        assert sorted(devices.written) == ["cpu -> meta:0 elsewhere", "index cpu -> meta:0 elsewhere"]


def decode(model, ids, mask, policy, budget, steps=6):
    """(tokens, flags, memory, cache) of a greedy decode, step by step."""
    cache, found = gatekv.KVCache(model, policy, budget), []
    logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits
    for _ in range(steps):
        token = logits[:, -1:].argmax(-1)
        found.append(token)
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        positions = mask.sum(-1, keepdim=True) - 1
        logits = model(input_ids=token, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    return torch.cat(found, 1), torch.stack(cache.flags()), cache.memory(), cache


@pytest.mark.parametrize("policy,budget", POLICIES)
@torch.no_grad()
def test_decoding_stays_on_the_device(policy, budget, devices):
    mask = torch.ones_like(IDS)
    mask[1, :20] = 0
    wanted, flags, memory, _ = decode(model_of(), IDS * mask, mask, policy, budget)
    model = devices.move(model_of())
    with devices:
        found, kept, held, cache = decode(model, devices.tensor(IDS * mask), devices.tensor(mask), policy, budget)
    assert torch.equal(host(found), wanted) and torch.equal(host(kept), flags) and held == memory
    tensors = [t for layer in cache.layers if isinstance(layer, KVLayer) for t in layer.tensors() if t is not None]
    assert len(tensors) > 4 and all(isinstance(t, MockTensor) for t in tensors)


@pytest.mark.parametrize("policy,budget", [("full", None), ("snapkv", 0.5), ("gate+global", 0.5)])
@torch.no_grad()
def test_one_shot_policies_read_nothing_back_at_later_tokens(policy, budget, devices):
    model = devices.move(model_of())
    ids = devices.tensor(IDS)
    with devices:
        cache = gatekv.KVCache(model, policy, budget)
        model(input_ids=ids, past_key_values=cache)
        for step in range(6):
            devices.reads.clear()
            model(input_ids=ids[:, step : step + 1], past_key_values=cache)
            asked = {where: n for where, n in devices.reads.items() if "gatekv/" in where}
            assert not asked or step == 0, asked  # pages are laid out at the first


@torch.no_grad()
def test_flags_are_on_the_device(devices):
    wanted = gatekv.flags(model_of(), IDS, policy="snapkv", budget=0.5)
    model = devices.move(model_of())
    with devices:
        found = gatekv.flags(model, devices.tensor(IDS), policy="snapkv", budget=0.5)
    assert isinstance(found, MockTensor) and torch.equal(host(found), wanted)


def both(name, argv, letters, devices, monkeypatch, tmp_path, capsys):
    """What a recipe printed and wrote, on the CPU and on a device: ((text, folder), (text, folder))."""
    module, found = importlib.import_module(f"gatekv.recipes.{name}"), []
    for mock in (False, True):
        folder = tmp_path / ("device" if mock else "cpu")
        model = devices.move(model_of()) if mock else model_of()
        monkeypatch.setattr(common, "load_model", lambda *args, model=model, **kwargs: (model, letters))
        given = ["--device", "cpu", "--dtype", "float32", *(part.replace("OUT", str(folder)) for part in argv)]
        with torch.no_grad():
            if mock:
                with devices:
                    module.main(given)
            else:
                module.main(given)
        found.append((capsys.readouterr().out.replace(str(folder), "OUT"), folder))
    return found


def test_generate_on_a_device(letters, devices, monkeypatch, tmp_path, capsys):
    text = "It was a dark and stormy night; the rain fell in torrents, except at intervals. " * 4
    argv = ["--policy", "gate+global", "--budget", "0.5", "--prompt", text, "--max_new_tokens", "6"]
    (wanted, _), (found, _) = both("generate", argv, letters, devices, monkeypatch, tmp_path, capsys)
    assert found == wanted and "generated:" in found


def test_evaluate_on_a_device(letters, devices, monkeypatch, tmp_path, capsys):
    argv = ["--policies", "gate+global,snapkv,h2o,untrained+global", "--budgets", "0.5", "--tasks", "ppl,recall"]
    argv += ["--n", "1", "--n_ppl", "1", "--tokens", "400", "--out", "OUT", "--sinks", "2", "--window", "8"]
    (_, cpu), (_, device) = both("evaluate", argv, letters, devices, monkeypatch, tmp_path, capsys)
    wanted, found = (json.loads((folder / "results.json").read_text())["rows"] for folder in (cpu, device))
    assert len(found) == len(wanted) > 6
    for a, b in zip(wanted, found):
        assert a.get("refused") is None and (a["policy"], a["task"]) == (b["policy"], b["task"])
        numbers = [key for key in a if isinstance(a[key], float)]
        assert {"score", "bytes_ratio", "bytes_ratio_end"} <= set(numbers)
        assert [b[key] for key in numbers] == pytest.approx([a[key] for key in numbers], abs=1e-5)


def test_report_on_a_device(letters, devices, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "text.txt").write_text("The rain fell in torrents, except at occasional intervals. " * 5)
    argv = ["--results", "", "--text", str(tmp_path / "text.txt"), "--policies", "gate+global,snapkv,random"]
    argv += ["--budgets", "0.5", "--out", "OUT"]
    (_, cpu), (_, device) = both("report", argv, letters, devices, monkeypatch, tmp_path, capsys)
    wanted, found = ((folder / "report.html").read_text().replace(str(folder), "OUT") for folder in (cpu, device))
    assert found == wanted


def test_calibration_on_a_device(letters, devices, tmp_path):
    from gatekv.evaluation.tasks import heldout_texts
    from gatekv.training.calibrate import calibrate
    from gatekv.training.data import TrainingData

    (tmp_path / "text.txt").write_text(heldout_texts([])[0][:60_000])
    found = []
    for mock in (False, True):
        data = TrainingData(letters, [str(tmp_path / "text.txt")], 256, retrieval_share=0.0, answer_weight=1.0, seed=0)
        model = model_of()
        if mock:
            with torch.no_grad(), devices:
                found.append(calibrate(devices.move(model), data, rows=1))
        else:
            found.append(calibrate(model, data, rows=1))
    assert found[1].levels == found[0].levels
    assert sum(found[1].table, []) == pytest.approx(sum(found[0].table, []), abs=1e-4)


def test_export_on_a_device(letters, devices, monkeypatch, tmp_path, capsys):
    from safetensors.torch import load_file

    argv = ["--policy", "gate+global", "--budget", "0.5", "--tokens", "160", "--rows", "2", "--out", "OUT"]
    (_, cpu), (_, device) = both("export", argv, letters, devices, monkeypatch, tmp_path, capsys)
    wanted, found = (load_file(folder / "flags-00000.safetensors") for folder in (cpu, device))
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
