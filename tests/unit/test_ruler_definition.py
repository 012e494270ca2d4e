"""RULER: our samples against its public definition (synthetic.yaml, constants.py): counts, ranges, prompts, scores."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from conftest import gated
from test_longbench import Chars, text

from gatekv.evaluation import frontier, results, tasks
from gatekv.evaluation.records import Records
from gatekv.evaluation.tasks import ruler_definition, ruler_sets, text_metrics
from gatekv.evaluation.tasks.ruler import COMMON_SHARE, FREQUENT, HOPS, KEYS, VALUES, ZETA

TEXTS = [t[:200_000] for t in tasks.heldout_texts([])]
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
WORD, NUMBER = r"[a-z]+-[a-z]+", r"[1-9]\d{6}"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class Words:
    """A tokenizer whose tokens are words and signs."""

    def __call__(self, text, add_special_tokens=False):
        return type("Encoding", (), {"input_ids": [1] * len(re.findall(r"\w+|[^\w\s]", text))})()


def made(name, length=4096, seed="a"):
    return ruler_definition.make(name, Words(), TEXTS, length, seed)


def prompt(row):
    return row["context"] + row["question"] + row["answer_prefix"]


# name: (haystack, key, value, needles, references), as synthetic.yaml has them
NIAH = {
    "niah_single_1": ("noise", WORD, NUMBER, 1, 1),
    "niah_single_2": ("essay", WORD, NUMBER, 1, 1),
    "niah_single_3": ("essay", WORD, UUID, 1, 1),
    "niah_multikey_1": ("essay", WORD, NUMBER, 4, 1),
    "niah_multikey_2": ("needle", WORD, NUMBER, None, 1),
    "niah_multikey_3": ("needle", UUID, UUID, None, 1),
    "niah_multivalue": ("essay", WORD, NUMBER, 4, 4),
    "niah_multiquery": ("essay", WORD, NUMBER, 4, 4),
}


@pytest.mark.parametrize("name", NIAH)
def test_needles(name):
    haystack, key, value, needles, count = NIAH[name]
    row = made(name)
    kind = "uuids" if value == UUID else "numbers"
    found = re.findall(rf"One of the special magic {kind} for ({key}) is: ({value})\.", row["context"])
    lines = row["context"].strip().split("\n")[1:]
    if haystack == "needle":
        assert len(found) == len(lines) > 50 and len(set(k for k, _ in found)) == len(found), (
            "distractors are needles too"
        )
    else:
        assert len(found) == needles
    if haystack == "noise":
        assert Counter(lines).most_common(1)[0] == (NOISE, len(lines) - needles)
    assert len({k for k, _ in found}) == (1 if name == "niah_multivalue" else len(found))
    assert len(row["answer"]) == count and set(row["answer"]) <= {v for _, v in found} and row["max_new_tokens"] == 128
    asked = re.findall(key, row["question"].partition(" for ")[2].partition(" mentioned")[0])
    assert row["answer"] == [v for k in asked for kk, v in found if kk == k] or (
        name == "niah_multivalue" and sorted(row["answer"]) == sorted(v for _, v in found)
    ), "in the order of the question"
    if count == 1:
        kind = kind[:-1]
        start = f"A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} afterwards.\n"
        question = f"\nWhat is the special magic {kind} for {asked[0]} mentioned in the provided text?"
        prefix = f" The special magic {kind} for {asked[0]} mentioned in the provided text is"
    else:
        query = ", ".join(asked[:-1]) + f", and {asked[-1]}" if len(asked) > 1 else asked[0]
        start = f"Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} afterwards.\n"
        question = f"\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
        prefix = f" The special magic {kind} for {query} mentioned in the provided text are"
    assert prompt(row).startswith(start) and prompt(row).endswith(question + prefix) and row["answer_prefix"] == prefix


def test_variable_tracking_is_one_chain_of_four_hops_behind_a_solved_example():
    row = made("vt")
    start = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    example, _, rest = prompt(row).rpartition(start)
    value = re.search(r"VAR ([A-Z]{5}) = (\d{5})\n", rest)
    chain = [value[1]]
    for name, before in re.findall(r"VAR ([A-Z]{5}) = VAR ([A-Z]{5}) \n", rest):
        assert before == chain[-1], "in the order of the text, each from the one before"
        chain.append(name)
    assert chain == row["answer"] and len(set(chain)) == 5 and row["max_new_tokens"] == 30
    assert len(re.findall(r"= \d{5}", rest)) == 1 and Counter(rest.split("\n"))[NOISE] > 50
    ending = (
        f"\nQuestion: Find all variables that are assigned the value {value[2]} in the text above. Answer: According to the chain(s) "
        f"of variable assignment in the text above, 5 variables are assigned the value {value[2]}, they are: "
    )
    assert rest.endswith(ending)
    shown = re.search(r"they are:  ([A-Z]{3}(?: [A-Z]{3}){4})\n\n$", example)
    assert shown and len(re.findall(r"VAR [A-Z]{3} = ", example)) == 5 and value[2] not in example
    assert 400 < len(Words()(example).input_ids) < 550, "about 500 tokens"


@pytest.mark.parametrize("length,often,rarely,shown", [(4096, 30, 3, (40, 10, 3)), (2048, 6, 1, (20, 3, 1))])
def test_common_words_are_ten_that_stand_ten_times_as_often(length, often, rarely, shown):
    row = made("cwe", length)
    start = "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n"
    ending = "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often in the list are:"
    _, example, asked = prompt(row).split(start)
    assert asked.endswith(ending) and row["max_new_tokens"] == 120
    for part, (common, others) in ((asked, (often, rarely)), (example, shown[1:])):
        listed = part.partition("\nQuestion")[0]
        numbers, words = zip(*re.findall(r"(\d+)\. ([a-z]+)", listed))
        counts = Counter(words)
        assert [int(n) for n in numbers] == list(range(1, len(words) + 1))
        assert sorted(Counter(counts.values()).items())[-1] == (common, 10) and set(counts.values()) == {common, others}
        if part is asked:
            assert {w for w, c in counts.items() if c == common} == set(row["answer"]) and len(counts) > 40
        else:
            assert len(counts) == shown[0] and re.search(r"list are: 1\. [a-z]+ .*10\. [a-z]+\n$", part)


def test_frequent_words_fall_with_the_square_of_their_rank_and_dots_come_first():
    row = made("fwe")
    start = "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words. "
    ending = (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared words "
        "in the above coded text? Answer: According to the coded text above, the three most frequently appeared words are:"
    )
    assert prompt(row).startswith(start) and prompt(row).endswith(ending) and row["max_new_tokens"] == 50
    counts = Counter(row["context"].removeprefix(start).split())
    ranked = counts.most_common()
    assert ranked[0][0] == "..." and [w for w, _ in ranked[1:4]] == row["answer"] and len(ranked) <= (4096 - 50) // 50
    assert all(re.fullmatch("[a-z]{6}", w) for w, _ in ranked[1:])
    words = counts["..."] * 1.6449  # zeta(2): the share of rank k is 1 / (k² zeta(2))
    assert all(abs(count - words / k**2 / 1.6449) < 2 for k, (_, count) in enumerate(ranked, 1))


@pytest.mark.parametrize("name", ruler_definition.TASKS)
@pytest.mark.parametrize("length", [2048, 4096])
def test_prompt_and_answer_fill_the_length(name, length):
    row = made(name, length)
    used = len(Words()(prompt(row)).input_ids) + row["max_new_tokens"]
    assert length - 160 < used <= length, "another line, word or round of words would not fit"
    assert row == made(name, length) != made(name, length, "b")
    with pytest.raises(ValueError, match=f"ruler_{name} does not fit into 100 tokens: use --tokens 1024 or more"):
        made(name, 100)


def test_our_short_families_keep_the_definition_s_counts_where_they_can():
    """`ruler` is the same families in 768 tokens, teacher-forced; what differs is stated in its file and the log."""
    assert (KEYS, VALUES, HOPS, FREQUENT, ZETA) == (4, 4, 4, 3, 2.0)
    often, rarely = 10 * 30, 100 * 3
    assert COMMON_SHARE == often / (often + rarely)
    spec = ruler_definition.TASKS
    assert spec["niah_multiquery"]["queries"] == KEYS and spec["vt"]["hops"] == HOPS


def test_the_prompts_are_those_of_lm_evaluation_harness():
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / "ruler"
    source = "".join(p.read_text() for p in sorted(folder.glob("*.py")))
    for name in ("vt", "cwe", "fwe"):
        before, question, prefix = (p.replace("{count}", "{num_v}") for p in ruler_definition.PROMPTS[name])
        prefix = prefix.replace("assigned the value {query}, they", "assgined the value {query}, they")  # its misprint
        assert f"{before}{{context}}\n{question}".replace("\n", "\\n") in source and prefix in source, name
    before, question, _ = (p.replace("{type}", "{type_needle_v}") for p in ruler_definition.PROMPTS["niah_many"])
    assert f"{before}{{context}}\n{question}".replace("\n", "\\n") in source


def test_references_are_found_in_any_case():
    assert text_metrics.references_found("The ABCDE,\x07 12", ["abcde", "13", "12"]) == [True, False, True]


def rows(**fields):
    row = {"context": "Text. ", "question": "What?", "answer_prefix": " It is", "answer": ["red", "blue"]}
    return row | {"max_new_tokens": 9} | fields


def scored(name, said, **fields):
    found = ruler_sets.ruler_set(
        Chars(), [], "agnostic", 0, 0, task=f"ruler_{name}", examples=[rows(**fields)], room=500
    )
    return found, found.score(Chars()(said).input_ids)


def test_all_references_count_but_one_answer_is_enough_for_a_question():
    found, score = scored("vt", "red")
    assert score == 0.5 and found.tokens == 9
    assert (text(found.context), text(found.query)) == ("[U]Text. ", "What?[A] It is")
    assert scored("qa_1", "a RED one")[1] == 1 and scored("qa_2", "green")[1] == 0
    with pytest.raises(ValueError, match="needs 32 tokens of a model that holds 20: use a shorter set, or --tokens"):
        ruler_sets.ruler_set(Chars(), [], "aware", 0, 0, task="ruler_vt", examples=[rows()], room=20)


def test_lines_of_ruler_s_own_scripts_are_split_at_the_question(tmp_path):
    (tmp_path / "cwe").mkdir()
    line = {"input": "Question: one? Answer: 1. a\nlist\nQuestion: two?", "outputs": ["a"], "answer_prefix": " Answer:"}
    (tmp_path / "cwe" / "validation.jsonl").write_text(json.dumps(line) + "\n")
    older = {
        "input": "text What is the special magic number for x mentioned in the provided text? The",
        "outputs": ["7"],
    }
    (tmp_path / "niah_single_1.jsonl").write_text(json.dumps(older) + "\n")
    (tmp_path / "vt.jsonl").write_text(json.dumps(rows()) + "\n")
    (tmp_path / "fwe.jsonl").write_text(json.dumps({"input": "no", "outputs": []}) + "\n" + json.dumps({"a": 1}))
    (row,) = ruler_sets.load_ruler("ruler_cwe", str(tmp_path))
    assert row == {"context": "Question: one? Answer: 1. a\nlist\n", "question": "Question: two?", "answer_prefix": " Answer:",
                   "answer": ["a"], "max_new_tokens": 120}  # fmt: skip
    (row,) = ruler_sets.load_ruler("ruler_niah_single_1", str(tmp_path))
    assert row["context"] == "text " and row["answer_prefix"] == "" and row["max_new_tokens"] == 128
    assert ruler_sets.load_ruler("ruler_vt", str(tmp_path)) == [rows()]
    with pytest.raises(ValueError, match="line 1: no question of RULER's"):
        ruler_sets.load_ruler("ruler_fwe", str(tmp_path))
    with pytest.raises(ValueError, match="qa_1.jsonl' is not a file"):
        ruler_sets.load_ruler("ruler_qa_1", str(tmp_path))
    with pytest.raises(ValueError, match="load a set with --ruler"):
        ruler_sets.load_ruler("ruler_qa_1", "")


def test_a_set_by_hub_name_is_read_by_task(monkeypatch):
    asked = []
    table = datasets.Dataset.from_list([rows(task="vt"), rows(task="cwe", answer=["x"])])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or table)
    assert ruler_sets.load_ruler("ruler_cwe", "simonjegou/ruler:4096") == [rows(answer=["x"])]
    assert asked == [(("simonjegou/ruler", "4096"), {"split": "test"})]
    with pytest.raises(ValueError, match="no row whose task is 'fwe'"):
        ruler_sets.load_ruler("ruler_fwe", "simonjegou/ruler:4096")

    def offline(*a, **k):
        raise OSError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match="neither a folder nor a data set that can be loaded .no network"):
        ruler_sets.load_ruler("ruler_fwe", "no/where")


def test_samples_made_here_are_scored_under_a_policy():
    model = gated(window=4, sinks=2, dtype=torch.float32)
    build, size = tasks.published("ruler_fwe")

    def short(*a):
        found = build(*a, room=3000)
        found.tokens = 4
        return found

    whole = build(Chars(), TEXTS, "aware", 0, 0, 1400, room=1400)
    assert 1300 < len(whole.context) + len(whole.query) + 50 <= 1400, "with the chat template and the answer"
    records = Records(None, {})
    frontier.evaluate(model, Chars(), TEXTS, ["snapkv"], [0.5], "ruler_fwe", "agnostic", 1, 0, records, tokens=1400,
                      progress=False, build=short)  # fmt: skip
    full, compressed = results.rows(records.lines)
    assert size is None and full["n"] == compressed["n"] == 1 and compressed["bytes_ratio"] < 0.6 * full["bytes_ratio"]
