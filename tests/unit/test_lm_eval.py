"""lm-evaluation-harness: its own numbers with the whole cache, the bytes really held with less, refusals of the rest."""

import json
import random

import pytest
import torch
from conftest import gated, tiny
from lm_eval import evaluator, simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import handle_non_serializable
from lm_eval_tasks import write_tasks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import gatekv
from gatekv.integrations.lm_eval import GateKVLM
from gatekv.policies.budgets import BudgetError

rng = random.Random(0)
TEXTS = ["".join(rng.choice("abcdefghij.") for _ in range(n)) for n in (90, 121, 133, 90, 104, 128)]
CHOICES = ["yes", "no", "who knows it"]
DOCUMENTS = [{"context": t, "choices": CHOICES, "answer": i % 3, "continuation": t[5:9]} for i, t in enumerate(TEXTS)]
SPEC = dict(window=8, sinks=2)


@pytest.fixture(autouse=True)
def no_survey_of_the_machine(monkeypatch):
    """The harness starts a dozen processes to describe it in the results."""
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def letters():
    """A tokenizer whose tokens are characters; "~" ends a text."""
    core = Tokenizer(models.WordLevel({chr(i): i - 32 for i in range(32, 127)}, unk_token="?"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="~", pad_token="|")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"), DOCUMENTS)


def plain(family="llama"):
    model = tiny(family, torch.float32)
    model.generation_config.eos_token_id = 94  # else rows of a batch go on behind their end until all have one
    return model


def model_of(family="llama"):
    return gated(family, torch.float32, model=plain(family), **SPEC)


def evaluated(lm, tasks, names=("choose", "predict", "write")):
    return simple_evaluate(lm, tasks=list(names), task_manager=tasks, bootstrap_iters=0, log_samples=True)


def ask(lm, pairs):
    """Answers to (context, continuation) strings."""
    return lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], True)


def ids_of(tokenizer, text):
    return torch.tensor([tokenizer.encode(text)])


@torch.no_grad()
def by_hand(model, tokenizer, context, continuation, policy, budget):
    """(log-likelihood, bytes after the prompt) of one request, by the public cache alone."""
    cache = gatekv.KVCache(model, policy, budget)
    ids = ids_of(tokenizer, context + continuation)
    n = len(context) - 1
    model(ids[:, :n], past_key_values=cache)
    held = cache.memory()
    log_p = model(ids[:, n:-1], past_key_values=cache).logits.log_softmax(-1)
    return float(log_p.gather(-1, ids[:, n + 1 :, None]).sum()), held


@pytest.mark.covering(1)  # batches do not know the family
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_whole_cache_gives_the_harness_own_numbers_to_the_last_digit(family, batch_size, letters, tasks):
    names = ["choose", "predict", "write", "roll"]
    theirs = evaluated(HFLM(plain(family), tokenizer=letters, batch_size=batch_size), tasks, names)
    for options in (dict(policy="full"), dict(policy="gate+global", budget=1.0)):
        model = plain(family) if options["policy"] == "full" else model_of(family)
        ours = evaluated(GateKVLM(model, tokenizer=letters, batch_size=batch_size, **options), tasks, names)
        assert ours["results"] == theirs["results"]
        for name in names:
            for a, b in zip(ours["samples"][name], theirs["samples"][name]):
                assert a["resps"] == b["resps"], "every likelihood and every text, bit for bit"
        assert 1 <= ours["config"]["kv_ratio"] < 1.2 and ours["config"]["kv_prompts_whole"] == 0


@pytest.mark.parametrize("policy,budget", [("gate+global", 0.3), ("snapkv+ada", 0.5), ("h2o", 0.3), ("gate", None)])
def test_answers_and_bytes_are_those_of_the_cache_by_hand(policy, budget, letters):
    model = model_of()
    lm = GateKVLM(model, tokenizer=letters, policy=policy, budget=budget)
    pairs = [(d["context"], " " + choice) for d in DOCUMENTS for choice in CHOICES]
    wanted = [by_hand(model, letters, *pair, policy, budget) for pair in pairs]
    for (found, _), (likelihood, _) in zip(ask(lm, pairs), wanted):
        assert found == pytest.approx(likelihood, rel=1e-4)
    said, contexts = lm.get_model_info(), [held for _, held in wanted[:: len(CHOICES)]]
    assert said["kv_prompts"] == len(DOCUMENTS), "choices share one prefill"
    assert said["kv_bytes_held"] == pytest.approx(sum(m["bytes"] for m in contexts), rel=0.01)
    assert said["kv_bytes_full"] == sum(m["full_bytes"] for m in contexts)
    assert said["kv_ratio"] < 0.9 and said["kv_by_request"]["loglikelihood"]["kv_ratio"] == said["kv_ratio"]
    full = ask(GateKVLM(plain(), tokenizer=letters, policy="full"), pairs)
    assert all(abs(a - b) > 1e-3 for (a, _), (b, _) in zip(ask(lm, pairs), full)), "what is gone is missed"


