"""Training for `rate`: what the student reads is what will be stored, and the loss reaches a gate through bits."""

import pytest
import torch
from conftest import VOCAB, gated

from gatekv.modules import wrappers
from gatekv.ops import codec
from gatekv.policies.bits import allot, rates, steps
from gatekv.policies.rate import Rate
from gatekv.presets import preset
from gatekv.training.coded import Coding
from gatekv.training.config import CPTConfig
from gatekv.training.objective import Objective


def prompt(tokens=40, dim=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, 3, tokens, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    return keys * 2, values, torch.randn(2, 6, 5, dim, generator=generator, dtype=torch.float64)


def test_each_token_reads_as_the_allocation_would_store_it():
    """At the price of a byte at which the margin is zero, tokens get the bits that `allot` gives them."""
    keys, values, q = prompt()
    width, valid = Rate(window=4, sinks=2), torch.ones(2, 40, dtype=torch.bool)
    margin = torch.rand(2, 3, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    read = Coding.of(width, margin, valid, 2).read(keys, values, q, 0.2)
    log_w = width.key_errors(q, None, keys, 0.2)
    gains, _ = rates(log_w.double().exp(), width.evicted, (32, 32), 2)
    log_u = width.slope * margin - gains[0].log()  # so that a margin of zero enters at a price of one
    spent = sum(step.price * (log_u + gain.log() > 0) for step, gain in zip(steps((32, 32), 2), gains)).sum(-1) + 1e-3
    none = torch.zeros(6, 40, dtype=torch.bool)
    bits = allot(log_u.flatten(0, 1), log_w.flatten(0, 1), none, none, spent.flatten(), width.evicted, (32, 32), 2)
    assert len(bits.unique()) >= 4
    heads = torch.arange(3)[:, None].expand(2, 3, 1).flatten()
    for x, got, part in ((keys, read[0], 0), (values, read[1], 1)):
        for row, head in enumerate(heads):
            turned = codec.turn(x.flatten(0, 1)[row], head, 3)
            stored = [
                codec.decode(codec.encode(t[None], int(b), torch.float64), int(b), 32, torch.float64)[0]
                for t, b in zip(turned, bits[row, :, part])
            ]
            wanted = codec.turn_back(torch.stack(stored), head, 3)
            torch.testing.assert_close(got.flatten(0, 1)[row, 2:-4], wanted[2:-4], rtol=1e-5, atol=1e-6)
    assert torch.equal(read[0][:, :, :2], keys[:, :, :2]) and torch.equal(read[1][:, :, -4:], values[:, :, -4:])


def test_the_gradient_says_what_the_next_bits_are_worth():
    keys, values, q = prompt()
    valid = torch.ones(2, 40, dtype=torch.bool)
    margin = torch.zeros(2, 3, 40, dtype=torch.float64, requires_grad=True)
    read = Coding.of(Rate(window=4, sinks=2), margin, valid, 2).read(keys, values, q, 0.2)
    loss = (read[0] - keys).square().sum() + (read[1] - values).square().sum()
    loss.backward()
    judged = margin.grad[..., 2:-4]
    assert (judged < 0).double().mean() > 0.95, "more utility, more bits, less error"
    assert not margin.grad[..., :2].any() and not margin.grad[..., -4:].any()


def test_a_step_trains_the_gates_and_nothing_else():
    model = gated(dtype=torch.float32, relaxation="ste", window=4, sinks=2).train()
    objective = Objective(model, prefill="dense", width=Rate(window=4, sinks=2), oracle_weight=0.3)
    plain = Objective(model, prefill="dense", oracle_weight=0.3)
    ids = torch.randint(1, VOCAB, (2, 64), generator=torch.Generator().manual_seed(0))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "weights": torch.ones(2, 64),
        "split": torch.tensor([48, 48]),
    }
    batch["position_ids"] = torch.arange(64).expand(2, -1)
    losses = [o(batch, 0.5) for o in (objective, plain)]
    assert losses[0]["task"] != losses[1]["task"] and losses[0]["keep"] == losses[1]["keep"]
    losses[0]["loss"].backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) == ("gatekv_" in name), name
    assert all(w.active() for w in wrappers(model))


def test_what_cannot_be_trained_so_is_refused():
    for wrong in (dict(prefill="sparse"), dict(prefill="dense", objective="attention_mse", scope="layer")):
        with pytest.raises(ValueError, match="training for rate codes a prompt"):
            Objective(gated(dtype=torch.float32), width=Rate(), **wrong)
    with pytest.raises(ValueError, match="leave LoRA out"):
        Objective(
            gated(dtype=torch.float32, lora={"r": 2, "target_modules": ["q_proj"]}), prefill="dense", width=Rate()
        )
    with pytest.raises(ValueError, match="training for rate codes a prompt"):
        CPTConfig(prefill="rate", objective="none", oracle_weight=1.0)
    with pytest.raises(ValueError, match="gradient_checkpointing is for prefill='sparse'"):
        CPTConfig(prefill="rate", gradient_checkpointing=True)
    assert CPTConfig(**preset("rate")).prefill == "rate"
