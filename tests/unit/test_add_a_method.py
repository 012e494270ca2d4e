"""The worked examples of docs/add-a-method.md, each one file, keep what gatekv's own methods keep."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    VOCAB,
    MaskedMemory,
    assert_close,
    gated,
    padded_batch,
    plain_logits,
    positions_of,
    recurrent_logits,
    tiny,
)
from torch import nn

import gatekv
from gatekv.attention import AttentionCall
from gatekv.cache.forecast import forecast
from gatekv.cache.kvcache import distinct_bytes
from gatekv.evaluation import frontier, results
from gatekv.evaluation.names import gate_of, learned
from gatekv.evaluation.records import Records
from gatekv.evaluation.tasks.item import Item, log_loss
from gatekv.modules import base_model, wrappers
from gatekv.policies import Policy, Scorer, View, budgets, register_policy, resolve
from gatekv.policies.layers import Layers
from gatekv.policies.parts import RemainderPolicy, Width
from gatekv.policies.plugins import import_plugins
from gatekv.policies.registry import KINDS
from gatekv.training.less_config import LessConfig

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "docs" / "examples").glob("*.py"))
ALONE = ["value_aware", "snapkv+int8", "snapkv+mean_rest"]
POLICIES = [*ALONE, "value_aware+ada+int8", "value_aware+global+mean_rest", "h2o+int8", "h2o+mean_rest",
            "keydiff+int8+mean_rest"]  # fmt: skip
LATER = torch.randint(1, VOCAB, (3, 12), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The examples' policies, which are gone again behind this file."""
    before = {kind: dict(table) for kind, table in KINDS.items()}
    modules = import_plugins([str(path) for path in EXAMPLES])
    yield {module.__name__.rsplit("/")[-1].removesuffix(".py"): module for module in modules}
    for module in modules:
        del sys.modules[module.__name__]
    restore(before)


def restore(before):
    for kind, table in KINDS.items():
        table.clear()
        table.update(before[kind])


@pytest.fixture
def own_names():
    """What a test registers is gone behind it."""
    before = {kind: dict(table) for kind, table in KINDS.items()}
    yield
    restore(before)


def cached(model, policy, lengths, budget=0.6, **options):
    """(cache behind a left-padded prompt, mask of it)."""
    ids, mask = padded_batch(lengths)
    options = {"decode": "keep"} | options if "int8+mean" in policy else options
    cache = gatekv.KVCache(model, policy, budget, **options)
    recurrent_logits(model, ids, mask, cache, [])
    return cache, mask


