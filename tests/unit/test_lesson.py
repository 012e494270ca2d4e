"""Training of low-rank maps: the error is the deployed one's, only the maps learn, and they do learn."""

import pytest
import torch
from conftest import gated, padded_batch, tiny
from test_less_cache import LESS, loud

import gatekv
from gatekv import passes
from gatekv.modules import base_model, wrappers
from gatekv.passes import LayerError, output_error
from gatekv.training.less_config import LessConfig
from gatekv.training.lesson import LessObjective, with_maps
from gatekv.training.options import load_config


def batch_of(lengths, split):
    ids, mask = padded_batch(lengths)
    return {"input_ids": ids, "attention_mask": mask, "split": torch.full((len(lengths),), split)}


@pytest.mark.parametrize("kind", ["ministral", "gemma3", "qwen3_moe"])
def test_sliding_layers_and_experts_do_not_disturb_a_lesson(kind, monkeypatch):
    test_the_first_layers_error_is_what_the_cache_makes("keydiff+ada", kind, monkeypatch)


@pytest.mark.parametrize("policy", ["snapkv", "keydiff+ada+pyramid", "random+global", "h2o", "gate+global"])
def test_the_first_layers_error_is_what_the_cache_makes(policy, family, monkeypatch):
    """The first full layer sees the same input with and without eviction, so its trained and deployed errors can be compared."""
    model = loud(gated(family, window=6, sinks=2, **LESS))
    batch = batch_of([80, 70], 60)
    outs = {}

    def spy(name):
        first = wrappers(model)[0].module
        o_proj = first.o_proj

        def keep(module, args):
            outs[name] = args[0].unflatten(2, (-1, first.head_dim)).detach()

        return o_proj.register_forward_pre_hook(keep)

    objective, recorded = LessObjective(model, policy), []
    monkeypatch.setattr(passes, "LayerError", lambda *found: (recorded.append(LayerError(*found)), recorded[-1])[1])
    objective(batch, 0.75)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        hook = spy("plain")
        base_model(model)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions,
                          use_cache=False)  # fmt: skip
        hook.remove()
        for name in (policy, policy + "+less"):
            cache = gatekv.KVCache(model, name, 0.75, decode="keep")
            model(batch["input_ids"][:, :60], attention_mask=batch["attention_mask"][:, :60],
                  position_ids=positions[:, :60], past_key_values=cache)  # fmt: skip
            hook = spy(name)
            model(batch["input_ids"][:, 60:], attention_mask=batch["attention_mask"], position_ids=positions[:, 60:],
                  past_key_values=cache)  # fmt: skip
            hook.remove()
        module = wrappers(model)[0].module
        valid = torch.ones(2, 20, dtype=torch.bool)
        wanted = [output_error(module, outs[name], outs["plain"][:, 60:], valid) for name in (policy + "+less", policy)]
    torch.testing.assert_close(
        torch.stack([recorded[0].error, recorded[0].alone]), torch.stack(wanted), rtol=1e-5, atol=1e-7
    )


def test_only_the_maps_learn_and_all_of_them_do():
    model = gated(window=6, sinks=2, dtype=torch.float32, **LESS)
    for w in wrappers(model):
        w.gate().requires_grad_(False)
    model.train()
    objective = LessObjective(model, "gate+global")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        objective(batch_of([80], 60), 0.5)["loss"].backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != ("gatekv_less" in name), name


def test_end_to_end_is_the_deployed_models_divergence():
    """The student of "kl" is the cache's own answer, and all maps get a gradient through all layers."""
    model = loud(gated(window=6, sinks=2, **LESS))
    for w in wrappers(model):
        w.gate().requires_grad_(False)
    batch = batch_of([80, 70], 60)
    batch["weights"] = torch.ones_like(batch["input_ids"]).float()
    batch["weights"][:, -1] = 0
    loss = LessObjective(model, "snapkv", "kl")(batch, 0.75)["loss"]
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    logits = {}
    for name in ("full", "snapkv+less"):
        cache = gatekv.KVCache(model, name, 0.75)
        with torch.no_grad():
            for part, mask in (
                (slice(0, 60), batch["attention_mask"][:, :60]),
                (slice(60, 80), batch["attention_mask"]),
            ):
                logits[name] = model(batch["input_ids"][:, part], attention_mask=mask, position_ids=positions[:, part],
                                     past_key_values=cache).logits  # fmt: skip
    p, q = logits["full"].log_softmax(-1)[:, :-1], logits["snapkv+less"].log_softmax(-1)[:, :-1]
    assert loss.item() == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for w in wrappers(model) for p in w.less().parameters())


