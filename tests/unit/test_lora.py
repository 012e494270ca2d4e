"""LoRA beside gates in one adapter: the law, one folder, switched and disabled together, merged, refused where wrong."""

import json

import pytest
import torch
from conftest import assert_close, gated, padded_batch, parallel_logits, plain_logits, recurrent_logits, tiny
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.utils import logging

import gatekv
from gatekv import lora as lora_module
from gatekv.cache.kvcache import KVCache
from gatekv.evaluation import frontier
from gatekv.evaluation.tasks.item import Item, log_loss
from gatekv.fingerprint import lora_sha256, tensors_sha256
from gatekv.modules import base_model, gates_off, wrappers

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def tuned(family="llama", dtype=torch.float64, seed=0, model=None, lora=None, **spec):
    """Random gates that drop half of the tokens, and LoRA that moves the logits."""
    model = gated(family, dtype, seed, model, **({"window": 4, "sinks": 2} | spec), lora=lora or LORA)
    return loud(model, seed)


def loud(model, seed=0, adapter="default"):
    """LoRA starts as nothing; here it says something."""
    generator = torch.Generator().manual_seed(seed + 9)
    for name, p in model.named_parameters():
        if f".lora_B.{adapter}." in name:
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def flags_and_logits(model, policy="gate+global", budget=0.5):
    ids, mask = padded_batch([50, 33])
    cache = KVCache(model, policy, budget)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        more = model(ids[:, :3], attention_mask=torch.cat([mask, mask[:, -3:]], 1), past_key_values=cache).logits
    return cache.flags(), more


@pytest.mark.parametrize("gate", ["mlp", "key_mlp"])
def test_parallel_is_recurrent_with_lora(family, gate):
    model = tuned(family, gate=gate)
    ids, mask = padded_batch([60, 41, 17])
    wanted = parallel_logits(model, ids, mask)
    found = recurrent_logits(model, ids, mask, KVCache(model, "gate"), [20, 21, 45])
    assert_close(found, wanted, mask)
    with model.disable_adapter():
        assert (plain_logits(model, ids, mask) - wanted)[mask.bool()].abs().max() > 0.1


@pytest.mark.parametrize("policy", ["full", "snapkv", "gate+global"])
def test_policies_run_over_the_tuned_model(family, policy):
    model = tuned(family)
    ids, mask = padded_batch([60, 41])
    budget = 1.0 if policy == "full" else 0.9
    cache = KVCache(model, policy, budget)
    prefill = recurrent_logits(model, ids, mask, cache, [])
    assert_close(prefill, plain_logits(model, ids, mask), mask)  # a dense prefill is the tuned model's
    assert torch.stack(cache.flags()).float().mean() <= budget * mask.float().mean() + 0.05


def test_every_cell_of_an_evaluation_reads_the_tuned_model(family):
    """With nothing evicted each policy's divergence from the tuned model's whole cache is 0: LoRA is in force for all,
    under the untrained control's gate too."""
    model = tuned(family, torch.float32)
    ids = padded_batch([60])[0][0].tolist()
    item = Item(ids[:50], [(ids[50:53], ids[53:])], score=log_loss)
    policies = ("untrained_alone+global", "snapkv", "gate+global", "l2", "untrained+global", "random")
    frontier.add_untrained(model)
    with torch.no_grad():
        found = frontier.run_item(model, item, [frontier.FULL, *((policy, 1.0) for policy in policies)])
    assert [record["refused"] for record in found] == [None] * 7
    assert all(abs(record["kls"][0]) < 1e-5 for record in found)


def test_the_teacher_is_tuned_and_the_disabled_model_is_plain(family):
    model = tuned(family)
    ids, mask = padded_batch([40, 25])
    alone = loud(gated(family, torch.float64, gate="none", lora=LORA))
    tuned_only, plain = plain_logits(alone, ids, mask), plain_logits(tiny(family), ids, mask)
    model.train()
    with gates_off(model):
        assert torch.equal(plain_logits(model, ids, mask), tuned_only)
    with model.disable_adapter():
        assert torch.equal(plain_logits(model, ids, mask), plain)
    assert not torch.allclose(plain_logits(model, ids, mask), tuned_only), "in training the gates act"
    assert not torch.allclose(tuned_only, plain)


