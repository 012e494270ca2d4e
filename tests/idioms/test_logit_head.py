"""Losses are those of a model's own logits, whatever it does behind its text decoder."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import gatekv
from gatekv import GateKVConfig
from gatekv.modules import base_model, gates_off
from gatekv.training.head import LogitHead
from gatekv.training.losses import distillation_loss, lm_loss, row_shares
from gatekv.training.objective import Objective
from gatekv.training.plain import PlainObjective

SHAPE = dict(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97,
    max_position_embeddings=512, initializer_range=0.3, pad_token_id=0, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
FULL = dict(layer_types=["full_attention"] * 2)
# What each does behind its decoder: nothing, but for those that say so.
FAMILIES = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "mistral": dict(sliding_window=None), "phi3": {}, "olmo2": {}, "smollm3": {},
    "starcoder2": {}, "stablelm": {}, "glm": dict(head_dim=16), "nemotron": {}, "ministral": dict(FULL, head_dim=16), "phimoe": dict(num_local_experts=4),
    "opt": dict(ffn_dim=64, word_embed_proj_dim=64, num_key_value_heads=None), "seed_oss": dict(head_dim=16), "mixtral": dict(num_local_experts=4),
    "cohere": dict(logit_scale=0.125), "cohere2": dict(FULL, logit_scale=0.125), "granite": dict(logits_scaling=8.0),
    "gemma2": dict(head_dim=16, final_logit_softcapping=1.0), "gemma3_text": dict(FULL, head_dim=16, final_logit_softcapping=1.0),
    "minicpm3": dict(dim_model_base=16, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16),
    "nanochat": dict(final_logit_softcapping=1.0),
}  # fmt: skip
GATED = ["llama", "cohere", "cohere2", "granite", "gemma3_text", "qwen3", "nanochat"]


def tiny(family, dtype=torch.float64, seed=0, **changes):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).eval()
    if hasattr(config, "num_local_experts"):
        model.set_experts_implementation("eager")
    return model


def batch_of(rows=2, n=24, split=12):
    ids = torch.randint(1, 97, (rows, n), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    return dict(
        input_ids=ids,
        attention_mask=mask,
        weights=(mask * (torch.arange(n) < n - 1)).float(),
        split=torch.tensor([split] * rows),
    )


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_loss_is_that_of_the_models_own_logits(family):
    model, batch = tiny(family), batch_of()
    head, ids = LogitHead(model), batch["input_ids"]
    hidden = head.decoder(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).last_hidden_state
    own = model(ids, labels=ids, use_cache=False)
    torch.testing.assert_close(head(hidden), own.logits.to(hidden), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head(hidden[0]), head(hidden)[0])
    shares = row_shares(batch["weights"].double())
    loss = lm_loss(hidden, ids.roll(-1, 1), head, shares)
    assert loss.dtype == torch.float64 and abs(float(loss / own.loss) - 1) <= 1e-5
    other = hidden + 0.3 * torch.randn_like(hidden)
    p, q = (head(x).log_softmax(-1) for x in (hidden, other))
    torch.testing.assert_close(
        distillation_loss(other, hidden, head, shares), ((p.exp() * (p - q)).sum(-1) * shares).sum()
    )


def gated(family, **changes):
    model = get_peft_model(
        tiny(family, **changes), GateKVConfig(gate="linear", relaxation="ste", window=4, sinks=2)
    ).to(torch.float64)
    generator = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if "gatekv_gate" in name:
            p.data = torch.zeros_like(p) if name.endswith("bias") else torch.randn(p.shape, generator=generator).to(p)
    return model.eval()


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "lm"])
@pytest.mark.parametrize("family", GATED)
def test_objectives_are_those_of_the_models_own_logits(family, kind):
    """The model's own forward, with gates and without, gives the same number and the same gradient."""
    model, batch = gated(family), batch_of()
    ids, parameters = batch["input_ids"], [p for p in model.parameters() if p.requires_grad]
    got = Objective(model, objective=kind, sparsity="abs", sparsity_weight=0.0)(batch, target=0.4)
    with torch.no_grad(), gates_off(model):
        teacher = model(ids, use_cache=False).logits.log_softmax(-1)[:, :-1]
    with gatekv.parallel(model, "ste"):
        student = model(ids, use_cache=False).logits.to(teacher).log_softmax(-1)[:, :-1]
        p, q = (student, teacher) if kind == "reverse_kl" else (teacher, student)
        wanted = -student.gather(-1, ids[:, 1:, None]).mean() if kind == "lm" else (p.exp() * (p - q)).sum(-1).mean()
        torch.testing.assert_close(got["task"], wanted.detach(), rtol=1e-6, atol=1e-9)
        true = torch.autograd.grad(wanted, parameters, allow_unused=True)
    for a, b in zip(torch.autograd.grad(got["loss"], parameters, allow_unused=True), true):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-5, atol=1e-9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["cohere", "gemma3_text"])
