"""Gates: shapes, "keep everything" at the start, streaming = whole, relaxations and their gradients."""

import pytest
import torch

from gatekv.config import GateSpec
from gatekv.gates import build_gate
from gatekv.gates.calibration import Calibration
from gatekv.gates.key_mlp import key_features, unrotate
from gatekv.gates.relaxations import log, logit_of, relax, ste


@pytest.mark.parametrize("form", ["linear", "mlp", "key_mlp", "attention", "prompt"])
def test_starts_as_keep_everything(form):
    spec = GateSpec(gate="attention", context="prompt") if form == "prompt" else GateSpec(gate=form)
    gate = build_gate(spec, 32, 3, 8)
    logits, _ = gate(torch.randn(2, 11, 48 if gate.reads == "keys" else 32))
    assert logits.shape == (2, 3, 11) and logits.dtype == torch.float32
    torch.testing.assert_close(logits, torch.full_like(logits, 4.6))
    assert torch.sigmoid(logits).min() > 0.98


@pytest.mark.parametrize("context", [1, 5, 64])
@pytest.mark.parametrize("cuts", [[1], [3, 4, 20], list(range(1, 40))])
def test_attention_gate_streams(context, cuts):
    torch.manual_seed(0)
    gate = build_gate(GateSpec(gate="attention", context_window=context, heads=2, head_dim=4), 16, 3, 8).double()
    torch.nn.init.normal_(gate.out.weight)
    torch.nn.init.normal_(gate.distance)
    hidden = torch.randn(2, 40, 16, dtype=torch.float64)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, :13] = False
    whole, _ = gate(hidden, valid)
    state, pieces = None, []
    for a, b in zip([0, *cuts], [*cuts, 40]):
        piece, state = gate(hidden[:, a:b], valid[:, a:b], state)
        pieces.append(piece)
        assert state[0].shape[1] == context - 1, "the ring is of constant size"
    real = valid[:, None].expand_as(whole)
    torch.testing.assert_close(torch.cat(pieces, -1)[real], whole[real])
    alone, _ = gate(hidden[1:, 13:])
    torch.testing.assert_close(whole[1:, :, 13:], alone)


def test_attention_gate_is_causal_and_local():
    torch.manual_seed(0)
    gate = build_gate(GateSpec(gate="attention", context_window=4, heads=1, head_dim=4), 8, 1, 8)
    torch.nn.init.normal_(gate.out.weight)
    hidden = torch.randn(1, 12, 8)
    before, _ = gate(hidden)
    changed = hidden.clone()
    changed[0, 5] += 1
    after, _ = gate(changed)
    differs = (before != after)[0, 0]
    assert differs[5:9].all() and not differs[:5].any() and not differs[9:].any()


def test_ste_is_hard_forward_and_soft_backward():
    margin = torch.tensor([-2.0, -0.1, 0.1, 3.0], requires_grad=True)
    g = ste(margin)
    torch.testing.assert_close(g, torch.tensor([0.0, 0.0, 1.0, 1.0]))
    g.sum().backward()
    p = torch.sigmoid(margin.detach())
    torch.testing.assert_close(margin.grad, p * (1 - p))


def test_log_gate_never_reaches_zero():
    weight = log(torch.tensor([-1e4, 0.0, 1e4]))
    assert weight[0] > 0 and weight[1] == 0.5 and weight[2] == 1
    assert torch.isfinite(weight.log()).all()


def test_threshold_as_logit():
    assert logit_of(0.5) == 0
    assert torch.sigmoid(torch.tensor(logit_of(0.9))).item() == pytest.approx(0.9)


def test_calibrated_levels():
    calibration = Calibration([1.0, 0.25], [0.0, 0.5, 1.0], [[10.0, 0.0, -10.0], [20.0, 2.0, -20.0]])
    at = calibration.thresholds(sinks=4, window=32)
    seen = torch.tensor([[20, 144, 1000, 100000]])
    got = at(0.25, seen)
    # below (sinks + window) / ratio = 144 tokens nothing may stay; from there on every fourth, so that ratio·T holds at any T
    assert got[0, 0] == torch.inf
    assert got[0, 1:].tolist() == pytest.approx([20 - 36 * 0.25] * 3)
    # in a prompt of known length all tokens share alike
    level = (0.25 * 1000 - 36) / (1000 - 36)
    assert at(0.25, seen, 1000)[0, :3].tolist() == pytest.approx([20 - 36 * level] * 3, rel=1e-4)
    assert (at(1.0, seen) == -torch.inf).all()
    mid = calibration.row(0.5)
    assert mid[0] == pytest.approx(15.0)
    assert calibration.row(0.01) == calibration.table[-1]