def test_one_folder_round_trip_is_bit_identical(family, tmp_path):
    model = tuned(family, torch.float32)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert {n.split(".")[-2] for n in names if "lora_" in n} == {"lora_A", "lora_B"} and any(
        "gatekv_gate" in n for n in names
    )
    assert not any("default" in n or "base_layer.weight" in n for n in names), "neither adapter names nor base weights"
    for adapter in ("default", "another"):
        loaded = PeftModel.from_pretrained(tiny(family, torch.float32), tmp_path, adapter_name=adapter)
        for a, b in zip(flags_and_logits(model), flags_and_logits(loaded)):
            assert all(torch.equal(x, y) for x, y in zip(a, b))
        assert not any(p.requires_grad for p in loaded.parameters())
        assert lora_sha256(loaded) == lora_sha256(model)
    again = PeftModel.from_pretrained(tiny(family, torch.float32), tmp_path, is_trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, _ in again.named_parameters() if "gatekv_" in n or ".lora_" in n
    }


def test_the_config_writes_out_what_peft_would_choose(tmp_path):
    model = get_peft_model(tiny(dtype=torch.float32), gatekv.GateKVConfig(lora={}))
    model.save_pretrained(tmp_path)
    lora = json.loads((tmp_path / "adapter_config.json").read_text())["lora"]
    assert lora["r"] == lora["lora_alpha"] == 8 and lora["target_modules"] == ["q_proj", "v_proj"]
    every = get_peft_model(tiny(dtype=torch.float32), gatekv.GateKVConfig(lora={"target_modules": "all-linear"}))
    assert len({n.split(".lora_A")[0] for n, _ in every.named_parameters() if ".lora_A." in n}) == 2 * 7


@pytest.mark.parametrize("case,match", [
    ("missing", "missing tensor"), ("stray", "stray tensor"), ("shape", "has shape"), ("flipped", "sha256"),
])  # fmt: skip
def test_damaged_lora_tensors_are_refused(tmp_path, case, match):
    tuned(dtype=torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if "lora_B" in n)
    if case == "missing":
        del tensors[name]
    elif case == "stray":
        tensors[name.replace("lora_B", "lora_C")] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(3, 3) if case == "shape" else tensors[name] + 1e-3
    save_file(tensors, path)
    if case != "flipped":  # a folder that fits its own hash
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        config["weights_sha256"] = tensors_sha256(tensors)
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(tiny(dtype=torch.float32), tmp_path)


def test_several_adapters_switch_gate_and_lora_together(tmp_path):
    first, other = tuned(dtype=torch.float32), {"r": 2, "target_modules": ["o_proj"]}
    second = tuned(dtype=torch.float32, seed=4, model=tiny(dtype=torch.float32), lora=other)
    wanted = [flags_and_logits(m)[1] for m in (first, second)]
    for name, m in (("a", first), ("b", second)):
        m.save_pretrained(tmp_path / name)
    both = PeftModel.from_pretrained(tiny(dtype=torch.float32), tmp_path / "a", adapter_name="a")
    both.load_adapter(tmp_path / "b", "b")
    assert torch.equal(flags_and_logits(both)[1], wanted[0]), "loading one does not switch to it"
    both.set_adapter("b")
    assert torch.equal(flags_and_logits(both)[1], wanted[1])
    assert all(".b." in n for n, p in both.named_parameters() if p.requires_grad)
    both.delete_adapter("b")
    assert both.active_adapters == ["a"] and torch.equal(flags_and_logits(both)[1], wanted[0])
    assert not any(".b." in n for n, _ in both.named_parameters())


def test_deleting_leaves_all_layers_with_one_adapter_whatever_they_hold():
    model = tuned(dtype=torch.float32)
    model.add_adapter("lora_only", gatekv.GateKVConfig(gate="none", lora={"r": 2, "target_modules": ["o_proj"]}))
    model.delete_adapter("default")
    assert model.active_adapters == ["lora_only"]
    assert wrappers(model)[0].in_force() == ["lora_only"] and wrappers(model)[0].active() is None


