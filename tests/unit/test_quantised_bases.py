"""Bases whose weights are packed integers: gates are made, trained, saved and deployed on them as on any other.

bitsandbytes, GPTQ and AWQ replace linear layers by their own. Stand-ins here hold what theirs hold: a `weight` of packed
uint8 or of int8, or no `weight` at all but int32 buffers; bitsandbytes itself is tried where it is installed.
"""

import copy

import pytest
import torch
from conftest import gated, padded_batch, positions_of, tiny
from peft import PeftModel, get_peft_model
from test_training import ToyData
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging

import gatekv
from gatekv.modules import base_model, device_of, wrappers
from gatekv.training.lesson import LessObjective
from gatekv.training.objective import Objective


class FourBit(nn.Linear):
    """As bitsandbytes' Linear4bit: two weights a byte, in a parameter of another shape."""

    def __init__(self, plain):
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        scale = plain.weight.abs().amax(1, keepdim=True) / 7
        codes = ((plain.weight / scale).round() + 8).to(torch.uint8).flatten()
        self.weight = nn.Parameter((codes[::2] * 16 + codes[1::2])[:, None], requires_grad=False)
        self.register_buffer("scale", scale.detach())

    def forward(self, x):
        codes = torch.stack([self.weight // 16, self.weight % 16], -1).view(self.out_features, self.in_features)
        return nn.functional.linear(x, (codes.to(x.dtype) - 8) * self.scale.to(x.dtype))


class EightBit(nn.Linear):
    """As bitsandbytes' Linear8bitLt: a weight of int8."""

    def __init__(self, plain):
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        scale = plain.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((plain.weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale.detach())

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


class Buffers(nn.Module):
    """As GPTQ's and AWQ's layers: no parameter at all, and no `weight`."""

    def __init__(self, plain):
        super().__init__()
        self.in_features, self.out_features, self.bias = plain.in_features, plain.out_features, None
        scale = plain.weight.abs().amax(1, keepdim=True) / 7
        codes = ((plain.weight / scale).round() + 8).to(torch.int32).view(plain.out_features, -1, 8)
        self.register_buffer("qweight", (codes << torch.arange(0, 32, 4, dtype=torch.int32)).sum(-1).to(torch.int32))
        self.register_buffer("qzeros", torch.full((plain.out_features, 1), 8, dtype=torch.int32))
        self.register_buffer("scales", scale.detach())

    def forward(self, x):
        codes = (self.qweight[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
        codes = codes.view(self.out_features, self.in_features)
        return nn.functional.linear(x, (codes - self.qzeros).to(x.dtype) * self.scales.to(x.dtype))


def bitsandbytes_linear(plain, bits):
    bnb = pytest.importorskip("bitsandbytes")
    if bits == 8:
        made = bnb.nn.Linear8bitLt(plain.in_features, plain.out_features, bias=False, has_fp16_weights=False)
        made.weight = bnb.nn.Int8Params(plain.weight.data, has_fp16_weights=False, requires_grad=False)
    else:
        made = bnb.nn.Linear4bit(plain.in_features, plain.out_features, bias=False, quant_type="nf4")
        made.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4", blocksize=64)
    return made.to("cpu")


KINDS = {
    "four": FourBit,
    "eight": EightBit,
    "buffers": Buffers,
    "bitsandbytes4": lambda plain: bitsandbytes_linear(plain, 4),
    "bitsandbytes8": lambda plain: bitsandbytes_linear(plain, 8),
}
SHAPE = dict(hidden_size=64, intermediate_size=128, num_attention_heads=8, num_key_value_heads=4)
FORM = dict(window=4, sinks=2, hidden=8, heads=2, head_dim=4, context_window=8, initial_logit=0.5)
IDS, MASK = padded_batch([40, 30])


def quantised(kind, dtype=torch.float32):
    """A tiny model with every linear layer of its decoder in packed integers."""
    model = tiny(dtype=torch.float32, **SHAPE)
    for module in [m for m in model.model.modules() if not isinstance(m, FourBit | EightBit | Buffers)]:
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, KINDS[kind](child))
    return model.to(dtype).eval()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@torch.no_grad()
def logits(model, **options):
    return model(input_ids=IDS, attention_mask=MASK, position_ids=positions_of(MASK), **options).logits[MASK.bool()]


def close(a, b):
    """Equal but for what half precision and 8-bit activations round."""
    scale = b.float().abs().max()
    assert (a.float() - b.float()).abs().max() / scale < (1e-5 if b.dtype is torch.float32 else 3e-2)


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "policy,budget", [("full", None), ("snapkv", 1.0), ("h2o", 1.0), ("keydiff+global", 1.0), ("qaq", 1.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_full_budget_is_the_quantised_model(kind, dtype, policy, budget):
    model = quantised(kind, dtype)
    wanted, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    if policy != "qaq":
        close(logits(model, past_key_values=gatekv.KVCache(model, policy, budget)), wanted)
    evicting = logits(model, past_key_values=gatekv.KVCache(model, "snapkv", 0.5))
    assert evicting.isfinite().all() and torch.equal(logits(model), wanted)
    gatekv.detach(model)
    assert torch.equal(logits(model), wanted)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gates_stand_where_the_packed_weights_do_in_their_own_dtype(kind, dtype):
    base = quantised(kind, dtype)
    wanted = logits(base)
    model = get_peft_model(base, gatekv.GateKVConfig(**FORM))
    for w in wrappers(model):
        assert device_of(w.module).type == "cpu"
        assert all(p.device.type == "cpu" and p.dtype is torch.float32 for p in w.gate().parameters())
    assert torch.equal(logits(model.eval()), wanted)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "gatekv_" not in n)
    keeps = gatekv.KVCache(gated(model=quantised(kind, dtype), dtype=dtype, window=60), "gate")
    close(logits(keeps.model, past_key_values=keeps), wanted)
    assert torch.equal(logits(model.merge_and_unload()), wanted)


OBJECTIVES = {
    "kl": {}, "reverse_kl": dict(sparsity="abs"), "lm": dict(kl_weight=0.5), "hidden_mse": {},
    "attention_mse": dict(scope="layer"), "none": dict(oracle_weight=1.0),
}  # fmt: skip


@pytest.mark.parametrize("prefill", ["sparse", "dense"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gates_learn_by_every_loss(kind, dtype, objective, prefill):
    torch.manual_seed(0)
    model = get_peft_model(quantised(kind, dtype), gatekv.GateKVConfig(**FORM)).train()
    for w in wrappers(model):
        nn.init.normal_(w.gate().out.weight, std=0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    lesson = Objective(model, objective=objective, prefill=prefill, **OBJECTIVES[objective])
    learning = [p for p in model.parameters() if p.requires_grad]
    out = lesson(ToyData().batch(0, 2, align=True), 0.5)
    out["loss"].backward()
    assert out["loss"].isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in learning)
    torch.optim.AdamW(learning, lr=1e-2, weight_decay=0.0).step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("gatekv_" in n for n in moved)


def test_a_layers_own_error_is_that_of_the_dequantised_model(kind):
    """The squares are of what o_proj makes of an output, not of the integers that its weight is packed in."""
    if "bitsandbytes" in kind:
        pytest.skip("its 8-bit products round, and its 4-bit ones need no second check")
    model = quantised(kind)
    same = copy.deepcopy(model)
    for module in [*same.model.modules()]:
        for name, child in module.named_children():
            if isinstance(child, FourBit | EightBit | Buffers):
                plain = nn.Linear(child.in_features, child.out_features, bias=False)
                plain.weight = nn.Parameter(child(torch.eye(child.in_features)).T.contiguous().detach())
                setattr(module, name, plain)
    found = []
    for base in (model, same):
        torch.manual_seed(0)
        lesson = Objective(gated(model=base, dtype=torch.float32, window=4), objective="attention_mse", scope="layer")
        found.append(lesson(ToyData().batch(0, 2, align=True), 0.5)["loss"].detach())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert found[0] > 1e-3


@pytest.mark.parametrize("objective", ["attention_mse", "kl"])
def test_low_rank_maps_learn(kind, objective):
    model = gated(model=quantised(kind), dtype=torch.float32, gate="none", less_rank=2).train()
    ids, mask = padded_batch([80, 70])
    rows = {"input_ids": ids, "attention_mask": mask, "split": torch.tensor([60, 60]), "weights": mask.float()}
    LessObjective(model, "snapkv", objective)(rows, 0.75)["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_an_adapter_is_saved_and_found_again_and_another_base_is_noticed(kind, tmp_path, caplog):
    model = gated(model=quantised(kind), dtype=torch.float32, window=4)
    wanted = logits(model, past_key_values=gatekv.KVCache(model, "gate"))
    model.save_pretrained(tmp_path / "gates")
    logging.get_logger("gatekv.adapter").addHandler(caplog.handler)
    again = PeftModel.from_pretrained(quantised(kind), tmp_path / "gates").eval()
    assert torch.equal(logits(again, past_key_values=gatekv.KVCache(again, "gate")), wanted)
    assert "weights differ" not in caplog.text
    PeftModel.from_pretrained(tiny(dtype=torch.float32, **SHAPE), tmp_path / "gates")
    if kind != "buffers":  # what lies in parameters is compared
        assert "weights differ from those of the adapter's base (quantised" in caplog.text
    cache = gatekv.KVCache(again, "gate")
    logits(again, past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = gatekv.KVCache.load(tmp_path / "cache.safetensors", again)
    assert all(torch.equal(a, b) for a, b in zip(loaded.flags(), cache.flags()))


@pytest.mark.parametrize("kind", ["four", "eight", "bitsandbytes4", "bitsandbytes8"])
def test_lora_learns_beside_the_gates_where_peft_adapts_such_layers(kind, tmp_path):
    lora = {"r": 2, "target_modules": ["q_proj", "o_proj", "up_proj"], "init_lora_weights": False}
    model = gated(model=quantised(kind), dtype=torch.float32, window=4, lora=lora)
    wanted = logits(model, past_key_values=gatekv.KVCache(model, "gate"))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantised(kind), tmp_path).eval()
    close(logits(again, past_key_values=gatekv.KVCache(again, "gate")), wanted)
    for objective in ("kl", "attention_mse"):
        model.train().zero_grad()
        Objective(model, objective=objective, scope="layer")(ToyData().batch(0, 2), 0.5)["loss"].backward()
        grads = [p.grad for n, p in model.named_parameters() if ("lora_" in n or "gatekv_" in n) and p.requires_grad]
        assert any(g is not None and g.abs().sum() > 0 for g in grads)
    plain = gatekv.detach(model.eval())
    assert torch.equal(logits(plain), logits(quantised(kind))) and base_model(plain) is plain


def test_lora_on_layers_that_peft_cannot_adapt_is_refused_and_the_base_stays():
    base = quantised("buffers")
    wanted = logits(base)
    with pytest.raises(ValueError, match="Buffers|not supported"):
        gated(model=base, dtype=torch.float32, window=4, lora={"r": 2, "target_modules": ["q_proj"]})
    assert torch.equal(logits(base), wanted)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_that_bitsandbytes_quantises_as_it_is_loaded(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny(dtype=torch.float32, **SHAPE).save_pretrained(tmp_path / "base")
    how = (
        dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        if bits == 4
        else dict(load_in_8bit=True)
    )

    def load():
        config = BitsAndBytesConfig(**how)
        folder = tmp_path / "base"
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
        )
        return model.eval()

    wanted = logits(load())
    close(logits(model := load(), past_key_values=gatekv.KVCache(model, "full")), wanted)
    lora = {"r": 2, "target_modules": ["q_proj", "o_proj", "up_proj"], "init_lora_weights": False}
    model = get_peft_model(load(), gatekv.GateKVConfig(**FORM, lora=lora)).train()
    for objective in ("kl", "attention_mse"):
        Objective(model, objective=objective, scope="layer")(ToyData().batch(0, 2), 0.5)["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.eval().save_pretrained(tmp_path / "gates")
    again = PeftModel.from_pretrained(load(), tmp_path / "gates").eval()
    answers = [logits(m, past_key_values=gatekv.KVCache(m, "gate")) for m in (model, again)]
    assert torch.equal(*answers) and torch.equal(logits(gatekv.detach(again)), wanted)