@pytest.mark.parametrize("policy,budget", [("gate+global", 0.3), ("snapkv", 0.5), ("tova", 0.3), ("gate", None)])
def test_batches_of_unequal_contexts_change_nothing(policy, budget, letters, tasks):
    one, four = (
        evaluated(GateKVLM(model_of(), tokenizer=letters, policy=policy, budget=budget, batch_size=n), tasks)
        for n in (1, 4)
    )
    for name in ("choose", "predict"):
        for a, b in zip(one["samples"][name], four["samples"][name]):
            for (x, greedy), (y, too) in zip(a["filtered_resps"], b["filtered_resps"]):
                assert x == pytest.approx(y, rel=1e-4) and greedy == too
    assert [s["resps"] for s in one["samples"]["write"]] == [s["resps"] for s in four["samples"]["write"]]
    assert one["config"]["kv_bytes_full"] == four["config"]["kv_bytes_full"]
    assert one["config"]["kv_bytes_held"] == pytest.approx(four["config"]["kv_bytes_held"], rel=0.05)


@pytest.mark.parametrize("policy,budget", [("gate+global", 0.3), ("h2o", 0.3), ("gate", None)])
def test_generation_starts_from_the_compressed_prompt(policy, budget, letters, tasks):
    model, full, held = model_of(), 0, 0
    found = evaluated(GateKVLM(model, tokenizer=letters, policy=policy, budget=budget), tasks, ["write"])
    for sample in found["samples"]["write"]:
        cache, ids = gatekv.KVCache(model, policy, budget), ids_of(letters, sample["doc"]["context"])
        with torch.no_grad():
            model(ids[:, :-1], past_key_values=cache)
        held, full = held + cache.memory()["bytes"], full + cache.memory()["full_bytes"]
        out = model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
        text = letters.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split("~")[0]
        assert sample["resps"] == [[text]]
    assert (
        found["config"]["kv_bytes_held"] == pytest.approx(held, rel=0.01) and found["config"]["kv_bytes_full"] == full
    )
    assert found["config"]["kv_ratio_end"] > 0


def test_a_threshold_evicts_inside_a_text_that_is_scored_from_its_first_token(letters, tasks):
    model = model_of()
    found = evaluated(GateKVLM(model, tokenizer=letters, policy="gate", batch_size=2), tasks, ["roll"])
    for sample in found["samples"]["roll"]:
        ids = ids_of(letters, "~" + sample["doc"]["context"])
        with torch.no_grad(), gatekv.parallel(model):
            log_p = model(ids[:, :-1], use_cache=False).logits.log_softmax(-1)
        wanted = float(log_p.gather(-1, ids[:, 1:, None]).sum())
        assert sample["resps"][0][0] == pytest.approx(wanted, rel=1e-4), "the form that is trained"
    assert found["config"]["kv_by_request"]["loglikelihood_rolling"]["kv_ratio"] < 0.9


def test_rolling_is_refused_where_there_is_no_prompt_to_compress(letters, tasks):
    for policy in ("gate+global", "snapkv", "h2o"):
        with pytest.raises(ValueError, match="scores a text from its first token on"):
            evaluated(GateKVLM(model_of(), tokenizer=letters, policy=policy, budget=0.3), tasks, ["roll"])


def test_a_gate_that_reads_the_whole_prompt_never_reads_what_is_scored(letters, tasks):
    model = gated(dtype=torch.float32, model=plain(), gate="attention", context="prompt", **SPEC)
    lm = GateKVLM(model, tokenizer=letters, policy="gate")
    with pytest.raises(ValueError, match="use a causal gate's threshold"):
        evaluated(lm, tasks, ["roll"])
    with pytest.raises(BudgetError, match="one token of context"):
        ask(lm, [("", "abc")])
    (found, _), (likelihood, _) = (
        ask(lm, [(TEXTS[0], " no")])[0],
        by_hand(model, letters, TEXTS[0], " no", "gate", None),
    )
    assert found == pytest.approx(likelihood, rel=1e-4)


