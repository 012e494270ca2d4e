"""Any sequence of operations on a cache against plain lists of what each row was fed: a row answers as it does alone."""

import copy
import pickle
import random
from functools import cache, partial
from tempfile import TemporaryDirectory
from unittest.mock import Mock

import pytest
import torch
from conftest import SHAPE, VOCAB, gated, tiny
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import gatekv
from gatekv.modules import base_model
from gatekv.policies import QAQ, L2Norm, Policy, SnapKV, ThinK
from gatekv.policies.rate import Rate

# Name -> (policy, budget, options of the cache, what the gates are, whether tokens can be taken back).
GATE = dict(window=4, sinks=2)
LATE = dict(window=18, sinks=1)  # from a window of 16 on, gates read late
ATTENTION = dict(gate="attention", context_window=5)  # a gate with a memory
POLICIES = {
    "full": ("full", None, {}, None, True),
    "snapkv": (SnapKV(window=4), 0.6, {}, None, True),
    "snapkv+think": (ThinK(SnapKV(window=4), window=4), 0.8, {}, None, True),
    "qaq": (QAQ(window=4), None, {}, None, True),
    "snapkv+rate": (Policy(SnapKV(window=4), width=Rate(window=4, sinks=1)), 0.5, {"decode": "keep"}, None, True),
    "h2o": ("h2o", 0.5, {}, None, False),
    "streaming_llm": ("streaming_llm", 0.5, {}, None, False),
    "l2 evict": (L2Norm(skip_layers=()), 0.6, dict(decode="evict", window=1), None, False),
    "gate": ("gate", None, {}, GATE, True),
    "gate late": ("gate", None, {}, LATE, True),
    "attention gate": ("gate", None, {}, GATE | ATTENTION, True),
    "attention gate late": ("gate", None, {}, LATE | ATTENTION, True),
    "gate+global": ("gate+global", 0.6, {}, GATE, True),
    "gate+decay": ("gate+decay", 0.6, {}, GATE | dict(relaxation="decay"), False),
    "gate+less": ("gate+less", None, {}, GATE | dict(less_rank=2), True),
    "snapkv+less": ("snapkv+less", 0.6, dict(window=4), GATE | dict(less_rank=2), True),
}
OPERATIONS = ["append"] * 4 + ["ragged"] * 3 + ["fork", "back", "crop", "crop", "rows", "rows", "copy", "break"]
MANY = 17, 40  # sequences of a policy, and operations of each, in the exhaustive run: ten thousand in all
PROMPT = 10, 26  # tokens of a row's first piece, more than of any later one


