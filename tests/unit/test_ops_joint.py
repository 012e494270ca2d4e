"""One softmax over several memories equals its readable reference, and the merge of their answers."""

import pytest
import torch

from gatekv.ops import joint, naive, segments
from gatekv.ops.rectangle import Rectangle
from gatekv.ops.scale import Scale

B, KV, G, D = 2, 3, 2, 8


def memories(lengths, queries, generator, hides, fewer=3):
    """Random ones; the second asks other queries of fewer channels, and the first hides some tokens from each query."""
    made, rows = [], B * KV
    for i, n in enumerate(lengths):
        width = D - fewer if i == 1 else D
        keys, values = (torch.randn(rows, n, w, generator=generator, dtype=torch.float64) for w in (width, D))
        hidden = torch.rand(rows, queries, n, generator=generator) < 0.4 if hides and i == 0 else None
        own = torch.randn(B, KV * G, queries, width, generator=generator, dtype=torch.float64) if i == 1 else None
        made.append(Rectangle(keys.requires_grad_(), values.requires_grad_(), hidden, own))
    return made


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("scale", [0.3, Scale(0.3, 0.8)], ids=["plain", "capped"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("lengths", [(1,), (7,), (13, 1), (5, 17, 3)])
def test_the_fast_one_equals_the_readable_one(lengths, queries, scale, hides):
    generator = torch.Generator().manual_seed(0)
    parts = memories(lengths, queries, generator, hides)
    q = torch.randn(B, KV * G, queries, D, generator=generator, dtype=torch.float64, requires_grad=True)
    found = []
    for form in (joint, naive):
        out, scores, paid = form.joint_attention(q, parts, scale, blind=True)
        leaves = [q, *(t for part in parts for t in part[:2])]
        out.nan_to_num().square().sum().backward() if not hides else None
        found.append([out, scores, *paid, *(t.grad.clone() for t in leaves if t.grad is not None)])
        for t in leaves:
            t.grad = None
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lengths", [(7,), (5, 17, 3)])
def test_it_is_the_merge_of_what_each_memory_answers(lengths):
    generator = torch.Generator().manual_seed(1)
    parts = memories(lengths, 1, generator, hides=True, fewer=0)
    q = torch.randn(B, KV * G, 1, D, generator=generator, dtype=torch.float64)
    answers = []
    for keys, values, hidden, own in parts:
        mask = None if hidden is None else ~hidden.view(B, KV, 1, -1)
        asked = q if own is None else own
        k, v = (t.view(B, KV, -1, t.shape[-1]) for t in (keys, values))
        answers.append(segments.dense_segment(asked, k, v, mask, 0.3))
    out, lse = segments.merge(answers)
    got, scores, _ = joint.joint_attention(q, parts, 0.3, blind=True)
    torch.testing.assert_close(got, out, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(joint.log_sum_exp(scores, q), lse, rtol=1e-9, atol=1e-12)


def test_a_query_that_sees_nothing_gets_nothing():
    generator = torch.Generator().manual_seed(2)
    keys, values = (torch.randn(B * KV, 5, D, generator=generator) for _ in range(2))
    hidden = torch.zeros(B * KV, 1, 5, dtype=torch.bool)
    hidden[0] = True
    q = torch.randn(B, KV * G, 1, D, generator=generator)
    for form in (joint, naive):
        out, scores, _ = form.joint_attention(q, [Rectangle(keys, values, hidden)], 0.3, blind=True)
        assert not out[0, :G].any() and out[0, G:].abs().min() > 0
        assert (joint.log_sum_exp(scores, q)[0, :G] == -torch.inf).all()
