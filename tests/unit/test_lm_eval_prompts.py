"""lm-evaluation-harness against our LongBench and RULER, on five committed rows of each: prompts, answers, scores.

Where the two agree and where they do not is what decides whether our copies of these benchmarks are needed.
"""

import importlib
import importlib.util
import json
import sys
import types
from difflib import SequenceMatcher
from pathlib import Path

import pytest
import torch
import yaml
from conftest import gated, tiny
from lm_eval import evaluator, simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gatekv.evaluation import frontier
from gatekv.evaluation.tasks import longbench, ruler_sets, text_metrics
from gatekv.integrations.lm_eval import GateKVLM
from gatekv.integrations.lm_eval_prompts import LONGBENCH_PATTERNS, Framed, PromptFormat

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
HARNESS = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
TEMPLATE = "{% for m in messages %}<{{m['role']}}>{{m['content']}}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
ROOM = 1150  # tokens of the model: some prompts are longer


@pytest.fixture(autouse=True)
def no_survey_of_the_machine(monkeypatch):
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)


@pytest.fixture
def harness_metrics(monkeypatch):
    """The harness' LongBench metrics; fuzzywuzzy, which they import and code alone needs, is this where it is not."""
    if importlib.util.find_spec("fuzzywuzzy") is None:
        ratio = lambda a, b: round(100 * SequenceMatcher(None, a, b).ratio())  # noqa: E731
        monkeypatch.setitem(sys.modules, "fuzzywuzzy", types.SimpleNamespace(fuzz=types.SimpleNamespace(ratio=ratio)))
    return importlib.import_module("lm_eval.tasks.longbench.metrics")


@pytest.fixture(scope="module")
def letters():
    """Characters as tokens, line ends among them; "~" ends a text."""
    core = Tokenizer(models.WordLevel({chr(i): i - 32 for i in range(32, 127)} | {"\n": 95}, unk_token="?"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="~", pad_token="|", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def model():
    base = tiny(dtype=torch.float32, max_position_embeddings=2048)
    base.generation_config.eos_token_id = 94
    return gated(dtype=torch.float32, model=base, window=8, sinks=2)


def rows_of(name):
    return [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text().splitlines()]


def ours(model, letters, make, mode, policy, budget):
    """Per row of a set: (text of the answer, score) under a policy, as `recipes/evaluate.py` has them."""
    found = []
    for index in range(5):
        item, said = make(letters, [], mode, index, 0), []
        score = item.score
        item.score = lambda ids, said=said, score=score: said.append(ids) or score(ids)
        item.tokens = min(item.tokens, 12)
        cells = [frontier.FULL] + [(policy, budget)] * (policy != "full")
        scores = frontier.run_item(model, item, cells, decode="keep")[-1]["scores"]
        found.append((letters.decode(said[-1], skip_special_tokens=True), scores[0]))
    return found


def theirs(model, letters, folder, task, rows, config, chat, **options):
    """The harness' samples of a task over rows, by document."""
    data = folder / f"{task}.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    source = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    config = {"task": task, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": source, **config}
    (folder / f"{task}.yaml").write_text(json.dumps(config))
    lm = GateKVLM(model, tokenizer=letters, decode="keep", no_chat="longbench", **{"max_length": ROOM} | options)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=True,
                            apply_chat_template=chat, gen_kwargs="max_gen_toks=12")  # fmt: skip
    return found["samples"][task], found


@pytest.mark.covering(1)  # every policy and either mode
@pytest.mark.parametrize("mode,compress", [("agnostic", "before_question"), ("aware", "prompt")])
@pytest.mark.parametrize("policy,budget,batch", [("full", None, 1), ("snapkv", 0.3, 1), ("gate+global", 0.4, 3)])
def test_longbench_gives_our_answers_and_scores_where_the_harness_has_its_prompt(
    mode, compress, policy, budget, batch, model, letters, tmp_path, harness_metrics
):
    rows = rows_of("longbench/qasper")
    make = lambda *a: longbench.longbench(*a, task="longbench_qasper", examples=rows, room=ROOM - 12 + 128)  # noqa: E731
    for row, (said, _) in zip(
        sorted_like_ours(rows, "longbench_qasper"), ours(model, letters, make, mode, "full", 1.0)
    ):
        row["answers"] = [row["answers"][0], said]  # so that scores tell something of a random model
    wanted = ours(model, letters, make, mode, policy, budget)
    config = {"include": str(HARNESS / "longbench" / "qasper.yaml")}
    given = [row | {"question": row["input"]} for row in rows]
    samples, results = theirs(model, letters, tmp_path, "longbench_qasper", given, config, True, policy=policy,
                              budget=budget, compress=compress, truncate="middle", batch_size=batch)  # fmt: skip
    found = {s["doc"]["input"]: (s["resps"][0][0], s["score"]) for s in samples}
    for row, (text, score) in zip(sorted_like_ours(rows, "longbench_qasper"), wanted):
        assert found[row["input"]][0] == text and found[row["input"]][1] == pytest.approx(score)
    mean = results["results"]["longbench_qasper"]["score,none"]
    assert mean == pytest.approx(sum(score for _, score in wanted) / 5) and (mean > 0.9) >= (policy == "full")
    assert results["config"]["kv_compress"] == compress and results["config"]["kv_truncate"] == "middle"