@cache
def model_of(name):
    """With norms in float64: transformers' own round to float32, so that a last digit could tip over to 1e-8."""
    model = tiny()
    for norm in (m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"):
        norm.forward = torch.nn.RMSNorm(SHAPE["hidden_size"], 1e-6, dtype=torch.float64).forward
    return gated(model=model, **POLICIES[name][3]) if POLICIES[name][3] else model


def cache_of(name):
    return gatekv.KVCache(model_of(name), *POLICIES[name][:2], **POLICIES[name][2])


@torch.no_grad()
def call(name, cache, ids, mask=None):
    """Logits; mask: [rows, seen and new], or None where nothing is a pad."""
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return model_of(name)(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


def some(lengths, rng):
    return [[rng.randrange(1, VOCAB) for _ in range(n)] for n in lengths]


def laid(rows, rng):
    """(ids, mask) [rows, longest] with each row's tokens in order, behind its pads or among them."""
    mask, left = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long), rng.random() < 0.4
    for m, row in zip(mask, rows):
        places = range(len(m))
        m[list(places[len(m) - len(row) :]) if left else rng.sample(places, len(row))] = 1
    return torch.zeros_like(mask).masked_scatter(mask.bool(), torch.tensor(sum(rows, []))), mask


def interrupt(before, name, cache, *arguments):
    """A call that ends before a part of the model is run."""
    hook = before(base_model(model_of(name)).model.layers).register_forward_pre_hook(Mock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):
        call(name, cache, *arguments)
    hook.remove()


class Side:
    """A cache, and what it should be: for each row the pieces it was fed.

    mask: [rows, seen], the real tokens. held: [layer][row] -> [kv_heads, real tokens] bool, what the last look found.
    """

    def __init__(self, name, rng):
        self.name, self.cache = name, cache_of(name)
        self.start(rng)

    def start(self, rng):
        """Feed the prompts of some rows to a cache that holds nothing."""
        lengths = [rng.randint(*PROMPT) for _ in range(rng.randint(1, 3))]
        self.rows, self.held, self.mask = [[] for _ in lengths], None, torch.zeros(len(lengths), 0, dtype=torch.long)
        self.feed(some(lengths, rng), rng)

    def twin(self, cache):
        """The same lists, for a copy of the cache."""
        other = copy.copy(self)
        other.cache, other.rows = cache, [list(row) for row in self.rows]
        return other

    def asked(self, pieces, rng):
        """Arguments of a call that feeds each row its piece, and the mask behind it."""
        ids, mask = laid(pieces, rng)
        mask = torch.cat([self.mask, mask], 1)
        return (ids, None if mask.all() and rng.random() < 0.5 else mask), mask

    def feed(self, pieces, rng, call=call):
        """A call that takes the tokens in."""
        arguments, self.mask = self.asked(pieces, rng)
        call(self.name, self.cache, *arguments)
        self.rows = [row + [piece] if piece else row for row, piece in zip(self.rows, pieces)]

    def crop(self, n):
        """Take back each row's last n tokens, where the cache can; it says so, and is as it was, where it cannot."""
        try:
            self.cache.crop(-n)
        except ValueError as refusal:
            assert "cannot take back" in str(refusal)
            return
        assert self.mask[:, -n:].all(), "there are pads among them"
        self.mask = self.mask[:, :-n]
        for row in self.rows:
            for _ in range(n):
                row[-1:] = [row[-1][:-1]] if len(row[-1]) > 1 else []
        self.held = None  # younger again, a token may be in the window again

    def choose(self, rng):
        """Other rows, or the same in another order or number."""
        n, how = len(self.rows), rng.choice(["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
        if how == "batch_repeat_interleave":
            index = sorted([*range(n)] * (times_or_rows := 2 if n < 3 else 1))
        else:
            index = [rng.randrange(n) for _ in range(n if how == "reorder_cache" else rng.randint(1, 4))]
            times_or_rows = torch.tensor(index)
        getattr(self.cache, how)(times_or_rows)
        self.rows, self.mask = [list(self.rows[i]) for i in index], self.mask[index]
        self.held = self.held and [[layer[i] for i in index] for layer in self.held]

    def look(self):
        """What each row holds of its real tokens; pads are never held."""
        flags, real = self.cache.flags(), self.mask.bool()
        for layer in flags:
            assert layer.transpose(1, 2)[..., 0].shape == real.shape and not layer.transpose(1, 2)[~real].any()
        return [[held[:, mask] for held, mask in zip(layer, real)] for layer in flags]

    def check(self, untouched=False):
        """What is gone does not come back; what is counted are real tokens. untouched: nothing was done to it."""
        held = self.look()
        for layer, before in zip(held, self.held or []):
            for now, then in zip(layer, before):
                assert not (now[:, : then.shape[1]] & ~then).any(), "an evicted token came back"
                assert not untouched or torch.equal(now, then), "another side's operation changed this one"
        self.held = held
        counts, memory = [sum(map(len, row)) for row in self.rows], self.cache.memory()
        assert self.mask.sum(-1).tolist() == counts and self.cache.get_seq_length() == self.mask.shape[1]
        each = 2 * SHAPE["num_key_value_heads"] * SHAPE["head_dim"] * 8 * SHAPE["num_hidden_layers"]
        assert memory["bytes"] > 0 and memory["full_bytes"] == sum(counts) * each

    def compare(self, rng):
        """A row holds and answers what a new cache does that is fed the row's pieces alone."""
        i, alone = rng.randrange(len(self.rows)), cache_of(self.name)
        for piece in self.rows[i]:
            call(self.name, alone, torch.tensor([piece]))
        assert all(torch.equal(mine[i], theirs[0]) for mine, theirs in zip(self.look(), alone.flags())), "others held"
        pieces = some([rng.randint(1, 3)] * len(self.rows), rng)
        together = call(self.name, self.cache.snapshot(), *self.asked(pieces, rng)[0])[i]
        torch.testing.assert_close(together, call(self.name, alone, torch.tensor([pieces[i]]))[0], rtol=1e-8, atol=1e-8)


def step(sides, operation, seed, folder):
    """One operation on one of the sides, by the numbers that seed gives."""
    rng = random.Random(seed)
    side, most = rng.choice(sides), rng.randint(1, 6)
    name, pieces = side.name, some([most] * len(side.rows), rng)
    if operation == "append":
        side.feed(pieces, rng)
    elif operation == "ragged":
        side.feed([piece[: rng.randint(0, most)] if i else piece for i, piece in enumerate(pieces)], rng)
    elif operation == "fork":
        sides.append(side.twin(rng.choice([side.cache.snapshot, lambda: copy.deepcopy(side.cache)])()))
    elif operation == "back":  # to what it was before a call
        before = side.twin(side.cache.snapshot())
        side.feed(pieces, rng)
        side.cache.restore(before.cache)
        vars(side).update(vars(before.twin(side.cache)))
        sides.append(before)
    elif operation == "crop" and POLICIES[name][4] and side.mask.sum(-1).min() > 8:
        side.cache.activate_past_recording() if rng.random() < 0.3 else None
        side.crop(rng.randint(1, 8))
    elif operation == "rows":
        side.choose(rng)
    elif operation == "copy":
        if rng.random() < 0.5:
            side.cache.save(path := f"{folder}/cache.safetensors")
            other = side.twin(gatekv.KVCache.load(path, model_of(name)))
        else:
            other = side.twin(pickle.loads(pickle.dumps(side.cache)))
            other.cache.model = model_of(name)
        sides.append(other)
    elif operation == "break":
        where, arguments, before = rng.randrange(4), side.asked(pieces, rng)[0], side.cache.snapshot()
        if where == 0:  # no layer has the tokens yet
            interrupt(lambda layers: layers[0], name, side.cache, *arguments)
        elif where == 1:  # all have
            side.feed(pieces, rng, partial(interrupt, lambda layers: layers[1].mlp))
        else:
            interrupt(lambda layers: layers[1], name, side.cache, *arguments)
            for use in (lambda: call(name, side.cache, *arguments), lambda: pickle.dumps(side.cache)):
                with pytest.raises(ValueError, match="was interrupted"):
                    use()
            side.cache.restore(before) if where == 2 else side.cache.reset()
            side.start(rng) if where == 3 else None
    for other in sides:
        other.check(untouched=other is not side)
    if rng.random() < 0.12:
        rng.choice(sides).compare(rng)
    if len(sides) > 3:
        sides.pop(rng.randrange(len(sides)))


@pytest.mark.covering(1)  # every policy
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("examples,length", [(2, 13), pytest.param(*MANY, marks=pytest.mark.exhaustive)])
def test_any_sequence_of_operations_equals_each_row_alone(name, examples, length):
    operation, done = st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 2**20)), []

    @settings(max_examples=examples, derandomize=True, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.lists(operation, min_size=length, max_size=length), st.integers(0, 2**20))
    def sequence(operations, seed):
        sides = [Side(name, rng := random.Random(seed))]
        with TemporaryDirectory() as folder:
            for each in operations:
                step(sides, *each, folder)
                done.append(each)
        for side in sides:
            side.compare(rng)

    sequence()
    assert len(done) >= examples * length and len(POLICIES) * MANY[0] * MANY[1] >= 10_000
