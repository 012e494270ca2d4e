"""The PEFT front door: round trips, strictness, the teacher, wrong bases. Nothing loads silently wrong."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from conftest import gated, padded_batch, tiny
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    peft_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file

import gatekv
from gatekv.adapter import set_calibration
from gatekv.fingerprint import tensors_sha256
from gatekv.gates.calibration import Calibration
from gatekv.modules import wrappers


@pytest.fixture
def saved(tmp_path):
    model = gated(dtype=torch.float32, window=5, sinks=2)
    set_calibration(model, Calibration([1.0, 0.25], [0.0, 1.0], [[2.0, -2.0], [1.0, -1.0]]))
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def flags(model, policy="gate+global", budget=0.5):
    ids, mask = padded_batch([60, 45])
    cache = gatekv.KVCache(model, policy, budget)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, past_key_values=cache).logits
        more = model(ids[:, :3], attention_mask=torch.cat([mask, mask[:, -3:]], 1), past_key_values=cache).logits
    return cache.flags(), logits, more


def test_round_trip_is_bit_identical(saved):
    model, folder = saved
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all("gatekv_gate" in name for name in tensors), "only trained weights"
    loaded = PeftModel.from_pretrained(tiny(dtype=torch.float32), folder)
    for a, b in zip(flags(model), flags(loaded)):
        for x, y in zip(a, b):
            assert torch.equal(x, y)
    assert wrappers(loaded)[0].calibration() == wrappers(model)[0].calibration()
    assert not any(p.requires_grad for p in loaded.parameters())
    assert all(p.requires_grad for n, p in PeftModel.from_pretrained(
        tiny(dtype=torch.float32), folder, is_trainable=True).named_parameters() if "gatekv_gate" in n)  # fmt: skip


def test_config_records_version_hash_and_base(saved):
    _, folder = saved
    config = PeftConfig.from_pretrained(folder)
    assert isinstance(config, gatekv.GateKVConfig) and config.peft_type == "GATEKV"
    assert config.gatekv_version == gatekv.__version__
    assert config.weights_sha256 == tensors_sha256(load_file(folder / "adapter_model.safetensors"))
    assert config.base_fingerprint["num_key_value_heads"] == 3 and config.window == 5


def test_auto_model_loads_base_and_adapter(tmp_path):
    base = tiny(dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = gated(model=AutoModelForCausalLM.from_pretrained(tmp_path / "base"), dtype=torch.float32, window=5)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(flags(model)[2], flags(loaded)[2])


def test_disable_adapter_is_the_plain_model_in_training_mode_too():
    model = gated(dtype=torch.float32, window=2)
    ids, _ = padded_batch([40])
    plain = tiny(dtype=torch.float32)(ids, use_cache=False).logits
    model.train()
    assert not torch.equal(model(ids, use_cache=False).logits, plain)
    with model.disable_adapter():
        assert torch.equal(model(ids, use_cache=False).logits, plain)
    model.eval()
    assert torch.equal(model(ids, use_cache=False).logits, plain), (
        "gates act in training, in `parallel` and in a KVCache"
    )


def test_only_gates_are_trainable_and_counted(capsys):
    model = get_peft_model(tiny(dtype=torch.float32), gatekv.GateKVConfig())
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all("gatekv_gate" in n for n in names)
    model.print_trainable_parameters()
    assert "trainable params" in capsys.readouterr().out


def test_several_adapters_are_switched_and_deleted(saved):
    model, folder = saved
    model.add_adapter("other", gatekv.GateKVConfig(window=9))
    before = flags(model)[2]
    model.set_adapter("other")
    assert not torch.equal(flags(model, "gate", None)[2], before)
    assert gatekv.KVCache(model).config.window == 9
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(flags(model)[2], before)


def test_a_file_loads_under_any_name_and_as_it_was_written_before(saved):
    model, folder = saved
    wanted, path = flags(model)[2], folder / "adapter_model.safetensors"
    tensors = load_file(path)
    assert all(".gatekv_gate.default." not in name for name in tensors)
    two = PeftModel.from_pretrained(tiny(dtype=torch.float32), folder, adapter_name="first").eval()
    two.load_adapter(folder, "second")
    for name in ("first", "second"):
        two.set_adapter(name)
        assert torch.equal(flags(two)[2], wanted)
    old = {name.replace(".gatekv_gate.", ".gatekv_gate.default."): t for name, t in tensors.items()}
    save_file(old, path)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["weights_sha256"] = tensors_sha256(old)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    two.load_adapter(folder, "third")
    two.set_adapter("third")
    assert torch.equal(flags(two)[2], wanted)


def test_adapter_goes_onto_a_model_that_has_bare_wrappers():
    base = tiny(dtype=torch.float32)
    gatekv.KVCache(base, "keydiff", 0.5)
    model = gated(model=base, dtype=torch.float32, window=5)
    assert torch.equal(flags(model)[2], flags(gated(dtype=torch.float32, window=5))[2])
    plain = gatekv.detach(model)
    ids, _ = padded_batch([40])
    assert torch.equal(plain(ids).logits, tiny(dtype=torch.float32)(ids).logits)
    assert not wrappers(plain)


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))


def edit_tensors(folder, edit, rehash=True):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    if rehash:
        edit_config(folder, weights_sha256=tensors_sha256(tensors))


def load(folder):
    return PeftModel.from_pretrained(tiny(dtype=torch.float32), folder)


@pytest.mark.parametrize("case,match", [
    ("stray", "stray tensor"), ("missing", "missing tensor"), ("shape", "has shape"), ("flipped", "sha256"),
    ("renamed", "missing tensor"), ("truncated", "truncated or damaged"), ("no_weights", "has no adapter_model.safetensors"),
    ("pickle", "never loads"), ("empty", "truncated or damaged"),
])  # fmt: skip
def test_damaged_folders_are_refused(saved, case, match):
    _, folder = saved
    path = folder / "adapter_model.safetensors"
    first = sorted(load_file(path))[0]
    edits = {
        "stray": lambda t: t.update(extra=torch.zeros(2)),
        "missing": lambda t: t.pop(first),
        "shape": lambda t: t.update({first: torch.zeros(7)}),
        "flipped": lambda t: t.update({first: t[first] + 1e-3}),
        "renamed": lambda t: t.update({first + "x": t.pop(first)}),
    }
    if case in edits:
        edit_tensors(folder, edits[case], rehash=case != "flipped")
    elif case == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif case == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
        if case == "pickle":
            torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=match):
        load(folder)


def test_unknown_config_key_is_an_error_with_the_nearest_name(saved):
    _, folder = saved
    edit_config(folder, windoww=3)
    with pytest.raises(TypeError, match="Did you mean 'window'"):
        load(folder)
    with pytest.raises(TypeError, match="Did you mean 'sinks'"):
        gatekv.GateKVConfig(sink=3)


def test_wrong_base_shapes_are_an_error_other_weights_a_warning(saved, caplog):
    _, folder = saved
    with pytest.raises(ValueError, match="num_key_value_heads=3, but this model has 6"):
        PeftModel.from_pretrained(tiny(dtype=torch.float32, num_key_value_heads=6), folder)
    with pytest.raises(ValueError, match="num_hidden_layers=2, but this model has 3"):
        PeftModel.from_pretrained(tiny(dtype=torch.float32, num_hidden_layers=3), folder)
    with pytest.raises(ValueError, match="model_type=llama, but this model has qwen3"):
        PeftModel.from_pretrained(tiny("qwen3", dtype=torch.float32), folder)
    from transformers.utils import logging

    logging.get_logger("gatekv.adapter").addHandler(caplog.handler)
    PeftModel.from_pretrained(tiny(dtype=torch.float32, seed=5), folder)
    assert "weights differ" in caplog.text
    caplog.clear()
    load(folder)
    assert "weights differ" not in caplog.text
    tuned = tiny(dtype=torch.float32)
    with torch.no_grad():  # the embeddings stay, as under most fine-tuning
        tuned.model.layers[-1].mlp.down_proj.weight.add_(0.1)
    PeftModel.from_pretrained(tuned, folder)
    assert "weights differ" in caplog.text


def test_a_copy_elsewhere_loads(saved, tmp_path):
    model, folder = saved
    shutil.move(folder, tmp_path / "moved")
    assert torch.equal(flags(load(tmp_path / "moved"))[2], flags(model)[2])


FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


@pytest.mark.parametrize("folder", sorted(FIXTURES.glob("adapter-*")), ids=lambda p: p.name)
def test_an_adapter_of_every_past_version_gives_the_flags_it_gave(folder):
    fixture = runpy.run_path(str(FIXTURES / "adapter.py"))
    model = PeftModel.from_pretrained(fixture["base"](), folder).eval()
    assert fixture["flags"](model) == json.loads((folder / "flags.json").read_text())
    kept = [sum(map(sum, layer[0])) for layer in fixture["flags"](model)[0]]
    assert len(set(kept)) > 1, "the flags say something"


def moved(model, by):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gatekv_gate" in name:
                p.add_(by)
    return model


def gate_tensors(model):
    return {name: t.clone() for name, t in get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q_proj"]}])
def test_a_folder_is_loaded_over_an_adapter_that_is_there(tmp_path, lora):
    """As Trainer's load_best_model_at_end does: weights and the thresholds that belong to them."""
    first, second = (Calibration([1.0], [0.0, 1.0], [[2.0, -x]]) for x in (2.0, 3.0))
    model = gated(dtype=torch.float32, window=5, sinks=2, lora=lora)
    for name, calibration in (("one", first), ("two", second)):
        set_calibration(moved(model, 0.1), calibration, 0.5 if name == "one" else 0.6)
        model.save_pretrained(tmp_path / name)
    model.load_adapter(tmp_path / "one", "default")
    saved = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert all(torch.equal(t, saved[name]) for name, t in gate_tensors(model).items())
    assert {(repr(w.calibration()), w.specs["default"].threshold) for w in wrappers(model)} == {(repr(first), 0.5)}
    model.save_pretrained(tmp_path / "again")
    for folder in ("one", "again"):
        again = PeftModel.from_pretrained(tiny(dtype=torch.float32), tmp_path / folder)
        assert torch.equal(flags(again)[2], flags(model)[2]) and wrappers(again)[0].calibration() == first
    model.load_adapter(tmp_path / "two", "default")
    assert model.peft_config["default"].threshold == 0.6 and wrappers(model)[0].calibration() == second