@pytest.mark.parametrize(
    "bad",
    [
        {"context": "prompt"},
        {"temperature": 0.0},
        {"gate": "mpl"},
        {"window": -1},
        {"threshold": 1.0},
        {"relaxation": "gumble"},
        {"hidden": 0},
    ],
)
def test_bad_spec_names_the_argument(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        GateSpec(**bad)


def test_unknown_key_suggests_the_nearest():
    with pytest.raises(TypeError, match="Did you mean 'window'"):
        GateSpec(windw=3)


def test_dms_scale_makes_small_weights_loud():
    gate = build_gate(GateSpec(gate="linear", logit_scale=100.0, initial_logit=5.0), 8, 1, 8)
    torch.testing.assert_close(gate(torch.randn(1, 4, 8))[0], torch.full((1, 1, 4), 5.0))
    torch.nn.init.ones_(gate.out.weight)
    hidden = torch.randn(1, 4, 8)
    expected = 100 * (gate.norm(hidden).sum(-1) + 0.05)
    torch.testing.assert_close(gate(hidden)[0][:, 0], expected)


def test_gumbel_noise_is_a_function_of_its_seed_and_logistic():
    margin = torch.zeros(1, 1, 20000)
    a, b = (relax("gumbel", margin, 1.0, seed) for seed in (1, 1))
    assert torch.equal(a, b) and not torch.equal(a, relax("gumbel", margin, 1.0, 2))
    noise = torch.logit(a.double())
    assert noise.mean().abs() < 0.05 and noise.std().item() == pytest.approx(torch.pi / 3**0.5, rel=0.03)
    torch.testing.assert_close(relax("gumbel", margin + 0.2, 0.1, None), torch.full_like(margin, 2.0).sigmoid())
    kept = (relax("gumbel", margin + 1.0, 0.1, 3) > 0.5).float().mean()
    assert kept.item() == pytest.approx(torch.tensor(1.0).sigmoid().item(), abs=0.02), "P(keep) is sigmoid(margin)"


def test_a_prompt_gate_reads_later_tokens_and_no_pads():
    gate = build_gate(GateSpec(gate="attention", context="prompt", heads=1, head_dim=4), 8, 2, 8)
    torch.nn.init.normal_(gate.out.weight)
    hidden, valid = torch.randn(1, 9, 8), torch.ones(1, 9, dtype=torch.bool)
    changed = hidden.clone()
    changed[:, -1] += 1
    assert (gate(changed, valid)[0] - gate(hidden, valid)[0])[..., 0].abs().min() > 1e-6
    valid[:, -1] = False
    torch.testing.assert_close(gate(changed, valid)[0][..., :8], gate(hidden, valid)[0][..., :8])


@pytest.mark.parametrize("part", [8, 4])
def test_keys_before_rope_are_recovered(part):
    """Checked against transformers' own rotation; `part` of the head may be rotated alone (Phi)."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    keys = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    angles = torch.arange(7.0, dtype=torch.float64)[:, None] * torch.rand(part // 2, dtype=torch.float64)
    angles = torch.cat([angles, angles], -1)[None]
    rotary = (1.3 * angles.cos(), 1.3 * angles.sin())  # some families scale attention through cos and sin
    turned, _ = apply_rotary_pos_emb(keys[..., :part], keys[..., :part], *rotary)
    turned = torch.cat([turned, keys[..., part:]], -1)
    torch.testing.assert_close(unrotate(turned, rotary), keys)
    both = key_features(turned, rotary)
    assert both.shape == (2, 7, 3 * 2 * 8)
    torch.testing.assert_close(both[:, :, :8], keys[:, 0])
    torch.testing.assert_close(both[:, :, 8:16], turned[:, 0])
    with pytest.raises(ValueError, match="key_mlp"):
        key_features(keys, None)
