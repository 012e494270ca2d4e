"""A run that begins with the gates of another adapter."""

import pytest
import torch
from conftest import gated, tiny

from gatekv import GateKVConfig
from gatekv.modules import wrappers
from gatekv.training.start import start_from


def wanted(**options) -> GateKVConfig:
    return GateKVConfig(task_type="CAUSAL_LM", **{"hidden": 8, "window": 2, "sinks": 1, "lora": {"r": 2}} | options)


def base():
    return tiny(dtype=torch.float32)


def saved(path, **options) -> str:
    gated(dtype=torch.float32, model=base(), **{"hidden": 8} | options).save_pretrained(path)
    return str(path)


def test_gates_begin_as_they_were_and_all_learns(tmp_path):
    model = start_from(base(), saved(tmp_path), wanted())
    before = gated(dtype=torch.float32, model=base(), hidden=8)
    for now, then in zip(wrappers(model), wrappers(before), strict=True):
        for (name, a), (_, b) in zip(now.gate().named_parameters(), then.gate().named_parameters(), strict=True):
            assert torch.equal(a, b) and a.requires_grad, name
    config = model.peft_config["default"]
    assert (config.window, config.sinks, config.lora["r"], config.calibration) == (2, 1, 2, None)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in learns) and all("lora_" in n or "gatekv_gate" in n for n in learns)


def test_nothing_of_the_first_adapter_stays_behind(tmp_path):
    model = start_from(base(), saved(tmp_path), wanted(lora=None))
    assert list(model.peft_config) == ["default"]
    assert len(wrappers(model)) == base().config.num_hidden_layers


def test_without_an_adapter_gates_are_fresh():
    biases = {float(p.detach().mean()) for n, p in start_from(base(), "", wanted(initial_logit=-5.0)).named_parameters()
              if n.endswith("out.bias")}  # fmt: skip
    assert biases == {-5.0}


@pytest.mark.parametrize("options,change,match", [
    ({"hidden": 8}, {"hidden": 16}, "hidden 8, and hidden is 16: go on with --hidden 8"),
    ({"hidden": 8}, {"gate": "linear"}, "gate 'mlp', and gate is 'linear'"),
    ({"gate": "none", "less_rank": 2, "less_hidden": 4}, {}, "no gate to begin with"),
    ({"lora": {"r": 2}}, {}, "merge_lora"),
])  # fmt: skip
def test_gates_of_another_kind_are_refused(tmp_path, options, change, match):
    with pytest.raises(ValueError, match=match):
        start_from(base(), saved(tmp_path, **options), wanted(**change))


def test_gates_of_another_base_are_refused(tmp_path):
    with pytest.raises(ValueError, match="base"):
        start_from(tiny("qwen3", dtype=torch.float32), saved(tmp_path), wanted())