def test_prompts_too_short_for_the_budget_are_refused_or_held_whole_and_counted(letters):
    pairs = [("abcd", " yes"), ("", "abc"), (TEXTS[0], " no"), (TEXTS[1], " no")]
    for pair in pairs[:2]:
        lm = GateKVLM(model_of(), tokenizer=letters, policy="gate+global", budget=0.3)
        with pytest.raises(BudgetError, match="short='whole'"):
            ask(lm, [pair])
    lm = GateKVLM(model_of(), tokenizer=letters, policy="gate+global", budget=0.3, short="whole", batch_size=3)
    found = ask(lm, pairs)
    full = ask(GateKVLM(plain(), tokenizer=letters, policy="full"), pairs)
    for same, (a, _), (b, _) in zip([True, True, False, False], found, full):
        assert (a == pytest.approx(b, rel=1e-5)) == same
    assert lm.get_model_info()["kv_prompts_whole"] == 2 and lm.get_model_info()["kv_prompts"] == 4


def test_generation_from_prompts_too_short_for_the_budget(letters):
    requests = [("abcd", {"until": ["~"], "max_gen_toks": 5}), (TEXTS[0], {"until": ["~"], "max_gen_toks": 5})]
    requests = [Instance("generate_until", {}, r, i) for i, r in enumerate(requests)]
    options = dict(tokenizer=letters, policy="gate+global", budget=0.3)
    with pytest.raises(BudgetError, match="short='whole'"):
        GateKVLM(model_of(), **options).generate_until(requests, True)
    lm = GateKVLM(model_of(), **options, short="whole", batch_size=2)
    short, long = lm.generate_until(requests, True)
    assert short == HFLM(plain(), tokenizer=letters).generate_until(requests[:1], True)[0]
    assert long == GateKVLM(model_of(), **options).generate_until(requests[1:], True)[0]
    assert lm.get_model_info()["kv_prompts_whole"] == 1


def test_the_beginning_that_does_not_fit_is_cut_off_as_the_harness_does(letters):
    pairs = [(TEXTS[2], " yes")]
    cut = [(TEXTS[2][-(61 - 4) :], " yes")]
    options = dict(tokenizer=letters, policy="gate+global", budget=0.5)
    assert ask(GateKVLM(model_of(), **options, max_length=60), pairs) == ask(GateKVLM(model_of(), **options), cut)
    with pytest.raises(ValueError, match="of 2 at most"):
        ask(GateKVLM(model_of(), **options, max_length=2), pairs)


@pytest.mark.parametrize("options,match", [
    (dict(peft="adapter"), "adapter=…"), (dict(parallelize=True), "one device"), (dict(tp_plan="auto"), "KV heads"),
    (dict(mixed_precision_dtype="bfloat16"), "dtype=…"), (dict(batch_size="auto"), "give a number"),
    (dict(batch_size=0), "give a number"), (dict(short="maybe"), "unknown short"), (dict(policy="gat"), "Did you mean"),
    (dict(policy="snapkv"), "needs budget"), (dict(policy="snapkv", budget=2.5), "above 0 and at most 1"),
    (dict(policy="gate"), "needs an adapter"), (dict(policy="snapkv+less", budget=0.5), "low-rank maps"),
])  # fmt: skip
def test_what_cannot_be_done_honestly_is_refused_before_anything_runs(options, match, letters):
    with pytest.raises(ValueError, match=match):
        GateKVLM(plain(), tokenizer=letters, **options)


def test_more_refusals(letters, tasks, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="give one"):
        GateKVLM()
    lm = GateKVLM(model_of(), tokenizer=letters, policy="gate+global", budget=0.3)
    with pytest.raises(ValueError, match="use_cache"):
        simple_evaluate(lm, tasks=["choose"], task_manager=tasks, use_cache=str(tmp_path / "answers"))
    with pytest.raises(ValueError, match="num_beams=1"):
        simple_evaluate(lm, tasks=["write"], task_manager=tasks, gen_kwargs="num_beams=2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        GateKVLM(model_of(), tokenizer=letters, policy="full")


def test_the_harness_makes_the_model_from_its_name_and_arguments(letters, tasks, tmp_path):
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    tiny(dtype=torch.float32).save_pretrained(base)
    letters.save_pretrained(base)
    model = gated(model=AutoModelForCausalLM.from_pretrained(base), dtype=torch.float32, **SPEC)
    model.save_pretrained(adapter)
    arguments = f"adapter={adapter},policy=gate+global,budget=.3,dtype=float32"
    found = simple_evaluate("gatekv", arguments, ["choose"], task_manager=tasks, bootstrap_iters=0)
    config = json.loads(json.dumps(found["config"], default=handle_non_serializable))
    assert config["kv_policy"] == "Gate x Global" and config["kv_budget"] == 0.3 and 0.3 <= config["kv_ratio"] < 0.5
    mine = GateKVLM(model, tokenizer=letters, policy="gate+global", budget=0.3)
    assert evaluated(mine, tasks, ["choose"])["config"]["kv_bytes_held"] == config["kv_bytes_held"]
