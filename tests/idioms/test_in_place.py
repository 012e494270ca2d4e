"""A model with gatekv on it is the model that it was: names, files, hooks, attributes, LoRA, copies, compilation."""

import copy

import pytest
import torch
from conftest import gated, padded_batch, tiny
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import gatekv
from gatekv.modules import wrappers

SHAPE = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3, head_dim=8,
             vocab_size=97, initializer_range=0.3, pad_token_id=0, bos_token_id=None, eos_token_id=None)  # fmt: skip
FULL = dict(layer_types=["full_attention"] * 2)
FAMILIES = {"llama": {}, "qwen2": {}, "qwen3": {}, "mistral": dict(sliding_window=None), "phi3": {}, "cohere": {}, "granite": {},
            "olmo2": {}, "starcoder2": dict(sliding_window=None), "stablelm": {}, "smollm3": {}, "qwen3_moe": {},
            "gemma3_text": dict(layer_types=["sliding_attention", "full_attention"]), "cohere2": FULL}  # fmt: skip
IDS = torch.randint(1, 97, (1, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **SHAPE, **FAMILIES[request.param])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model, **options):
    return model(input_ids=IDS, **options).logits


def test_names_attributes_hooks_and_outputs_are_the_models_own(model):
    layer, calls = next(m for n, m in model.named_modules() if n.endswith("layers.1.self_attn")), []
    layer.register_forward_hook(lambda *args: calls.append(1))
    kind, wanted = type(layer), logits(model)
    before = [n for n, _ in model.named_modules()], {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {name for name in dir(layer) if not name.startswith("_")}
    for _ in range(2):
        logits(model, past_key_values=gatekv.KVCache(model, "snapkv", 0.5))
        assert wrappers(model) and isinstance(layer, kind) and type(layer).__name__ == kind.__name__
        assert attributes <= set(dir(layer)) and layer.config is model.model.layers[1].self_attn.config
        assert torch.equal(logits(model), wanted)
        assert torch.equal(logits(model, past_key_values=DynamicCache(config=model.config)), wanted)
        found = [n for n, _ in model.named_modules()], model.state_dict()
        assert found[0] == before[0] and all(torch.equal(found[1][k], v) for k, v in before[1].items())
        assert model.config._attn_implementation == layer.config._attn_implementation == "sdpa"
    gatekv.detach(model)
    assert (
        type(layer) is kind
        and not wrappers(model)
        and torch.equal(logits(model), wanted)
        and "gatekv" not in vars(layer)
    )
    assert len(calls) == 8


def test_a_checkpoint_is_the_one_without(model, tmp_path):
    files = []
    for name in ("plain", "gated"):
        model.save_pretrained(tmp_path / name)
        files.append([(tmp_path / name / file).read_bytes() for file in ("model.safetensors", "config.json")])
        gatekv.KVCache(model, "snapkv", 0.5)
    assert files[0] == files[1]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "gated").eval()), logits(model))


@pytest.mark.parametrize(
    "targets", [["q_proj"], r".*self_attn\.(q|v)_proj", ["model.layers.0.self_attn.o_proj"], "all-linear"], ids=str
)
def test_lora_is_found_by_name_pattern_and_path(tmp_path, targets):
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    first = get_peft_model(tiny(dtype=torch.float32), config).eval()
    wanted = logits(first)
    first.save_pretrained(tmp_path)
    model = tiny(dtype=torch.float32)
    gatekv.KVCache(model, "snapkv", 0.5)
    late = PeftModel.from_pretrained(model, tmp_path).eval()
    assert torch.equal(logits(late), wanted)
    cache = gatekv.KVCache(late, "full")
    torch.testing.assert_close(logits(late, past_key_values=cache), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_copy_is_gated_by_itself(adapter):
    model = gated(dtype=torch.float32, window=4) if adapter else tiny(dtype=torch.float32)
    gatekv.KVCache(model, "snapkv", 0.5)
    twin = copy.deepcopy(model)
    assert not {id(w.module) for w in wrappers(twin)} & {id(w.module) for w in wrappers(model)}

    def run(m):
        policy, budget = ("gate", None) if adapter else ("snapkv", 0.5)
        return logits(m, past_key_values=gatekv.KVCache(m, policy, budget))

    wanted = run(model)
    gatekv.detach(model)
    assert torch.equal(run(twin), wanted)


def test_an_adapter_adds_gates_and_trains_nothing_else(tmp_path):
    base = tiny(dtype=torch.float32)
    names = set(base.state_dict())
    model = gated(model=base, dtype=torch.float32, window=4)
    added = set(model.base_model.model.state_dict()) - names
    assert (
        names <= set(model.base_model.model.state_dict())
        and added
        and all(".self_attn.gatekv_gate." in n for n in added)
    )
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"base_model.model.{n}" for n in added}


def test_lora_of_an_adapter_keeps_its_names_in_files_and_peft_names_are_read_too(tmp_path):
    lora = {"r": 2, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
    model = gated(dtype=torch.float32, window=4, lora=lora)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    start = "base_model.model.model.layers.0."
    assert {f"{start}self_attn.base_layer.q_proj.lora_A.weight", f"{start}mlp.up_proj.lora_A.weight"} <= set(tensors)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(dtype=torch.float32), tmp_path).eval()), logits(model))
    plain = {name.replace("self_attn.base_layer.", "self_attn."): t for name, t in tensors.items()}
    model.base_model._remap_adapter_state_dict_for_load(model, model.peft_config["default"], "default", plain)


@pytest.mark.parametrize("cached", [False, True])
def test_the_plain_model_compiles_whole(cached):
    model = tiny(dtype=torch.float32)
    gatekv.KVCache(model, "full")
    wanted = logits(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS, use_cache=cached).logits, wanted)
    torch._dynamo.reset()


def test_attentions_of_a_prompt_are_the_models_own_or_refused():
    model = tiny(dtype=torch.float32)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = model(IDS, output_attentions=True).attentions
        cache = gatekv.KVCache(model, "snapkv", 0.5)
        found = model(IDS, output_attentions=True, past_key_values=cache).attentions
        assert len(found) == 2
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="output_attentions"):
            model(IDS[:, :1], output_attentions=True, past_key_values=cache)
        assert cache.get_seq_length() == IDS.shape[1], "refused before anything was stored"
        model.config.output_attentions = True
    with (
        pytest.raises(ValueError, match="output_attentions"),
        gatekv.parallel(gated(model=model, dtype=torch.float32, window=4)),
    ):
        model(IDS)


def test_a_training_forward_makes_itself_an_empty_cache_and_a_filled_one_is_refused():
    model = gated(dtype=torch.float64, window=4, relaxation="log").train()
    ids, mask = padded_batch([40, 30])
    grads = []
    for options in (dict(use_cache=False), {}, dict(past_key_values=DynamicCache())):
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=ids, **options).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert grads[0].abs().sum() > 0 and all(torch.equal(g, grads[0]) for g in grads)
    with model.disable_adapter():
        filled = model(input_ids=ids, attention_mask=mask).past_key_values
    with pytest.raises(ValueError, match="apply to whole sequences"):
        model(input_ids=ids[:, :1], past_key_values=filled)