@torch.no_grad()
def decoded(model, cache, mask, later):
    """Logits of single steps behind the prompt [batch, n, vocabulary]."""
    out = []
    for i in range(later.shape[1]):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        step = later[:, i : i + 1]
        positions = positions_of(mask)[:, -1:]
        out.append(model(step, attention_mask=mask, position_ids=positions, past_key_values=cache).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_one_short_file(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 80 and sum(line.startswith("register_policy(") for line in lines) == 1


def test_names_become_policies_and_say_what_they_are():
    assert str(resolve("value_aware+ada+int8", 0.5)) == "ValueAware x Ada x Int8"
    assert str(resolve("int8", None)) == "Full x Uniform x Int8"
    assert str(resolve("snapkv+mean_rest", 0.5)) == "SnapKV x Uniform x MeanRest"
    assert resolve("value_aware", 0.5).needs.queries == 32


@torch.no_grad()
@pytest.mark.parametrize("policy", ["value_aware", "snapkv+mean_rest", "h2o+mean_rest"])
def test_a_full_budget_gives_the_plain_models_tokens(policy):
    model = tiny()
    cache, mask = cached(model, policy, [60, 47], budget=1.0, decode="keep")
    ids = torch.cat([padded_batch([60, 47])[0], LATER[:2]], 1)
    whole = torch.cat([mask, torch.ones_like(LATER[:2])], 1)
    got, wanted = decoded(model, cache, mask, LATER[:2]), plain_logits(model, ids, whole)[:, 60:]
    assert torch.equal(got.argmax(-1), wanted.argmax(-1))
    assert_close(got, wanted, torch.ones_like(LATER[:2]))


class Coded(MaskedMemory):
    """Answers attention densely: queries behind the prompt see its old tokens as they come out of the code."""

    def __init__(self, code, prompt, old):
        self.code, self.prompt, self.old = code, prompt, old

    def attend(self, call, q, k, v, mask, scaling):
        n = k.shape[2]
        live = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
        parts = []
        for queries, rewritten in ((slice(0, self.prompt), False), (slice(self.prompt, n), True)):
            keys, values = k.clone(), v.clone()
            for t in (keys, values) if rewritten else ():
                t[:, :, : self.old] = self.code.decode(self.code.encode(t[:, :, : self.old]), t.dtype)
            memory = MaskedMemory(live[:, :, queries])
            parts.append(memory.attend(call, q[:, :, queries], keys, values, mask, scaling))
        return torch.cat(parts, 2)


@torch.no_grad()
def test_a_width_alone_is_the_dense_form_over_what_its_code_gives_back(registered):
    model = tiny()
    cache, mask = cached(model, "int8", [60], budget=None)
    got = decoded(model, cache, mask, LATER[:1])
    ids = torch.cat([padded_batch([60])[0], LATER[:1]], 1)
    for w in wrappers(model):

        def forward(hidden_states, w=w, **kwargs):
            call = AttentionCall(hidden_states, w.layer_idx, memory=Coded(registered["int8"], 60, 60 - 32))
            return type(w.module).forward(w.module, hidden_states, gatekv=call, **kwargs)

        w.module.forward = forward
    assert_close(got, base_model(model)(ids, use_cache=False).logits[:, 60:], torch.ones_like(LATER[:1]))
    wholly = gatekv.KVCache(tiny(), Policy(gatekv.policies.Full(), width=registered["int8"].Int8(window=60)))
    recurrent_logits(wholly.model, *padded_batch([60]), wholly, [])
    exact = decoded(wholly.model, wholly, mask, LATER[:1])
    plain = plain_logits(wholly.model, ids, torch.ones_like(ids))[:, 60:]
    assert_close(exact, plain, torch.ones_like(LATER[:1]))
    assert 0 < (got - plain).abs().max() / plain.abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_width_of_the_page_moves_no_number_by_more_than_half_a_step(registered, dtype):
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0] = 0
    for part in (x, x[:0], x[:1, :1]):
        back = registered["int8"].decode(registered["int8"].encode(part), dtype)
        step = part.abs().amax(-1, keepdim=True).double() / 127
        rounding = part.abs().double() * torch.finfo(dtype).eps * 2
        assert back.dtype == dtype and ((back.double() - part.double()).abs() <= step / 2 + rounding).all()


@torch.no_grad()
def test_the_scorer_is_its_formula_and_padding_changes_no_score():
    torch.manual_seed(0)
    keys, values, queries = torch.randn(2, 2, 40, 4), torch.randn(2, 2, 40, 4), torch.randn(2, 4, 40, 4)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[0, :11] = False
    scorer = resolve("value_aware", 0.5).scorer
    got = scorer.score(View(keys, values, queries, valid, 0.5, 0, lambda: keys[..., 0]))
    solo = View(keys[:1, :, 11:], values[:1, :, 11:], queries[:1, :, 11:], valid[:1, 11:], 0.5, 0, lambda: keys[..., 0])
    torch.testing.assert_close(got[:1, :, 11:], scorer.score(solo))
    paid = torch.zeros(40)
    for head in (2, 3):
        for i in range(8, 40):
            logits = queries[1, head, i] @ keys[1, 1, : i + 1].T * 0.5
            paid[: i + 1] += logits.softmax(-1) / 2
    torch.testing.assert_close(got[1, 1], paid * values[1, 1].abs().sum(-1))


@torch.no_grad()
def test_a_query_sees_the_evicted_as_their_mean():
    model = tiny()
    ids, mask = padded_batch([60])
    undecided = gatekv.KVCache.undecided(model)
    recurrent_logits(model, ids, mask, undecided, [])
    cache = undecided.decide("keydiff+mean_rest", 0.5)
    for layer, whole in zip(cache.evicting(), undecided.evicting()):
        k, v, gone = whole.window.keys, whole.window.values, ~layer.stage.held(layer)
        q = torch.randn(1, 6, 2, 8, dtype=torch.float64)
        [(out, lse)] = layer.store.remainder.answers(q, 0.3)
        for head in range(6):
            lost = gone[0, head // 2]
            mean, value = k[0, head // 2][lost].mean(0), v[0, head // 2][lost].mean(0)
            torch.testing.assert_close(lse[0, head], q[0, head] @ mean * 0.3 + lost.sum().log())
            torch.testing.assert_close(out[0, head], value.expand(2, -1))


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_is_its_rows_alone(policy):
    model, lengths = tiny(), [70, 58, 64]
    cache, mask = cached(model, policy, lengths)
    got = decoded(model, cache, mask, LATER)
    ids, _ = padded_batch(lengths)
    for row, length in enumerate(lengths):
        alone = gatekv.KVCache(model, policy, 0.6, decode="keep" if "int8+mean" in policy else None)
        own, ones = ids[row : row + 1, -length:], torch.ones(1, length, dtype=torch.long)
        recurrent_logits(model, own, ones, alone, [])
        assert_close(decoded(model, alone, ones, LATER[row : row + 1])[0], got[row], torch.ones_like(LATER[row]))


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
def test_copies_reordered_rows_and_files_go_on_alike(policy, tmp_path):
    model = tiny()
    cache, mask = cached(model, policy, [70, 58, 64])
    cache.save(tmp_path / "own.safetensors")
    twin, loaded = cache.snapshot(), gatekv.KVCache.load(tmp_path / "own.safetensors", model)
    order = torch.tensor([2, 0, 0])
    swapped = cache.snapshot()
    swapped.reorder_cache(order)
    assert loaded.config.policy == cache.config.policy
    assert loaded.memory()["bytes"] == pytest.approx(cache.memory()["bytes"], rel=0.005)  # but for what is derived
    wanted = decoded(model, cache, mask, LATER)
    torch.testing.assert_close(decoded(model, twin, mask, LATER), wanted, rtol=0, atol=0)
    torch.testing.assert_close(decoded(model, loaded, mask, LATER), wanted)
    torch.testing.assert_close(decoded(model, swapped, mask[order], LATER[order]), wanted[order])


@torch.no_grad()
@pytest.mark.parametrize("policy", ["gate+global+int8", "gate+uniform+mean_rest", "gate_alone+ada+int8"])
def test_a_gate_decides_beside_them(policy):
    model, options = gated(window=4, sinks=2), {"decode": "keep"} if "rest" in policy else {}
    cache, mask = cached(model, policy, [58, 70], 0.5, **options)
    alone = gatekv.KVCache(model, policy, 0.5, **options)
    ids, _ = padded_batch([58, 70])
    recurrent_logits(model, ids[1:], mask[1:], alone, [])
    for layer in cache.evicting():
        rest = layer.store.remainder if "rest" in policy else layer.store.narrow
        assert rest.count.all() if "rest" in policy else len(rest)
    wanted = decoded(model, alone, mask[1:], LATER[:1])
    assert_close(decoded(model, cache, mask, LATER[[0, 0]])[1:], wanted, torch.ones_like(LATER[:1]))


@torch.no_grad()
@pytest.mark.parametrize("policy", ALONE)
def test_a_prompt_in_pieces_is_a_prompt_and_turns_hold_their_budgets(policy):
    model = tiny()
    ids, mask = padded_batch([160])
    whole, _ = cached(model, policy, [160])
    pieces = gatekv.KVCache(model, policy, 0.6, prompt_tokens=160)
    recurrent_logits(model, ids, mask, pieces, [30, 32])
    torch.testing.assert_close(decoded(model, pieces, mask, LATER[:1]), decoded(model, whole, mask, LATER[:1]))
    turns = gatekv.KVCache(model, policy, 0.6, turns=True)
    for turn in (1, 2):
        model(ids[:, (turn - 1) * 80 : turn * 80], past_key_values=turns)
        if turn == 2:
            turns.compress()
        assert {int(flags.sum()) for layer in turns.flags() for flags in layer[0]} == {turn * 48}
        for layer in turns.evicting():
            if "int8" in policy:
                assert len(layer.store.narrow) == 3 * (turn * 48 - 32)
            if "rest" in policy:
                assert layer.store.remainder.count.unique().tolist() == [turn * 32]
    assert torch.isfinite(decoded(model, turns, mask, LATER[:1])).all()


def test_a_file_whose_policy_is_not_registered_says_what_is_missing(tmp_path, own_names):
    model = tiny()
    cache, _ = cached(model, "value_aware+int8", [60])
    cache.save(tmp_path / "own.safetensors")
    for kind, name, field in ((Width, "int8", "width"), (Scorer, "value_aware", "scorer")):
        del KINDS[kind][name]
        with pytest.raises(ValueError, match=f"the {field} '{name}' of a saved policy is not known here: import the"):
            gatekv.KVCache.load(tmp_path / "own.safetensors", model)

    @dataclasses.dataclass
    class Other(Scorer):
        def score(self, view):
            return view.keys[..., 0]

    register_policy("value_aware", Other)
    with pytest.raises(ValueError, match="'value_aware' of a saved policy had other fields than Other has"):
        gatekv.KVCache.load(tmp_path / "own.safetensors", model)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["value_aware", "int8", "snapkv+int8", "snapkv+mean_rest", "h2o+mean_rest"])
@pytest.mark.parametrize("length,new,batch", [(150, 0, 1), (301, 37, 2)])
def test_memory_counts_real_bytes_and_they_are_foretold(policy, length, new, batch):
    model = tiny(dtype=torch.float32, head_dim=32, num_hidden_layers=3)
    budget = None if policy == "int8" else 0.4
    said = forecast(gatekv.KVCache(model, policy, budget), length, new, batch)
    cache, ids = gatekv.KVCache(model, policy, budget), torch.randint(1, VOCAB, (batch, length + new))
    model(ids[:, :length], past_key_values=cache)
    prompt = cache.memory()["bytes"]
    for i in range(length, length + new):
        model(ids[:, i : i + 1], past_key_values=cache)
    end = cache.memory()["bytes"]
    assert end == sum(distinct_bytes(layer.tensors()) for layer in cache.evicting())
    assert said.bytes == pytest.approx(prompt, rel=0.015) and said.bytes_end == pytest.approx(end, rel=0.015)
    if policy == "int8":
        assert prompt < 0.5 * said.full_bytes


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_decides_from_a_prompt_that_was_read_for_many(policy):
    model = tiny()
    ids, mask = padded_batch([70, 58, 64])
    undecided = gatekv.KVCache.undecided(model)
    recurrent_logits(model, ids, mask, undecided, [])
    options = {"decode": "keep"} if "int8+mean" in policy else {}
    cache, _ = cached(model, policy, [70, 58, 64])
    shared = undecided.decide(policy, 0.6, **options)
    torch.testing.assert_close(decoded(model, shared, mask, LATER), decoded(model, cache, mask, LATER))


@torch.no_grad()
@pytest.mark.parametrize("policy,budget", [("value_aware", 0.25), ("int8", 0.6), ("snapkv+int8", 0.25),
                                           ("value_aware+mean_rest", 0.25)])  # fmt: skip
def test_the_frontier_lands_on_the_asked_bytes(policy, budget):
    model = tiny(dtype=torch.bfloat16, head_dim=64, hidden_size=384)
    ids = torch.randint(1, 90, (640,), generator=torch.Generator().manual_seed(0)).tolist()
    item = Item(ids[:620], [(ids[620:625], ids[625:628])], log_loss)
    _, row = frontier.run_item(model, item, [frontier.FULL, (policy, budget)], decode="keep")
    assert row["refused"] is None and row["ratio"] == pytest.approx(budget, abs=0.03 if policy != "int8" else 0.1)


@torch.no_grad()
def test_bytes_that_a_width_cannot_meet_are_refused():
    model = tiny(dtype=torch.bfloat16, head_dim=64, hidden_size=384)
    ids = torch.randint(1, 90, (640,)).tolist()
    item = Item(ids[:620], [(ids[620:625], ids[625:628])])
    cells = [frontier.FULL, ("int8", 0.3), ("snapkv+int8", 0.02)]
    _, alone, both = frontier.run_item(model, item, cells)
    assert "unreachable: all tokens cost more" in alone["refused"]
    assert "unreachable: 32 of 620 tokens keep their full width" in both["refused"]


# -- register_policy


@dataclasses.dataclass
class Half(budgets.Uniform):
    """A rule that keeps half of what it may."""

    def keep(self, scores, protected, valid, counts):
        return super().keep(scores, protected, valid, (counts // 2).clamp_min(protected.sum(-1).amax().item()))


@dataclasses.dataclass
class Rising(Layers):
    """Later layers get more."""


@pytest.mark.parametrize("kind,name", [(Half, "half"), (Rising, "rising")])
def test_rules_and_layers_have_names_too(own_names, kind, name):
    register_policy(name, kind)
    register_policy(name, kind)  # the same again is no mistake: modules are imported twice
    found = resolve(f"snapkv+{name}", 0.5)
    assert kind in (type(found.rule), type(found.layers))


@torch.no_grad()
def test_a_rule_of_ones_own_decides(own_names):
    register_policy("half", Half)
    cache, _ = cached(tiny(), "keydiff+half", [80], 0.5)
    assert {int(flags.sum()) for layer in cache.flags() for flags in layer[0]} == {20}


@dataclasses.dataclass
class NoDefault(Scorer):
    """A scorer that a name alone does not make."""

    share: float

    def score(self, view):
        return view.keys[..., 0]


class Abstract(Scorer):
    """A scorer without a score."""


@pytest.mark.parametrize("name,kind,match", [
    ("snapkv", NoDefault, "'snapkv' is taken"), ("think", NoDefault, "'think' is taken"),
    ("value-aware", NoDefault, "made of letters, digits and underscores"), ("", NoDefault, "made of letters"),
    ("a+b", NoDefault, "made of letters"), (3, NoDefault, "made of letters"),
    ("mine", nn.Linear, "derived from one of Scorer, Rule, Layers, Width, RemainderPolicy"),
    ("mine", 3, "derived from one of Scorer"), ("mine", NoDefault, "NoDefault cannot be made .* give every field"),
    ("mine", Abstract, "Abstract cannot be made"),
])  # fmt: skip
def test_what_cannot_be_registered_says_why(own_names, name, kind, match):
    with pytest.raises(ValueError, match=match):
        register_policy(name, kind)
    assert "mine" not in {n for table in KINDS.values() for n in table}


def test_parts_that_say_nothing_are_asked_in_vain():
    for ask in (lambda: Width().segment(None), lambda: Width().share(8, 2), RemainderPolicy().segment):
        with pytest.raises(NotImplementedError):
            ask()


# -- in evaluation


class LearnedNorm(gatekv.policies.gate.GateAlone):
    """A gate's policy whose name does not say so."""


@dataclasses.dataclass
class OddKinds(gatekv.policies.KeyDiff):
    """Keeps tokens of odd kinds."""

    kinds = True

    def score(self, view):
        assert view.kinds is not None
        return (view.kinds[:, None] % 2 + 0.0).expand(view.keys.shape[:3])


def test_what_a_policy_is_is_asked_of_the_policy_and_told_by_its_records(own_names, monkeypatch):
    register_policy("my_norm", LearnedNorm)
    register_policy("gateless", gatekv.policies.KeyDiff)
    register_policy("untrained_look", gatekv.policies.KeyDiff)
    register_policy("odd", OddKinds)
    build = lambda *_: Item(list(range(1, 61)), [([61, 62, 63], [64, 65])], log_loss)  # noqa: E731
    monkeypatch.setattr(frontier, "token_kinds", lambda tokenizer: torch.arange(97))
    records = Records(None, {})
    names = ["my_norm+global", "untrained_alone+global", "gateless", "untrained_look", "odd", "value_aware+mean_rest"]
    model = gated(dtype=torch.float32, window=4, sinks=2)
    frontier.evaluate(model, None, [""], names, [0.8], "ppl", "agnostic", 2, 0, records, progress=False, build=build)
    found = {line["policy"]: line for line in records.lines}
    assert not any(line["refused"] for line in records.lines) and set(found) == {"full", *names}
    assert {p: line["gate"] for p, line in found.items() if line["gate"]} == {
        "my_norm+global": "trained", "untrained_alone+global": "untrained"
    }  # fmt: skip
    assert not any(line["maps"] for line in records.lines) and records.lines[0]["policy"] == "full"
    for kind in KINDS.values():
        for name in ("my_norm", "gateless", "untrained_look", "odd", "value_aware", "mean_rest"):
            kind.pop(name, None)  # who reads the records knows none of these
    (pair,) = results.comparisons(records.lines)
    assert pair["learned"] == "my_norm+global" and pair["training_free"] not in ("my_norm+global", "full")
    rows = {row["policy"]: row for row in results.rows(records.lines)}
    assert learned(rows["my_norm+global"]) and not learned(rows["gateless"]) and not learned(rows["untrained_look"])


def test_records_that_do_not_say_whose_gate_judged_are_read_by_their_policies_names():
    gates = {"gate+global": "trained", "gate_alone": "trained", "untrained_alone+ada": "untrained", "snapkv": None,
             "some_later_policy": None}  # fmt: skip
    assert {name: gate_of({"policy": name}) for name in gates} == gates
    assert learned({"policy": "snapkv+less"}) and learned({"policy": "gate"}) and not learned({"policy": "h2o+qaq"})


def test_evaluate_scores_what_a_plugin_registers(tmp_path, monkeypatch):
    from gatekv.hardware import choose
    from gatekv.options import load
    from gatekv.recipes import evaluate

    words = ["--plugins", ",".join(map(str, EXAMPLES)), "--policies", "value_aware+int8,snapkv", "--budgets", ".5"]
    assert evaluate.check(load(words, evaluate.EvaluateOptions))[0] == ["value_aware+int8", "snapkv"]
    with pytest.raises(ValueError, match="--plugins .*nowhere.py is no file"):
        evaluate.main(["--plugins", "nowhere.py"])
    model = tiny(dtype=torch.float32)
    monkeypatch.setattr(evaluate, "load_adapted", lambda *_: (model, None, choose("cpu", "float32"), "tiny"))
    build = lambda *_: Item(list(range(1, 81)), [([81, 82, 83], [84, 85])], log_loss)  # noqa: E731
    monkeypatch.setitem(frontier.TASKS, "ppl", build)
    found = evaluate.main([*words, "--tasks", "ppl", "--n_ppl", "2", "--out", str(tmp_path)])
    rows = {row["policy"]: row for row in found["rows"]}
    assert rows["value_aware+int8"]["score"] is not None and rows["value_aware+int8"]["gate"] is None
    assert f"--plugins {words[1]}" in found["run"]["command"]


def test_generate_asks_the_policy_whether_it_needs_a_budget(own_names):
    from gatekv.recipes.generate import budget_of

    register_policy("my_norm", LearnedNorm)
    found = {p: budget_of(p, "") for p in ("full", "gate", "my_norm", "my_norm+ada", "value_aware", "fastgen", None)}
    assert found == {"full": None, "gate": None, "my_norm": None, "my_norm+ada": 0.25, "value_aware": 0.25,
                     "fastgen": 0.25, None: 0.25}  # fmt: skip
    assert budget_of("gate", "512") == 512


def test_maps_are_trained_for_policies_by_what_they_are(own_names):
    register_policy("my_norm", LearnedNorm)
    with pytest.raises(ValueError, match="'my_norm\\+ada' needs a gate"):
        LessConfig(policy="my_norm+ada")
    assert LessConfig(policy="value_aware").policy == "value_aware"