def test_plain_fine_tuning_in_half_precision(family, dtype):
    model = get_peft_model(tiny(family, dtype), LoraConfig(r=2, target_modules=["q_proj"]))
    batch = batch_of()
    loss = PlainObjective(model)(batch, 1.0)["loss"]
    wanted = model(batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss
    assert loss.dtype == torch.float32 and abs(float((loss / wanted).detach()) - 1) <= 1e-2


def test_a_decoder_inside_a_wrapper_is_found_by_what_it_returns():
    """Llama 4 has its language model, head and all, inside; `base_model` of the whole is the whole."""
    text = dict(
        SHAPE, head_dim=16, intermediate_size_mlp=64, num_local_experts=2, num_experts_per_tok=1, interleave_moe_layer_step=4,
        no_rope_layers=[1, 1], attention_chunk_size=256, use_qk_norm=False,
    )  # fmt: skip
    vision = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
                  vision_output_dim=32, projector_input_dim=32, projector_output_dim=32)  # fmt: skip
    config = AutoConfig.for_model(
        "llama4", text_config=text, vision_config=vision, image_token_index=90, boi_token_index=91, eoi_token_index=92
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    head, ids = LogitHead(model), batch_of()["input_ids"].clamp_max(80)
    assert head.decoder is model.language_model.model and head.owner is model.language_model
    with torch.no_grad():
        torch.testing.assert_close(
            head(head.decoder(input_ids=ids).last_hidden_state), model(ids, use_cache=False).logits
        )


def test_the_check_leaves_modes_orders_and_the_generator_alone():
    model = gated("llama")
    model.train()
    base_model(model).model.norm.eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    own = set(vars(base_model(model)))
    head = LogitHead(model)
    assert modes == [m.training for m in model.modules()] and torch.equal(state, torch.get_rng_state())
    hidden = torch.randn(3, 64, dtype=torch.float64)
    torch.testing.assert_close(head(hidden), base_model(model).lm_head(hidden))
    assert own == set(vars(base_model(model))) and not any(m._forward_hooks for m in model.modules())


def test_logits_made_of_more_than_the_last_hidden_states_are_refused():
    model = tiny("llama")
    forward = type(model).forward

    class Mixed(type(model)):
        def forward(self, input_ids, **kwargs):
            out = forward(self, input_ids, **kwargs)
            out.logits = out.logits + self.model.embed_tokens(input_ids).sum(-1, keepdim=True) * torch.arange(97)
            return out

    model.__class__ = Mixed
    with pytest.raises(ValueError, match="Mixed .llama. makes its logits of more"):
        LogitHead(model)
    with pytest.raises(ValueError, match="returns no logits.*AutoModelForCausalLM"):
        LogitHead(tiny("llama").model)


def test_what_learns_behind_the_last_hidden_states_is_refused():
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="lm_head.*nothing learns: leave it out"):
        PlainObjective(model)


def test_weights_that_are_not_there_yet_are_looked_at_later():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("cohere", **SHAPE))
    head = LogitHead(model)
    assert not head.path
    model.to_empty(device="cpu")
    model.init_weights()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    head.ready()
    assert head.path == ["model"] and head.decoder is model.model
