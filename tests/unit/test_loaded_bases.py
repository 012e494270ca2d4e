"""Bases as people load them: spread and offloaded by accelerate, with LoRA merged, tied, resized."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from conftest import gated, padded_batch, positions_of, tiny
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from test_training import ToyData
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import gatekv
from gatekv.modules import base_model, wrappers
from gatekv.training.objective import Objective

IDS, MASK = padded_batch([40, 30])
ON_CPU = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.norm": "cpu"}
SPREAD = ON_CPU | {"model.layers.1": "disk", "lm_head": "disk"}
LORA = dict(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


@torch.no_grad()
def logits(model, **options):
    return model(input_ids=IDS, attention_mask=MASK, position_ids=positions_of(MASK), **options).logits[MASK.bool()]


def evicted(model, policy="gate", budget=None):
    return logits(model, past_key_values=gatekv.KVCache(model, policy, budget))


def base(**changes):
    return tiny(dtype=torch.float32, **changes)


def offloaded(model, how, folder):
    """The model with its weights elsewhere until a layer is called, as accelerate places them."""
    cpu = torch.device("cpu")
    if how == "cpu_offload":
        cpu_offload(model, execution_device=cpu)
    elif how == "disk_offload":
        disk_offload(model, folder, execution_device=cpu)
    else:
        dispatch_model(model, device_map=SPREAD, main_device="cpu", offload_dir=folder, force_hooks=True)
    return model


@pytest.fixture(params=["cpu_offload", "disk_offload", "device_map"])
def how(request):
    return request.param


@pytest.mark.parametrize("tied", [False, True])
def test_an_offloaded_base_answers_as_the_base(how, tied, tmp_path):
    plain, model = (base(tie_word_embeddings=tied) for _ in range(2))
    wanted = logits(plain)
    offloaded(model, how, tmp_path / "weights")
    assert torch.equal(logits(model), wanted)
    torch.testing.assert_close(evicted(model, "full"), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(evicted(model, "snapkv", 0.5), evicted(plain, "snapkv", 0.5))
    gatekv.detach(model)
    assert torch.equal(logits(model), wanted) and not wrappers(model)


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_is_put_on_an_offloaded_base_and_saved_from_it(how, tied, tmp_path):
    whole = gated(model=base(tie_word_embeddings=tied), dtype=torch.float32, window=4)
    wanted = evicted(whole)
    whole.save_pretrained(tmp_path / "a")
    model = offloaded(base(tie_word_embeddings=tied), how, tmp_path / "weights")
    model = PeftModel.from_pretrained(model, tmp_path / "a").eval()
    assert all(p.device.type == "cpu" for w in wrappers(model) for p in w.gate().parameters())
    assert torch.equal(evicted(model), wanted)
    model.save_pretrained(tmp_path / "b")
    again = PeftModel.from_pretrained(base(tie_word_embeddings=tied), tmp_path / "b").eval()
    assert torch.equal(evicted(again), wanted)
    cache = gatekv.KVCache(model, "gate")
    logits(model, past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = gatekv.KVCache.load(tmp_path / "cache.safetensors", model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.flags(), cache.flags()))
    plain = gatekv.detach(model)
    assert torch.equal(logits(plain), logits(base(tie_word_embeddings=tied)))


def test_gates_learn_on_an_offloaded_base_what_they_learn_on_the_base(how, tmp_path):
    found = []
    for place in (lambda m: m, lambda m: offloaded(m, how, tmp_path / "weights")):
        torch.manual_seed(0)
        model = get_peft_model(place(base()), gatekv.GateKVConfig(window=4, sinks=2)).train()
        for w in wrappers(model):
            torch.nn.init.normal_(w.gate().out.weight, std=0.5)
        for options in (dict(), dict(objective="attention_mse", scope="layer"), dict(objective="lm", prefill="dense")):
            model.zero_grad()
            Objective(model, **options)(ToyData().batch(0, 2, align=True), 0.5)["loss"].backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for a, b in zip(found[:3], found[3:]):
        torch.testing.assert_close(a, b)
        assert a.abs().sum() > 0


def test_a_model_that_has_gates_is_offloaded_with_them_and_comes_back(how, tmp_path):
    model = gated(model=base(), dtype=torch.float32, window=4)
    wanted, inner = evicted(model), base_model(model)
    offloaded(inner, how, tmp_path / "weights")
    assert torch.equal(evicted(model), wanted)
    remove_hook_from_submodules(inner)


def test_a_device_map_of_from_pretrained(tmp_path):
    base().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=SPREAD, offload_folder=tmp_path / "off"
    ).eval()
    model = gated(model=model, dtype=torch.float32, window=4)
    assert torch.equal(evicted(model), evicted(gated(model=base(), dtype=torch.float32, window=4)))


def tuned():
    torch.manual_seed(5)
    return get_peft_model(base(), LoraConfig(**LORA)).eval()


def test_lora_that_was_merged_before_is_the_base(tmp_path, caplog):
    merged = tuned().merge_and_unload()
    wanted = logits(merged)
    torch.testing.assert_close(wanted, logits(tuned()), rtol=1e-3, atol=1e-3)
    model = gated(model=merged, dtype=torch.float32, window=60)
    torch.testing.assert_close(evicted(model), wanted, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), wanted)
    model.save_pretrained(tmp_path)
    logging.get_logger("gatekv.adapter").addHandler(caplog.handler)
    PeftModel.from_pretrained(tuned().merge_and_unload(), tmp_path)
    assert "weights differ" not in caplog.text
    PeftModel.from_pretrained(base(), tmp_path)
    assert "weights differ from those of the adapter's base (quantised, tuned, merged?)" in caplog.text
    assert torch.equal(logits(gatekv.detach(model)), wanted)


def test_a_lora_model_evicts_as_it_is_and_gates_on_top_of_it_are_refused_with_the_cures():
    model = tuned()
    wanted, learning = logits(model), [n for n, p in model.named_parameters() if p.requires_grad]
    torch.testing.assert_close(evicted(model, "full"), wanted, rtol=1e-5, atol=1e-5)
    assert evicted(model, "snapkv", 0.5).isfinite().all()
    for below in (model, base_model(model)):  # the latter as transformers' own add_adapter leaves a model
        with pytest.raises(ValueError, match="has an adapter already.*merge_and_unload.*GateKVConfig.lora="):
            get_peft_model(below, gatekv.GateKVConfig(window=4))
    assert torch.equal(logits(model), wanted) and learning == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("when", ["before", "after", "through the adapter", "smaller"])
def test_a_resized_base(when, tied, tmp_path, caplog):
    """Where the base on disk has another vocabulary, PEFT would put the embeddings into the adapter's file."""
    base(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    ids = IDS.clamp_max(80)
    load = lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()  # noqa: E731
    size = 90 if when == "smaller" else 120

    @torch.no_grad()
    def answer(model):
        return model(input_ids=ids, past_key_values=gatekv.KVCache(model, "gate")).logits[..., :90]

    inner = load()
    if when in ("before", "smaller"):
        inner.resize_token_embeddings(size)
    model = gated(model=inner, dtype=torch.float32, window=4)
    if when == "after":
        gatekv.KVCache(model, "gate")
        inner.resize_token_embeddings(size)
    elif when == "through the adapter":
        model.resize_token_embeddings(size)
    wanted = answer(model)
    assert not [n for n, p in model.named_parameters() if p.requires_grad and "gatekv_" not in n]
    rows = ToyData().batch(0, 2)
    Objective(model.train())(rows | {"input_ids": rows["input_ids"].clamp_max(80)}, 0.5)["loss"].backward()
    model.eval().save_pretrained(tmp_path / "gates")
    with safe_open(tmp_path / "gates" / "adapter_model.safetensors", "pt") as file:
        assert all("gatekv_" in name for name in file.keys())
    resized = load()
    resized.resize_token_embeddings(size)
    logging.get_logger("gatekv.adapter").addHandler(caplog.handler)
    for other in (load(), resized):
        again = PeftModel.from_pretrained(other, tmp_path / "gates").eval()
        assert torch.equal(answer(again), wanted)
    assert "weights differ" not in caplog.text


def test_a_file_with_the_embeddings_of_a_resized_base_is_read_without_them(tmp_path, caplog):
    """Files had them before gatekv left them out; the base that they are loaded on stays what it is."""
    base().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model.resize_token_embeddings(120)
    model = gated(model=model, dtype=torch.float32, window=4)
    model.save_pretrained(tmp_path / "gates", save_embedding_layers=True)
    logging.get_logger("gatekv.adapter").addHandler(caplog.handler)
    again = PeftModel.from_pretrained(base(), tmp_path / "gates").eval()
    assert "holds 2 embeddings of its base, which had been resized; they are left out" in caplog.text
    assert torch.equal(evicted(again), evicted(model)[:, :97])
    assert torch.equal(logits(gatekv.detach(again)), logits(base()))


def test_a_cache_saved_before_the_base_was_resized_goes_on_after_it(tmp_path):
    model = base()
    cache = gatekv.KVCache(model, "snapkv", 0.5)
    logits(model, past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    model.resize_token_embeddings(120)
    loaded = gatekv.KVCache.load(tmp_path / "cache.safetensors", model)
    more = dict(input_ids=IDS[:, :1], attention_mask=torch.cat([MASK, MASK[:, -1:]], 1))
    with torch.no_grad():
        assert torch.equal(model(**more, past_key_values=loaded).logits, model(**more, past_key_values=cache).logits)
