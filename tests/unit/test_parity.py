"""Our selections are kvpress's, token for token and channel for channel, with the same parameters on the same tensors.

The numbers come from `tests/fixtures/kvpress_selections.py`, run in kvpress's own environment.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny

import gatekv
from gatekv.attention import AttentionCall
from gatekv.policies import TOVA, AdaKV, KeyDiff, L2Norm, PyramidKV, SnapKV, ThinK

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
sys.path.insert(0, str(FIXTURES))
import kvpress_selections as peer  # noqa: E402

FOUND = json.loads(peer.FIXTURE.read_text())
SNAP = dict(window=16, kernel=5, pooling="mean")
OURS = {
    "snapkv": SnapKV(**SNAP),
    "l2": L2Norm(skip_layers=()),
    "tova": TOVA(),
    "keydiff": KeyDiff(),
    "pyramid": PyramidKV(SnapKV(**SNAP), variant="kvpress"),
    "ada": AdaKV(SnapKV(**SNAP), floor="hard"),
}


def compressed(policy, ratio):
    """The layers of a cache that has read the fixture's tensors."""
    shape = dict(num_hidden_layers=peer.LAYERS, num_attention_heads=peer.HEADS, num_key_value_heads=peer.KV_HEADS,
                 head_dim=peer.HEAD_DIM, hidden_size=peer.HEADS * peer.HEAD_DIM)  # fmt: skip
    cache = gatekv.KVCache(tiny(dtype=torch.float32, **shape), policy, ratio)
    for i, layer in enumerate(cache.evicting()):
        q, k = (torch.from_numpy(x) for x in peer.tensors(i))
        layer.expect(0)
        layer.update(k[:, :, :0], k[:, :, :0])
        call = AttentionCall(hidden=torch.zeros(1, peer.TOKENS, 1), layer_idx=i)
        layer.attend(call, q, k, torch.zeros_like(k), None, peer.HEAD_DIM**-0.5)
    return cache.evicting()


@pytest.mark.parametrize("ratio", peer.RATIOS)
@pytest.mark.parametrize("name", OURS)
def test_the_same_tokens_are_kept(name, ratio):
    for i, layer in enumerate(compressed(OURS[name], ratio)):
        assert [h.nonzero().flatten().tolist() for h in layer.stage.held(layer)[0]] == FOUND["kept"][
            f"{name}/{ratio}/{i}"
        ]


def test_the_same_channels_go():
    for i, layer in enumerate(compressed(ThinK(window=32), None)):
        everything = set(range(peer.HEAD_DIM))
        assert [sorted(everything - set(kept)) for kept in layer.store.narrow.channels[0].tolist()] == \
            FOUND["pruned_channels"][str(i)]  # fmt: skip


def test_the_papers_pyramid_and_ada_share_the_budget_out_exactly_or_nearly():
    """kvpress's variants differ from the papers'; the papers' own spend what they are given."""
    for policy in (PyramidKV(), AdaKV(), AdaKV(PyramidKV())):
        kept = [layer.stage.held(layer).sum().item() for layer in compressed(policy, 0.25)]
        total = 0.25 * peer.TOKENS * peer.KV_HEADS * peer.LAYERS
        assert total - 2 * peer.KV_HEADS * peer.LAYERS <= sum(kept) <= total + peer.KV_HEADS * peer.LAYERS
        if policy.layers == PyramidKV().layers:
            assert kept == sorted(kept, reverse=True) and kept[0] > kept[-1]