def sorted_like_ours(rows, task):
    return [longbench.picked(rows, task, index, 0) for index in range(5)]


def test_examples_go_without_the_template_in_the_harness_too_and_only_the_first_line_is_left(
    model, letters, tmp_path, harness_metrics
):
    rows = rows_of("longbench/trec")
    make = lambda *a: longbench.longbench(*a, task="longbench_trec", examples=rows, room=ROOM - 12 + 64)  # noqa: E731
    wanted = ours(model, letters, make, "agnostic", "snapkv", 0.5)
    config = {"include": str(HARNESS / "longbench" / "trec.yaml")}
    given = [row | {"question": row["input"]} for row in rows]
    samples, _ = theirs(model, letters, tmp_path, "longbench_trec", given, config, True, policy="snapkv", budget=0.5,
                        compress="before_question", truncate="middle")  # fmt: skip
    found = {s["doc"]["input"]: s["resps"][0][0] for s in samples}
    for row, (text, _) in zip(sorted_like_ours(rows, "longbench_trec"), wanted):
        assert found[row["input"]] == text.split("\n")[0]


@pytest.mark.parametrize("mode,compress", [("agnostic", "before_question"), ("aware", "prompt")])
def test_rows_of_ruler_give_our_answers_and_scores(mode, compress, model, letters, tmp_path):
    rows = rows_of("ruler/niah_multiquery")
    make = lambda *a: ruler_sets.ruler_set(*a, task="ruler_niah_multiquery", examples=rows, room=2048)  # noqa: E731
    bare = PreTrainedTokenizerFast(tokenizer_object=letters.backend_tokenizer, eos_token="~", pad_token="|")
    order = [longbench.picked(rows, "ruler_niah_multiquery", index, 0) for index in range(5)]
    for row, (said, _) in zip(order, ours(model, bare, make, mode, "full", 1.0)):
        row["answer"] = [said[:2], said[4:8], said[-3:], "8359703"]
    wanted = ours(model, bare, make, mode, "snapkv", 0.4)
    config = {"doc_to_text": "{{context}}{{question}}", "gen_prefix": "{{answer_prefix}}", "target_delimiter": ""}
    config |= {"doc_to_target": "{{outputs}}", "output_type": "generate_until", "test_split": "test"}
    config |= {"generation_kwargs": {"until": [], "do_sample": False}, "metric_list": [{"metric": "exact_match"}]}
    given = [row | {"outputs": row["answer"], "max_length": 4096} for row in rows]
    samples, _ = theirs(model, bare, tmp_path, "multiquery", given, config, False, policy="snapkv", budget=0.4,
                        compress=compress, max_length=2048)  # fmt: skip
    scored = importlib.import_module("lm_eval.tasks.ruler.common_utils").process_results
    found = {s["doc"]["question"]: s["resps"][0][0] for s in samples}
    for row, (text, score) in zip(order, wanted):
        assert found[row["question"]] == text
        assert scored({"max_length": 4096, "outputs": row["answer"]}, [text])["4096"] == pytest.approx(score)