def test_merging_folds_lora_and_keeps_the_gates(family):
    model = tuned(family)
    before, logits = flags_and_logits(model)
    model.merge_adapter()
    assert torch.allclose(flags_and_logits(model)[1], logits, atol=1e-10)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        gatekv.detach(model)
    model.unmerge_adapter()
    model.merge_lora()
    assert model.peft_config["default"].lora is None and not any("lora_" in n for n, _ in model.named_parameters())
    after, merged = flags_and_logits(model)
    assert torch.allclose(merged, logits, atol=1e-10) and all(torch.equal(a, b) for a, b in zip(before, after))
    with model.disable_adapter():
        ids, mask = padded_batch([30])
        assert not torch.allclose(plain_logits(model, ids, mask), plain_logits(tiny(family), ids, mask)), (
            "the base changed"
        )
    with pytest.raises(ValueError, match="no LoRA"):
        model.merge_lora()


def test_what_is_left_after_merging_belongs_to_the_merged_base(tmp_path, caplog):
    """Its embeddings are the plain base's: the fingerprint has to tell them apart by a layer."""
    model = tuned(dtype=torch.float32)
    model.merge_lora()
    model.save_pretrained(tmp_path / "gate")
    base = gatekv.detach(model)
    logging.get_logger("gatekv.adapter").addHandler(caplog.handler)
    PeftModel.from_pretrained(base, tmp_path / "gate")
    assert "weights differ" not in caplog.text
    PeftModel.from_pretrained(tiny(dtype=torch.float32), tmp_path / "gate")
    assert "weights differ" in caplog.text


def test_merge_and_unload_is_the_tuned_model_and_unload_and_detach_are_the_plain_one():
    ids, mask = padded_batch([30, 20])
    alone = loud(gated(gate="none", lora=LORA))
    wanted, plain = plain_logits(alone, ids, mask), plain_logits(tiny(), ids, mask)
    merged = tuned().merge_and_unload()
    assert not wrappers(merged) and torch.allclose(plain_logits(merged, ids, mask), wanted, atol=1e-10)
    for undo in (lambda m: m.unload(), gatekv.detach):
        found = undo(tuned())
        assert torch.equal(plain_logits(found, ids, mask), plain)
        assert set(found.state_dict()) == set(tiny().state_dict()) and "peft_config" not in vars(found)
    with pytest.raises(ValueError, match="merge_and_unload"):
        alone.merge_lora()


def test_lora_goes_onto_a_model_with_bare_wrappers_and_low_rank_maps_stand_beside_it():
    base = tiny(dtype=torch.float32)
    gatekv.KVCache(base, "keydiff", 0.5)
    model = tuned(dtype=torch.float32, model=base)
    assert torch.equal(flags_and_logits(model)[1], flags_and_logits(tuned(dtype=torch.float32))[1])
    three = tuned(dtype=torch.float32, less_rank=2)
    assert (
        three.peft_config["default"].less_rank == 2 and flags_and_logits(three, "gate+global+less")[1].isfinite().all()
    )


