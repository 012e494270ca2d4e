"""LongBench: prompts, truncation, chat exceptions, metrics by hand, loading, and answers that are really generated."""

import importlib
import json
import re
import zipfile

import huggingface_hub
import pytest
import torch
from conftest import gated, tiny

from gatekv.evaluation import frontier, results, tasks
from gatekv.evaluation.records import Records
from gatekv.evaluation.tasks import longbench, text_metrics
from gatekv.evaluation.tasks.generated import Generated, chat_parts, prompted
from gatekv.questions import read_lines


class Chars:
    """Printable characters as tokens 1..95, 96 before a text; with a chat template or without."""

    eos_token_id = None

    def __init__(self, chat: bool = True):
        self.chat_template = "a template" if chat else None

    def __call__(self, text, add_special_tokens=True):
        ids = [96] * add_special_tokens + [(ord(c) - 32) % 95 + 1 for c in text]
        return type("Encoding", (), {"input_ids": ids})()

    def decode(self, ids, skip_special_tokens=False):
        assert skip_special_tokens
        return "".join(chr(31 + i) for i in ids if 0 < i < 96)

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, enable_thinking):
        (message,) = messages
        assert not tokenize and add_generation_prompt and not enable_thinking and message["role"] == "user"
        return f"[U]{message['content']}[A]"


def text(ids):
    return Chars().decode(ids, skip_special_tokens=True)


def entry(**fields):
    found = {
        "context": "It is a red ship.",
        "input": "What colour?",
        "answers": ["red"],
        "all_classes": None,
        "length": 9,
    }
    return found | fields