def test_six_prompts_of_the_harness_are_not_longbench_s():
    """The reason why ours stay: when this fails because they agree, ours can go."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    other = {n: yaml.load((HARNESS / "longbench" / f"{n}.yaml").read_text(), Loader) for n in longbench.SETS}
    text = {
        n: o["doc_to_text"].replace("{{context}}", "{context}").replace("{{question}}", "{input}")
        for n, o in other.items()
    }
    different = [n for n, spec in longbench.SETS.items() if text[n] != spec["prompt"]]
    assert different == ["triviaqa", "samsum", "passage_count", "passage_retrieval_en", "lcc", "repobench-p"]
    assert [n for n, o in other.items() if o["generation_kwargs"]["until"]] == ["trec", "triviaqa", "samsum", "lsht"]


def test_scores_of_the_harness_that_are_not_the_benchmarks_own(harness_metrics):
    """The other reasons: an answer behind an empty line, code behind blanks, one of several right answers."""
    doc = {"answers": ["Place"], "all_classes": ["Place", "Animal"]}
    stopped = "\nPlace".split("\n")[0]  # until: ["\n"]
    assert harness_metrics.get_classification_with_score(doc, [stopped])["score"] == 0
    assert text_metrics.classification("\nPlace".lstrip("\n").split("\n")[0], "Place", doc["all_classes"]) == 1
    said = "  \nreturn x"
    assert harness_metrics.code_sim_score(said, "return x") == 1 and text_metrics.code_sim(said, "return x") < 0.5
    part = importlib.import_module("lm_eval.tasks.ruler.common_utils").string_match_part
    assert part(["red"], [["red", "blue"]]) == 0.5 and any(text_metrics.references_found("red", ["red", "blue"]))


def framed(*messages, after="<assistant>"):
    text = "".join(f"<{role}>{content}</>" for role, content in messages) + after
    return Framed(messages, text), text


def test_a_prompt_is_taken_apart(letters):
    asked, text = framed(("system", "Be brief."), ("user", "Long text. What?"))
    read = PromptFormat("before_question").prompt("task", {"context": "Long text."}, text, asked)
    context, question = (letters.decode(part) for part in read.ids(letters, 500))
    assert (context, question) == ("<system>Be brief.</><user>Long text.", " What?</><assistant>")
    context, question = (letters.decode(part) for part in read.ids(letters, 30))
    assert (context, question) == ("Long text."[-30 + len(question) :], " What?</><assistant>"), "the left end goes"
    last = PromptFormat(truncate="middle").prompt("task", {}, text, asked)
    context, question = (letters.decode(part) for part in last.ids(letters, len(text) - 6))
    assert context + question == text.replace("Long text. What?", "Long What?"), "the middle goes, the template stays"
    with pytest.raises(ValueError, match="the chat template leaves -"):
        last.ids(letters, 10)


def test_the_start_of_an_answer_stays_behind_the_template(letters):
    asked, text = framed(("user", "T. Q?"), ("assistant", "It is"), after="")
    read = PromptFormat("before_question", no_chat=("none_*",)).prompt("a", {"context": "T."}, text, asked)
    assert [letters.decode(part) for part in read.ids(letters, 99)] == ["<user>T.", " Q?</><assistant>It is</>"]
    read = PromptFormat("before_question", no_chat=("none_*",)).prompt("none_e", {"context": "T."}, text, asked)
    assert [letters.decode(part) for part in read.ids(letters, 99)] == ["T.", " Q? It is"]


def test_a_question_of_ruler_s_is_found_in_a_document_that_is_one_text():
    text = "List. Question: one? Answer: a\nMore.\nQuestion: two?"
    read = PromptFormat("before_question").prompt("ruler_cwe", {"input": text, "outputs": []}, text, None)
    assert text[-read.behind :] == "Question: two?"


def test_exceptions_are_named_by_pattern_or_all_of_longbench_s():
    assert PromptFormat.of("prompt", "left", "longbench+my_*").no_chat == (*LONGBENCH_PATTERNS, "my_*")
    assert "longbench_repobench-p_e" in LONGBENCH_PATTERNS and PromptFormat.of("prompt", "left", []).plain


def test_what_cannot_be_read_so_is_refused(letters, model):
    with pytest.raises(ValueError, match="nothing says where its question begins"):
        PromptFormat("before_question").prompt("t", {"text": "a"}, "a b", None)
    with pytest.raises(ValueError, match="does not have the document's context"):
        PromptFormat("before_question").prompt("t", {"context": "x"}, "a b", None)
    asked, text = framed(("system", "S"), ("user", "U"))
    with pytest.raises(ValueError, match="messages of system, user: leave the system instruction"):
        PromptFormat(no_chat=("t",)).prompt("t", {}, text, asked)
    for wrong in (dict(compress="later"), dict(truncate="right")):
        with pytest.raises(ValueError, match="unknown"):
            GateKVLM(model, tokenizer=letters, policy="full", **wrong)
    lm = GateKVLM(model, tokenizer=letters, policy="full", compress="before_question")
    with pytest.raises(ValueError, match="is for tasks that generate"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("a", "b"), 0)], True)
    docs = [{"context": "a"}, {"context": "a b"}]
    twice = [Instance("generate_until", d, ("a b c", {"until": ["~"]}), i, ("t", i, 1)) for i, d in enumerate(docs)]
    with pytest.raises(ValueError, match="read one prompt in two ways"):
        lm.generate_until(twice, True)