def test_no_gradient_crosses_a_layer(monkeypatch):
    model = loud(gated(gate="none", **LESS))
    objective = LessObjective(model, "snapkv")
    recorded = []
    last = wrappers(model)[1]
    monkeypatch.setattr(passes, "LayerError", lambda *found: (recorded.append(LayerError(*found)), recorded[-1])[1])
    objective(batch_of([80], 60), 0.75)
    recorded[1].error.backward()
    assert all(p.grad is None for p in wrappers(model)[0].less().parameters())
    assert any(p.grad is not None for p in last.less().parameters())


def test_end_to_end_begins_layer_by_layer():
    model = gated(gate="none", dtype=torch.float32, less_dropout=0.0, **LESS)
    batch = batch_of([120], 100)
    batch["weights"] = torch.ones(1, 120)
    end, layers = (LessObjective(loud(model), "sinks_recent", kind) for kind in ("kl", "attention_mse"))
    wanted = layers(batch, 0.4)["loss"]
    torch.testing.assert_close(end(batch, 0.4, warm=True)["loss"], wanted)
    whole = end(batch, 0.4)["loss"]
    assert not torch.isclose(whole, wanted, rtol=1e-2)
    found = end.soft_hard(batch, 0.4)
    assert found["kl"] == pytest.approx(float(whole), rel=1e-5) and found["error"] == pytest.approx(
        float(wanted), rel=1e-5
    )


def test_learning_closes_a_gap():
    torch.manual_seed(0)
    model = gated(gate="none", dtype=torch.float32, less_rank=8, less_hidden=32, less_dropout=0.0)
    objective = LessObjective(model, "sinks_recent")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    batch = batch_of([120], 100)
    first = None
    for _ in range(60):
        optimizer.zero_grad()
        out = objective(batch, 0.4)
        out["loss"].backward()
        optimizer.step()
        first = first or float(out["loss"])
    assert float(out["loss"]) < 0.8 * first and first == pytest.approx(float(out["alone"]), rel=1e-2)


def test_a_trained_gate_stays_as_it_is_and_both_travel_in_one_adapter(tmp_path):
    model = gated(window=6, sinks=2, dtype=torch.float32)
    model.save_pretrained(tmp_path / "gate")
    gates = [{k: v.clone() for k, v in w.gate().state_dict().items()} for w in wrappers(model)]
    both = with_maps(
        tiny(dtype=torch.float32), str(tmp_path / "gate"), less_policy="gate+global", less_budget=0.5, **LESS
    )
    assert all(not p.requires_grad for w in wrappers(both) for p in w.gate().parameters())
    loud(both).save_pretrained(tmp_path / "both")
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(tiny(dtype=torch.float32), tmp_path / "both").eval()
    for w, old, mine in zip(wrappers(loaded), gates, wrappers(both)):
        assert all(torch.equal(v, old[k]) for k, v in w.gate().state_dict().items())
        assert all(torch.equal(v, mine.less().state_dict()[k]) for k, v in w.less().state_dict().items())
    again = with_maps(tiny(dtype=torch.float32), str(tmp_path / "both"), less_policy="snapkv", less_budget=0.3, **LESS)
    for w, mine in zip(wrappers(again), wrappers(both)):  # learning goes on where it ended
        assert all(torch.equal(v, mine.less().state_dict()[k]) for k, v in w.less().state_dict().items())
        assert all(p.requires_grad for p in w.less().parameters())
    with pytest.raises(ValueError, match="maps with rank 3, and rank is 5: go on with --rank 3"):
        with_maps(tiny(dtype=torch.float32), str(tmp_path / "both"), **LESS | {"less_rank": 5})
    ids = torch.randint(1, 90, (1, 60))
    a, b = (gatekv.KVCache(m, "gate+global+less", 0.5) for m in (both, loaded))
    torch.testing.assert_close(both(ids, past_key_values=a).logits, loaded(ids, past_key_values=b).logits)


def test_options_and_their_errors():
    config = load_config(["--policy", "l2+ada", "--rank", "4", "--target_keep=.25"], LessConfig)
    assert (config.policy, config.rank, config.target_keep) == ("l2+ada", 4, 0.25)
    for argv, words in (
        (["--polcy", "l2"], "Did you mean 'policy'"),
        (["--policy", "l3"], "Did you mean 'l2'"),
        (["--policy", "snapkv+less"], "leave .less out"),
        (["--policy", "gate+global"], "needs a gate: name a trained one"),
        (["--rank", "0"], "rank must be at least 1"),
        (["--target_keep", ".9", "--budget_spread", "2"], "at most 1"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            load_config(argv, LessConfig)
    with pytest.raises(ValueError, match="no low-rank maps to train"):
        LessObjective(gated(), "snapkv")