@pytest.mark.parametrize("case,match", [
    ("stray", "stray tensor"), ("missing", "missing tensor"), ("shape", "has shape"), ("flipped", "sha256"),
])  # fmt: skip
def test_a_damaged_folder_is_not_loaded_over_an_adapter(saved, case, match):
    model, folder = saved
    moved(model, 1)
    before, calibration = gate_tensors(model), wrappers(model)[0].calibration()
    first = sorted(before)[0]
    edit = {"stray": lambda t: t.update(extra=torch.zeros(2)), "missing": lambda t: t.pop(first),
            "shape": lambda t: t.update({first: torch.zeros(7)}), "flipped": lambda t: t[first].add_(1)}  # fmt: skip
    edit_tensors(folder, edit[case], rehash=case != "flipped")
    edit_config(folder, calibration=None)
    with pytest.raises(ValueError, match=match):
        model.load_adapter(folder, "default")
    assert all(torch.equal(t, before[name]) for name, t in gate_tensors(model).items())
    assert wrappers(model)[0].calibration() == calibration
    set_peft_model_state_dict(model, before)  # a refused hash is not kept


@pytest.mark.parametrize("over", [False, True])
def test_a_file_that_changes_after_its_config_was_read_is_refused(saved, over, monkeypatch):
    model, folder = saved
    model = model if over else tiny(dtype=torch.float32)
    real = peft_model.load_peft_weights
    monkeypatch.setattr(peft_model, "load_peft_weights", lambda *a, **k: {n: t + 1 for n, t in real(*a, **k).items()})
    with pytest.raises(ValueError, match="sha256"):
        model.load_adapter(folder, "default") if over else PeftModel.from_pretrained(model, folder)