def test_a_saved_cache_belongs_to_its_lora(tmp_path):
    model = tuned(dtype=torch.float32)
    ids, mask = padded_batch([40])
    cache = KVCache(model, "snapkv", 0.9)
    model(ids, past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    KVCache.load(tmp_path / "cache.safetensors", model)
    for other in (tuned(dtype=torch.float32, seed=1, model=tiny(dtype=torch.float32)), gated(dtype=torch.float32)):
        with pytest.raises(ValueError, match="LoRA"):
            KVCache.load(tmp_path / "cache.safetensors", other)


@pytest.mark.parametrize("lora,error,match", [
    ({"rank": 4}, TypeError, "unknown key 'rank' in lora"), ({"lora_alhpa": 4}, TypeError, "Did you mean 'lora_alpha'"),
    ({"modules_to_save": ["lm_head"]}, TypeError, "unknown key 'modules_to_save'"), ({"r": 0}, ValueError, "at least 1"),
    ({"lora_dropout": 1.0}, ValueError, "below 1"), ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights"),
])  # fmt: skip
def test_unknown_fields_and_impossible_values_are_errors(lora, error, match):
    with pytest.raises(error, match=match):
        gatekv.GateKVConfig(lora=lora)


def test_target_modules_that_do_not_exist_are_errors_and_leave_the_model_as_it_was():
    base = tiny(dtype=torch.float32)
    for targets in (["q_proj", "vproj"], ["qkv"]):
        with pytest.raises(ValueError, match=f"target module '{targets[-1]}' is not in LlamaForCausalLM"):
            get_peft_model(base, gatekv.GateKVConfig(lora={"target_modules": targets}))
    with pytest.raises(ValueError, match="Did you mean 'v_proj'"):
        get_peft_model(base, gatekv.GateKVConfig(lora={"target_modules": ["vproj"]}))
    assert not any("lora" in n for n, _ in base.named_parameters())
    with pytest.raises(ValueError, match="gate='none'"):
        gatekv.GateKVConfig(gate="none")
    assert base_model(get_peft_model(base, gatekv.GateKVConfig(gate="none", lora=LORA))) is base


ASKED = [
    {"r": 2**20}, {"rank_pattern": {"q_proj": 2**20}}, {"rank_pattern": {r"layers\.1\..*": 2**20}},
    {"r": 2**20, "rank_pattern": {"layers.0.self_attn.q_proj": 4}}, {"r": 2**20, "target_modules": r".*\.q_proj"},
    {"rank_pattern": {"embed_tokens": 2**20}, "target_modules": ["q_proj", "embed_tokens"]},
    {"r": 2**20, "target_modules": "all-linear"}, {"r": 2**20, "target_modules": None},
]  # fmt: skip


@pytest.mark.parametrize("change", ASKED, ids=str)
def test_a_config_that_asks_for_more_than_the_file_holds_is_refused_before_it_is_built(tmp_path, change, monkeypatch):
    model = get_peft_model(tiny(dtype=torch.float32), gatekv.GateKVConfig(lora={"r": 4, "target_modules": ["q_proj"]}))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    edited = config | {"lora": config["lora"] | change}
    (tmp_path / "adapter_config.json").write_text(json.dumps(edited))
    monkeypatch.setattr(lora_module, "inject", None)
    with pytest.raises(ValueError, match="a rank of 1048576 in .*, the adapter file has [04]: "):
        PeftModel.from_pretrained(tiny(dtype=torch.float32), tmp_path)


SHAPES = {
    "embeddings": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "below_r": {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}},
    "above_r": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.1.self_attn.v_proj": 9}},
    "pattern": {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {r"model\.layers\.0\..*": 1, "k_proj": 3}},
    "alpha": {"target_modules": ["q_proj", "o_proj"], "alpha_pattern": {"o_proj": 32}, "rank_pattern": {"o_proj": 1}},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "rank_pattern": {"layers.0.*q_proj": 99}},
    "layers_pattern": {"target_modules": ["up_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "regex": {"target_modules": r".*\.1\..*(q|up)_proj"},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\.self_attn\.v_proj"},
    "all": {"target_modules": "all-linear", "rank_pattern": {"down_proj": 1}, "use_rslora": True},
    "chosen": {"rank_pattern": {"v_proj": 1}},
    "conv": {"target_modules": ["conv"]},
}


def shaped(tied):
    model = tiny(dtype=torch.float32, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model.model.conv = torch.nn.Conv2d(4, 4, 3)  # beside the decoder, as an audio or image tower has them
    return model


@pytest.mark.covering(1)  # every shape, by turns alone and beside another
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    "name, tied", [(name, tied) for name in SHAPES for tied in (False, True) if (name, tied) != ("head", True)]
)
def test_every_adapter_that_can_be_saved_can_be_loaded(tmp_path, name, tied, wrapped):
    lora = {"r": 4, "init_lora_weights": False} | SHAPES[name]
    model = gated(model=shaped(tied), dtype=torch.float32, window=4, lora=lora)
    model.save_pretrained(tmp_path)
    base = shaped(tied)
    if wrapped:  # a second adapter, on a model whose gates and LoRA are there
        again = gated(
            model=base, dtype=torch.float32, window=4, lora={"r": 2, "target_modules": ["q_proj", "gate_proj"]}
        )
        again.load_adapter(tmp_path, "again")
        again.set_adapter("again")
    else:
        again = PeftModel.from_pretrained(base, tmp_path)
    for a, b in zip(flags_and_logits(model), flags_and_logits(again.eval())):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert lora_sha256(again) == lora_sha256(model)