def folder(tmp_path, name="qasper", entries=None):
    lines = [json.dumps(e, ensure_ascii=False) for e in entries or [entry(), entry(input="Which ship?")]]
    (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(tmp_path)


def item(name, example, mode="agnostic", tokens=None, room=4000, tokenizer=None):
    task = f"longbench_{name}"
    return longbench.longbench(tokenizer or Chars(), [], mode, 0, 0, tokens, task=task, examples=[example], room=room)


def test_all_sets_have_a_prompt_a_length_and_a_metric():
    assert (
        len(longbench.SETS) == 21 and sum(s["e"] for s in longbench.SETS.values()) == 13 and len(longbench.NAMES) == 34
    )
    for name, spec in longbench.SETS.items():
        assert spec["prompt"].count("{context}") == 1 and spec["prompt"].count("{input}") <= 1, name
        assert spec["prompt"].index("{context}") < (spec["prompt"] + "{input}").index("{input}"), name
        assert spec["metric"] in text_metrics.METRICS and spec["tokens"] in (32, 64, 128, 512)
    assert longbench.SETS["gov_report"]["tokens"] == 512 and longbench.SETS["samsum"]["tokens"] == 128
    assert "asconcisely" in longbench.SETS["narrativeqa"]["prompt"], "as published, misprint and all"
    assert longbench.SETS["passage_count"]["prompt"].endswith("answer is: ")
    assert longbench.SETS["lcc"]["prompt"] == "Please complete the code given below. \n{context}Next line of code:\n"


def test_the_tables_agree_with_lm_evaluation_harness_up_to_blanks():
    other = importlib.import_module("lm_eval.tasks.longbench._generate_config")
    squeezed = lambda prompt: re.sub(r"\s+", " ", prompt).strip()  # noqa: E731
    for name, spec in longbench.SETS.items():
        assert squeezed(spec["prompt"]) == squeezed(other.dataset2prompt[name].replace("{question}", "{input}"))
        assert spec["tokens"] == other.dataset2maxlen[name] and f"{spec['metric']}_score" == other.dataset2metric[name]
    assert {n.removeprefix("longbench_") for n in longbench.NAMES} == set(other.DATASETS)


def test_an_unseen_question_is_what_the_prompt_says_behind_the_context():
    found, whole = item("multifieldqa_en", entry()), item("multifieldqa_en", entry(), "aware")
    assert text(found.context) == "[U]Read the following text and answer briefly.??It is a red ship.".replace(
        "??", text(Chars()("\n\n").input_ids)
    )
    assert text(found.query).endswith("Question: What colour?" + text(Chars()("\n").input_ids) + "Answer:[A]")
    assert whole.context + whole.query == found.context + found.query and len(whole.query) == 1
    assert found.tokens == 64 and found.stops == () and found.place is None
    braces = item("multifieldqa_en", entry(context="f{x} {input} {context}", input="{context}?"))
    assert "f{x} {input} {context}" in text(braces.context) and "{context}?" in text(braces.query)


@pytest.mark.parametrize("name", longbench.SETS)
def test_examples_and_code_go_without_a_chat_template(name):
    found = item(name, entry(all_classes=["a"]))
    framed = text(found.context).startswith("[U]") and text(found.query).endswith("[A]")
    assert framed == (name not in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"))
    assert (found.context[0] == 96) != framed, "the tokenizer's own first token, where no template brings one"
    assert found.stops == (tuple(Chars()("\n").input_ids[-1:]) if name == "samsum" else ())


def test_a_model_without_a_template_gets_the_bare_prompt():
    bare = item("qasper", entry(), tokenizer=Chars(chat=False))
    assert bare.context[0] == 96 and text(bare.query).endswith("Answer:") and chat_parts(Chars(chat=False)) == ("", "")
    context, query = prompted(Chars(), "agnostic", "C", "Q", True, " lead")
    assert (text(context), text(query)) == ("[U]C", "Q[A] lead")


def test_the_middle_is_left_out_and_the_question_stays():
    tokenizer = Chars()
    assert longbench.truncated(tokenizer, "abcdefghQQ", 2, 11) == ("abcdefgh", "QQ"), "the first token counts too"
    assert longbench.truncated(tokenizer, "abcdefghQQ", 2, 10) == ("abcdefgh"[:4] + "fgh", "QQ")
    assert longbench.truncated(tokenizer, "abcdefghQQ", 2, 9) == ("abcgh", "QQ"), (
        "half of an odd number is rounded down"
    )
    assert longbench.truncated(tokenizer, "abQQQQQQQQ", 8, 6) == ("ab", "QQQ"), "of a longer question the end"
    long = entry(context="x" * 3000)
    given, own = item("qasper", long, tokens=1000), item("qasper", long, room=1500)
    assert len(given.context) + len(given.query) == 2 * 500 - 1 + len("[U][A]")  # the first token is not decoded again
    assert len(own.context) + len(own.query) + own.tokens <= 1500
    with pytest.raises(ValueError, match="leaves -34 tokens of 100 for a prompt: use a model with a longer context"):
        item("qasper", long, room=100)


def test_qa_f1_by_hand():
    assert text_metrics.qa_f1("The Red, red ship!", "a red ship") == pytest.approx(2 * 2 / (3 + 2))
    assert text_metrics.qa_f1("an", "ship") == 0 and text_metrics.qa_f1("", "") == 0


def test_classes_by_hand():
    classes = ["Food", "Animal", "Animal sound", "Place"]
    assert text_metrics.classification("a Place", "Place", classes) == 1
    assert text_metrics.classification("Food or Place", "Place", classes) == 0.5
    assert text_metrics.classification("Animal sound", "Animal sound", classes) == 1, (
        "a part of the true name is no other"
    )
    assert (
        text_metrics.classification("none", "Food", classes) == 0
        and text_metrics.classification("Food", "Place", classes) == 0
    )


def test_numbers_by_hand():
    assert text_metrics.count("7, no 8 or 7", "7") == pytest.approx(2 / 3) and text_metrics.count("none", "7") == 0
    assert (
        text_metrics.retrieval("Paragraph 12 or 3", "Paragraph 12") == 0.5
        and text_metrics.retrieval("1", "Paragraph 12") == 0
    )
    assert text_metrics.retrieval_zh("段落3", "段落3") == 1


def test_code_is_its_first_line_that_is_no_comment():
    assert text_metrics.code_sim("\n# so\n`x`\nabcd\nrest", "abcd") == 1
    assert text_metrics.code_sim("// all", "abcd") == 0
    assert text_metrics.code_sim("abc", "abd") == 0.67, "2 · 2 / 6, in whole percents"


def test_rouge_by_hand():
    assert text_metrics.rouge("the cat sat", "the cat ran off") == pytest.approx(
        2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4), abs=1e-6
    )
    assert text_metrics.rouge("", "the cat") == 0 and text_metrics.rouge(".", "the cat") == 0


def test_chinese_by_hand():
    assert text_metrics.qa_f1_zh("红色。", "红色") == 1 and text_metrics.qa_f1_zh("红色", "蓝色") == 0
    assert text_metrics.rouge_zh("红色", "红色") == pytest.approx(1, abs=1e-6)


def test_the_best_reference_counts_and_some_sets_read_one_line():
    answered = lambda name, said, **fields: item(name, entry(**fields)).score(Chars()(said).input_ids)  # noqa: E731
    assert answered("qasper", "dark red", answers=["blue", "red", "dark red"]) == 1
    seen = type("Lines", (Chars,), {"decode": lambda self, ids, skip_special_tokens: "\n\nred\nDialogue: blue"})()
    classes = {"all_classes": ["red", "blue"]}
    assert item("trec", entry(**classes), tokenizer=seen).score([]) == 1
    assert item("qasper", entry(), tokenizer=seen).score([]) == pytest.approx(2 / 4)


def test_a_folder_is_read_and_mistakes_are_named_with_the_cure(tmp_path):
    source = folder(tmp_path, entries=[entry(context="line\u2028separator\x85")])
    assert longbench.load_longbench("longbench_qasper", source)[0]["context"] == "line\u2028separator\x85"
    with pytest.raises(ValueError, match="--longbench .*trec.jsonl' is not a file"):
        longbench.load_longbench("longbench_trec", source)
    folder(tmp_path, "trec", [{"context": "a", "input": "b"}])
    with pytest.raises(ValueError, match="line 1 lacks answers, all_classes, length: it is no file of LongBench"):
        longbench.load_longbench("longbench_trec", source)
    assert len(read_lines(str(tmp_path / "qasper.jsonl"), "--choices")) == 1
    with pytest.raises(ValueError, match="has 1 examples, and number 2 is wanted: lower --n"):
        longbench.longbench(Chars(), [], "aware", 1, 0, task="longbench_qasper", examples=[entry()], room=4000)


def test_by_hub_name_the_archive_is_read(tmp_path, monkeypatch):
    asked = []
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as file:
        file.writestr("data/qasper.jsonl", json.dumps(entry()) + "\n")
        file.writestr("data/qasper_e.jsonl", json.dumps(entry(length=4000)) + "\n")
    download = lambda *a, **k: asked.append((*a, k["repo_type"])) or str(tmp_path / "data.zip")  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert longbench.load_longbench("longbench_qasper_e") == [entry(length=4000)]
    assert longbench.load_longbench("longbench_qasper", "my/copy") == [entry()]
    assert asked == [("THUDM/LongBench", "data.zip", "dataset"), ("my/copy", "data.zip", "dataset")]
    with pytest.raises(ValueError, match="has no trec.jsonl"):
        longbench.load_longbench("longbench_trec")

    def offline(*a, **k):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        ValueError, match="no network.*unpack it, and name the folder of its .jsonl files with --longbench"
    ):
        longbench.load_longbench("longbench_qasper")