def test_tensors_of_a_live_model_have_no_hash_to_keep(saved, caplog):
    from transformers.utils import logging

    model, folder = saved
    logging.get_logger("gatekv.adapter").addHandler(caplog.handler)
    set_peft_model_state_dict(model, gate_tensors(model))
    assert "calibrated" not in caplog.text
    halves = {name: t * 0.5 for name, t in gate_tensors(model).items()}
    for loaded in (model, load(folder), get_peft_model(tiny(dtype=torch.float32), PeftConfig.from_pretrained(folder))):
        set_peft_model_state_dict(loaded, halves)
        assert all(torch.equal(t, halves[name]) for name, t in gate_tensors(loaded).items())
    assert "calibrate again" in caplog.text


def test_an_edited_config_stays_as_it_was_edited_and_another_window_is_told(saved, caplog):
    from transformers.utils import logging

    _, folder = saved
    config = PeftConfig.from_pretrained(folder)
    config.calibration = None
    loaded = PeftModel.from_pretrained(tiny(dtype=torch.float32), folder, config=config)
    assert wrappers(loaded)[0].calibration() is None
    logging.get_logger("gatekv.adapter").addHandler(caplog.handler)
    gated(dtype=torch.float32, window=9, sinks=2).load_adapter(folder, "default")
    assert "window of the adapter 'default'" in caplog.text
