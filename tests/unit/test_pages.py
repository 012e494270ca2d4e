"""Paged storage against a plain list of tokens a row: any sequence of operations, no page lost, little slack."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatekv.cache.segments.pages import Pages
from gatekv.cache.segments.pool import FREE
from gatekv.cache.segments.window import RecentWindow
from gatekv.ops import naive, paged_attention

KV, D = 3, 4


class Model:
    """What Pages should be: a list of tokens for each row."""

    def __init__(self, batch):
        self.rows = [[] for _ in range(batch * KV)]
        self.next = 0

    def append(self, keep, keys):
        for r, row in enumerate(keep.flatten(0, 1)):
            self.rows[r] += [(self.next + i, keys.flatten(0, 1)[r, i].clone()) for i in row.nonzero()[:, 0].tolist()]
        self.next += keep.shape[-1]


def check(pages: Pages, model: Model):
    """Same tokens in every row, consistent tables, unused slots finite."""
    assert pages.lengths.tolist() == [len(r) for r in model.rows] and len(pages) == sum(map(len, model.rows))
    occupied = pages.occupied()
    assert int(occupied.sum()) == len(pages)
    for r, wanted in enumerate(model.rows):
        mine = (pages.owners == r)[:, None] & occupied
        got = sorted(zip(pages.positions[mine].tolist(), pages.keys[mine]), key=lambda t: t[0])
        wanted = sorted(wanted, key=lambda t: t[0])
        assert [p for p, _ in got] == [p for p, _ in wanted]
        for (_, a), (_, b) in zip(got, wanted):
            assert torch.equal(a, b)
    need = sum(-(-len(r) // pages.block_size) for r in model.rows)
    assert len(pages.table.pages) == need == int((pages.owners != FREE).sum())
    assert len(pages.owners) == need + pages.free
    assert torch.isfinite(pages.keys).all() and torch.isfinite(pages.values).all()


operation = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 9), st.floats(0, 1)),
    st.tuples(st.just("evict"), st.floats(0, 1), st.booleans()),
    st.tuples(st.just("crop"), st.integers(0, 12), st.none()),
    st.tuples(st.just("select"), st.lists(st.integers(0, 5), min_size=1, max_size=4), st.none()),
    st.tuples(st.just("twin"), st.none(), st.none()),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(operation, max_size=14), st.integers(0, 10**6), st.sampled_from([1, 3, 16]))
def test_any_sequence_of_operations_equals_plain_lists(operations, seed, block):
    generator = torch.Generator().manual_seed(seed)
    batch = 2
    like = torch.zeros(batch, KV, 0, D, dtype=torch.float64)
    pages, model = Pages(like, block), Model(batch)
    frozen = []
    for name, a, b in operations:
        if name == "append":
            keep = torch.rand(batch, KV, a, generator=generator) < b
            keys = torch.rand(batch, KV, a, D, generator=generator, dtype=torch.float64)
            pages.append(keys, keys + 1, keep, model.next)
            model.append(keep, keys)
        elif name == "evict":
            gone = torch.rand(pages.positions.shape, generator=generator) < a
            for r in range(batch * KV):
                lost = set(pages.positions[gone & (pages.owners == r)[:, None] & pages.occupied()].tolist())
                model.rows[r] = [t for t in model.rows[r] if t[0] not in lost]
            pages.evict(gone)
            if b:
                pages.shrink()
                assert pages.free == 0
        elif name == "crop":
            model.next = max(0, model.next - a)
            model.rows = [[t for t in r if t[0] < model.next] for r in model.rows]
            seen = torch.full((batch, 1), model.next + 64)
            gone = pages.unwanted(torch.zeros(batch, KV, 64, dtype=torch.bool), seen)
            keys, values, positions, held, _ = pages.taken(gone)
            assert held.sum() == gone.sum() and not keys[~held].any() and not values[~held].any()
            assert sorted(positions[held].tolist()) == sorted(pages.positions[gone].tolist())
            pages.evict(gone)
            pages.shrink()
        elif name == "select":
            index = torch.tensor([i % batch for i in a])
            rows = (index[:, None] * KV + torch.arange(KV)).flatten()
            pages.index_select(index)
            model.rows, batch = [list(model.rows[r]) for r in rows.tolist()], len(a)
        else:
            frozen.append((pages.fork(), [list(r) for r in model.rows]))
        check(pages, model)
    for twin, rows in frozen:
        past = Model(1)
        past.rows = rows
        check(twin, past)
    q = torch.randn(batch, KV * 2, 2, D, generator=generator, dtype=torch.float64)
    for x, y in zip(
        paged_attention.paged_segment(q, pages.keys, pages.values, pages.table, 0.5),
        naive.paged_segment(q, pages.keys, pages.values, pages.table, 0.5),
    ):
        torch.testing.assert_close(x, y)


def test_ten_thousand_operations_leak_no_page():
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    like = torch.zeros(2, KV, 0, D)
    pages, position, most = Pages(like, 4), 0, 0
    for _ in range(10_000):
        if len(pages) < 300 or rng.random() < 0.45:
            n = rng.randint(1, 6)
            keys = torch.rand(2, KV, n, D, generator=generator)
            pages.append(keys, keys, torch.rand(2, KV, n, generator=generator) < 0.7, position)
            position += n
        else:
            pages.evict(torch.rand(pages.positions.shape, generator=generator) < rng.random() * 0.2)
        used = int((-(-pages.lengths // 4)).sum())
        assert used + pages.free == len(pages.owners) == len(pages.keys)
        assert len(pages) == int(pages.lengths.sum()) == int(pages.occupied().sum())
        most = max(most, used)
        assert len(pages.keys) <= most * 1.01 + 6, "a freed page was not used again"
    before = int((-(-pages.lengths // 4)).sum())
    pages.shrink()
    assert len(pages.keys) == before and pages.free == 0


def test_the_pool_grows_by_what_is_needed_or_one_percent():
    keys = torch.rand(1, 2, 3200, D)
    pages = Pages(keys, 16)
    pages.append(keys, keys, torch.ones(1, 2, 3200, dtype=torch.bool), 0)
    assert len(pages.keys) == 400, "a prompt takes exactly its pages"
    pages.append(keys[:, :, :1], keys[:, :, :1], torch.ones(1, 2, 1, dtype=torch.bool), 3200)
    assert len(pages.keys) == 404 and pages.free == 2
    sizes = set()
    for i in range(16):
        pages.append(keys[:, :, :1], keys[:, :, :1], torch.ones(1, 2, 1, dtype=torch.bool), 3201 + i)
        sizes.add(len(pages.keys))
    assert sizes == {404}, "room that is there is used before more is taken"


def test_appending_in_place_does_not_touch_a_twin_and_moves_no_pool():
    keys = torch.rand(1, KV, 20, D)
    pages = Pages(keys, 16)
    every = torch.ones(1, KV, 20, dtype=torch.bool)
    pages.append(keys, keys, every, 0)
    pool = pages.keys.data_ptr()
    pages.append(keys[:, :, :5], keys[:, :, :5], every[..., :5], 20)
    assert pages.keys.data_ptr() == pool, "the last page had room"
    twin = pages.fork()
    before = twin.keys.clone()
    pages.append(keys[:, :, :5] + 9, keys[:, :, :5], every[..., :5], 25)
    assert pages.keys.data_ptr() != pool and torch.equal(twin.keys, before) and len(twin) == 25 * KV


def test_positions_are_int32_and_scores_travel_with_their_tokens():
    keys = torch.rand(1, KV, 40, D)
    pages = Pages(keys, 16, with_scores=True)
    scores = torch.arange(40.0).expand(1, KV, 40) + torch.arange(KV)[:, None] * 100
    pages.append(keys, keys, torch.rand(1, KV, 40) < 0.5, 0, scores)
    pages.evict(torch.rand(pages.positions.shape) < 0.3)
    assert pages.positions.dtype == torch.int32
    held = pages.occupied()
    rows = pages.owners[:, None].expand_as(held)[held]
    assert torch.equal(pages.scores[held], pages.positions[held].float() + rows * 100)
    into = torch.full((1, KV, 40), -torch.inf)
    pages.scatter(into, pages.scores, torch.tensor([[40]]))
    assert torch.equal(into[into > -torch.inf], scores[into > -torch.inf]) and int((into > -torch.inf).sum()) == len(
        pages
    )


@pytest.mark.parametrize("slack", [0, 5])
def test_the_tail_is_what_was_appended_and_not_dropped(slack):
    rng, generator = random.Random(1), torch.Generator().manual_seed(0)
    tail = RecentWindow(torch.zeros(2, KV, 0, D), with_scores=True)
    wanted = [torch.zeros(2, KV, 0, D), torch.zeros(2, 0, dtype=torch.bool)]
    for _ in range(200):
        if rng.random() < 0.6:
            n = rng.randint(1, 4)
            keys = torch.rand(2, KV, n, D, generator=generator)
            valid = torch.rand(2, n, generator=generator) > 0.5
            tail.append(keys, keys + 1, valid[:, None].expand(2, KV, n), valid, keys[..., 0], slack=slack)
            wanted = [torch.cat([wanted[0], keys], 2), torch.cat([wanted[1], valid], 1)]
        else:
            front, back = rng.randint(0, len(tail) // 2), rng.randint(0, len(tail) // 2)
            tail.drop(front, back)
            wanted = [
                wanted[0][:, :, front : wanted[0].shape[2] - back],
                wanted[1][:, front : wanted[1].shape[1] - back],
            ]
        assert torch.equal(tail.keys, wanted[0]) and torch.equal(tail.values, wanted[0] + 1)
        assert torch.equal(tail.valid, wanted[1]) and torch.equal(tail.scores, wanted[0][..., 0])
        room = tail.tensors()[0].shape[2] - len(tail)
        assert room <= 200
    twin = tail.fork()
    before = twin.keys.clone()
    tail.append(torch.ones(2, KV, 1, D), torch.ones(2, KV, 1, D), torch.ones(2, KV, 1).bool(), torch.ones(2, 1).bool(),
                torch.ones(2, KV, 1), slack=slack)  # fmt: skip
    assert torch.equal(twin.keys, before) and len(tail) == len(twin) + 1