def test_a_metric_without_its_package_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(text_metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="longbench_dureader is scored with rouge, jieba: pip install rouge jieba"):
        longbench.load_longbench("longbench_dureader")
    with pytest.raises(ValueError, match="longbench_samsum_e is scored with rouge: pip install"):
        longbench.load_longbench("longbench_samsum_e")
    text_metrics.check_packages("qa_f1", "longbench_qasper")


def test_longbench_e_is_told_apart_by_length():
    words = [item("qasper_e", entry(length=n)).place for n in (3999, 4000, 7999, 8000)]
    assert [w["words"] for w in words] == ["0-4k", "4-8k", "4-8k", "8k+"]


def greedy(model, ids, tokens, ends=()):
    """Token by token, with the whole prompt read again at each."""
    for _ in range(tokens):
        with torch.no_grad():
            ids = ids + [int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] in ends:
            break
    return ids


def test_the_full_cache_generates_what_the_model_does():
    model = tiny(dtype=torch.float32)
    ids = torch.randint(1, 90, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    prompt = Generated(ids[:50], ids[50:], 12, lambda new: 0.0)
    wanted = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 60:].tolist()
    cache = frontier.KVCache(model, "full")
    with torch.no_grad():
        model(torch.tensor([ids[:50]]), past_key_values=cache)
        new, ratio = frontier._generate(model, cache, prompt)
        assert new == wanted == greedy(model, ids, 12)[60:] and len(new) == 12
        assert 1 <= ratio < 1.5, "all tokens, and the room that tails grow into"
        assert frontier._generate(model, cache, prompt)[0] == new, "the cache itself stays as it was"
        stopped = Generated(ids[:50], ids[50:], 12, lambda new: 0.0, stops=(wanted[3],))
        first = next(i for i, t in enumerate(wanted) if t == wanted[3])
        if first > 0:
            assert frontier._generate(model, cache, stopped)[0] == wanted[: first + 1]
        never = Generated(ids[:50], ids[50:], 12, lambda new: 0.0, stops=(wanted[0],))
        assert frontier._generate(model, cache, never)[0][0] != wanted[0], "an answer has a token before its stop"


@pytest.mark.parametrize("mode", tasks.MODES)
def test_a_set_is_scored_under_policies(tmp_path, mode):
    model = gated(window=4, sinks=2, dtype=torch.float32)
    build, size = tasks.published("longbench_qasper", longbench=folder(tmp_path))
    seen = []

    def short(tokenizer, texts, mode, index, seed, tokens):
        found = build(tokenizer, texts, mode, index, seed, tokens, room=2000)
        found.tokens, score = 5, found.score
        found.score = lambda ids: seen.append(len(ids)) or score(ids)
        return found

    records = Records(None, {})
    cells = ["gate+global", "snapkv"], [0.5], "longbench_qasper", mode, size, 0, records
    frontier.evaluate(model, Chars(), [], *cells, tokens=200, progress=False, build=short)
    rows = results.rows(records.lines)
    assert [r["policy"] for r in rows] == ["full", "gate+global", "snapkv"] and all(r["n"] == 2 for r in rows)
    assert all(r["kl"] is None and r["score"] is not None and "refused" not in r for r in rows)
    assert all(0.4 < r["bytes_ratio"] / rows[0]["bytes_ratio"] < 0.65 for r in rows[1:]) and max(seen) == 5
