"""Fine-tuning: completion-only rows written as evaluation asks, what learns and what does not, trained = deployed, errors."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import positions_of, tiny
from letters import CHAT, letters
from peft import PeftModel, get_peft_model

import gatekv
from gatekv.cache.kvcache import KVCache
from gatekv.evaluation.tasks.classification import classification, load_choices
from gatekv.modules import wrappers
from gatekv.recipes import sft
from gatekv.training.examples import Examples, filled, read_entries, tokenised
from gatekv.training.loop import PROBE_ROW, train
from gatekv.training.objective import Objective
from gatekv.training.options import load_config
from gatekv.training.plain import PlainObjective
from gatekv.training.sft_config import SFTConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "data")]
import build_sft

ENTRY = {"context": "the cat is red", "question": "is it?", "choices": ["yes", "no"], "answer": "no"}


@pytest.fixture
def file(tmp_path):
    lines = [ENTRY | {"context": f"the cat {i} is " + "red " * (i % 5), "answer": i % 2} for i in range(40)]
    path = tmp_path / "cats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def examples(path, mode="aware", length=200, tokenizer=None, **options):
    return Examples(tokenizer or letters(), [str(path)], length, mode=mode, **{"seed": 0} | options)


def batch_of(path, rows=3, mode="aware", first=0):
    return examples(path, mode).batch(first, rows, align=True)


@pytest.mark.parametrize("mode", ["aware", "agnostic"])
def test_rows_are_what_evaluation_asks(file, mode):
    """The same tokens, compressed up to the same one; the completion is the true choice and the turn's end."""
    data, choices = examples(file, mode), load_choices(str(file))
    rows = [data[i] for i in range(len(data.examples))] + [data[PROBE_ROW + i] for i in range(len(data.held))]
    written = {tuple(row.ids): row for row in rows}
    for index in range(40):
        item = classification(letters(), [], mode, index, 0, examples=choices)
        truth = item.score.truths[0][1]
        query, answer = item.asks[truth]
        row = written[tuple(item.context + query + answer + [data.held[0].completion[-1]])]
        assert row.split == len(item.context)
        assert [t for t, w in zip(row.ids[1:], row.weights) if w] == answer + row.ids[-1:]
        assert letters().decode(row.ids[-1:]) == "<|im_end|>" and set(row.weights) == {0.0, 1.0}


def test_rows_are_a_pure_function_of_seed_and_index_and_the_held_out_are_never_trained_on(file):
    one, two = examples(file), examples(file)
    count = len(one.examples)
    assert [one[i] for i in (5, 90, 3)] == [two[i] for i in (5, 90, 3)]
    assert [examples(file, seed=1)[i].ids for i in range(9)] != [one[i].ids for i in range(9)]
    for epoch in range(3):
        seen = [tuple(one[epoch * count + i].ids) for i in range(count)]
        assert len(set(seen)) == count, "each example once a pass"
        assert not set(seen) & {tuple(one[PROBE_ROW + i].ids) for i in range(4)}
    assert [one[i].ids for i in range(count)] != [one[count + i].ids for i in range(count)], "in another order"
    assert examples(file, seed=1)[PROBE_ROW] == one[PROBE_ROW], "runs are judged by the same examples"


def test_aligned_batches_end_their_prompts_at_one_column(file):
    batch = batch_of(file, 4, "agnostic")
    assert len(set(batch["split"].tolist())) == 1 and (batch["attention_mask"][:, 0] == 0).any()
    assert not batch["weights"][:, : int(batch["split"][0])].any()
    ends = {letters().decode(row[m.bool()][-1:]) for row, m in zip(batch["input_ids"], batch["attention_mask"])}
    assert ends == {"<|im_end|>"} and set(batch["weights"].sum(1).tolist()) == {3.0, 4.0}, "no and yes, and the end"


def test_messages_and_prompts_go_through_the_chat_template():
    one = tokenised(letters(), {"prompt": "hi", "completion": "yo"}, "line 1")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert tokenised(letters(), {"messages": turns}, "line 1") == one
    assert letters().decode(one.context) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert letters().decode(one.completion) == "yo<|im_end|>" and not one.question
    longer = tokenised(letters(), {"messages": turns + turns}, "line 1")
    assert longer.completion == one.completion and len(longer.context) > 2 * len(one.context), (
        "the last answer is learned"
    )
    bare = tokenised(letters(None), {"prompt": "hi", "completion": "yo"}, "line 1")
    assert letters().decode(bare.context) == "hi\nAnswer: " and letters().decode(bare.completion) == "yo<|im_end|>"
    changes = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    with pytest.raises(ValueError, match="line 1: the chat template writes the prompt otherwise"):
        tokenised(letters(changes), {"prompt": "hi", "completion": "yo"}, "line 1")


def test_a_tokenizer_that_knows_no_end_is_refused():
    endless = letters(None)
    endless.eos_token = None
    with pytest.raises(ValueError, match="set tokenizer.eos_token"):
        tokenised(endless, {"prompt": "hi", "completion": "yo"}, "line 1")


@pytest.mark.parametrize("entry,match", [
    ({"prompt": "hi", "completion": " "}, "empty completion"), ({"prompt": "", "completion": "x"}, "empty prompt"),
    ({"text": "hi"}, "give context"), (ENTRY | {"answer": 2}, "answer must be"), (ENTRY | {"choices": ["x"]}, "two texts"),
    ({"messages": [{"role": "user", "content": "hi"}]}, "must end with the assistant"), ({"question": "x"}, "lacks context"),
])  # fmt: skip
def test_bad_examples_are_errors_that_say_where(tmp_path, entry, match):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ENTRY) + "\n" + json.dumps(entry) + "\n")
    with pytest.raises(ValueError, match=match) as error:
        examples(path)
    assert "line 2" in str(error.value)


def test_long_few_and_missing_examples_are_errors(file, tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no hub here")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match="of 40 examples are longer than sequence_length=60, the longest has"):
        examples(file, length=60)
    skipped = examples(file, length=52, too_long="skip")
    assert 2 <= len(skipped.examples) < 36 and max(len(e) for e in skipped.examples) <= 52
    for path, match in (("none.jsonl", "is not a file"), ("no/such-set", "neither a file nor a data set")):
        with pytest.raises(ValueError, match=match):
            examples(path)
    (tmp_path / "one.jsonl").write_text(json.dumps(ENTRY))
    with pytest.raises(ValueError, match="too few"):
        examples(tmp_path / "one.jsonl")
    (tmp_path / "chat.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    with pytest.raises(ValueError, match="no question beside its context"):
        examples(tmp_path / "chat.jsonl", "agnostic")


USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "cat"}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL = {"role": "tool", "content": "red"}


@pytest.mark.parametrize("template", [CHAT, None])
@pytest.mark.parametrize("entry", [
    {"prompt": [USER], "completion": [ASSISTANT]}, {"prompt": "hi", "completion": [ASSISTANT]}, {"prompt": [USER], "completion": "yo"},
    {"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT | {"content": [{"type": "text", "text": "y"}, {"type": "text", "text": "o"}]}]},
    {"messages": [USER | {"content": [{"type": "text", "text": "hi", "image": None}], "tool_calls": None}, ASSISTANT | {"tool_calls": []}]},
    {"prompt": [{"type": "text", "text": "hi"}], "completion": "yo"}, {"prompt": "hi", "completion": "yo", "messages": None, "context": None},
    {"prompt": "hi", "completion": "yo", "question": "of another column"}, {"messages": [USER, ASSISTANT], "tools": []},
])  # fmt: skip
def test_formats_of_the_same_conversation_are_the_same_row(template, entry):
    assert tokenised(letters(template), entry, "") == tokenised(
        letters(template), {"prompt": "hi", "completion": "yo"}, ""
    )


def test_texts_may_be_parts_and_labels_numbers():
    assert tokenised(letters(), {"prompt": "hi", "completion": 3}, "") == tokenised(
        letters(), {"prompt": "hi", "completion": "3"}, ""
    )
    parts = ENTRY | {"context": [{"type": "text", "text": "the cat "}, {"text": "is red"}]}
    assert tokenised(letters(), parts, "") == tokenised(letters(), ENTRY, "")


WRITES = "{% if m.tool_calls %}{% for c in m.tool_calls %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}{% endif %}"
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT.replace("{{ m.content }}", "{{ m.content }}" + WRITES)
ABSENT = CHAT.replace(
    "{{ m.content }}", "{% if m.content is defined %}{{ m.content }}{% else %}" + WRITES + "{% endif %}"
)
EMPTY = TOOLS.replace("{{ m.content }}", "{{ m.content + '' }}")  # fails without a content
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + CHAT


@pytest.mark.parametrize("template", [TOOLS, ABSENT, EMPTY])
@pytest.mark.parametrize("content", [None, "", "absent"])
def test_tool_calls_are_written_by_the_template(template, content):
    calls = CALLS | {"content": content} if content != "absent" else {k: v for k, v in CALLS.items() if k != "content"}
    if template == ABSENT and content == "":
        with pytest.raises(ValueError, match="line 1 has tool_calls that the chat template does not write"):
            tokenised(letters(template), {"messages": [USER, calls]}, "line 1")
        return
    said = '[look {"at": "cat" ]<|im_end|>'  # `letters` has no closing brace and reads a blank
    last = tokenised(letters(template), {"messages": [USER, calls]}, "line 1")
    assert letters().decode(last.completion) == said
    whole = tokenised(letters(template), {"messages": [USER, calls, TOOL, ASSISTANT]}, "line 1")
    assert said in letters().decode(whole.context) and letters().decode(whole.completion) == "yo<|im_end|>"
    quoted = calls | {"tool_calls": [{"function": {"name": "look", "arguments": '{"at": "cat"}'}}]}
    assert tokenised(letters(template), {"messages": [USER, quoted]}, "line 1") == last


def test_tools_are_written_by_the_template():
    entry = {"messages": [USER, ASSISTANT], "tools": [{"name": "look"}]}
    assert (
        letters().decode(tokenised(letters(TOOLS), entry, "").context).startswith('[{"name": "look" ]<|im_start|>user')
    )
    assert tokenised(letters(TOOLS), entry | {"tools": '[{"name": "look"}]'}, "") == tokenised(
        letters(TOOLS), entry, ""
    )


@pytest.mark.parametrize("template,entry,match", [
    (CHAT, {"messages": [USER, CALLS]}, "tool_calls that the chat template does not write: take"),
    (CHAT, {"messages": [USER, CALLS, TOOL, ASSISTANT]}, "tool_calls that the chat template does not write"),
    (None, {"messages": [USER, CALLS]}, "no chat template that could write them: set"),
    (CHAT, {"messages": [USER, ASSISTANT], "tools": [{"name": "look"}]}, "has tools, which the chat template does not write: leave"),
    (CHAT, {"messages": [USER, ASSISTANT | {"content": None}]}, "messages, number 2 has no content and no tool_calls: give"),
    (CHAT, {"messages": [USER | {"content": [{"type": "image"}]}, ASSISTANT]}, "number 1, content, part 1 is of type 'image': only text.*leave"),
    (CHAT, {"messages": [USER, {"from": "gpt", "value": "yo"}]}, "number 2 is an object with from, value: a message is"),
    (CHAT, {"messages": "hi"}, "messages is a text: give a list of"), (CHAT, {"messages": []}, "messages is an empty list"),
    (CHAT, {"messages": [USER, CALLS | {"tool_calls": "look"}]}, "tool_calls is a text"),
    (TOOLS, {"messages": [USER, CALLS | {"tool_calls": [{"function": {"name": "look", "arguments": "{"}}]}]}, "arguments are not JSON"),
    (CHAT, {"prompt": [USER], "completion": [ASSISTANT, USER, ASSISTANT]}, "completion has 3 messages: leave the last"),
    (CHAT, {"prompt": [USER], "completion": [USER]}, "must end with the assistant's"), (CHAT, {"prompt": "hi", "completion": 1.5}, "completion is a number, 1.5: write"),
    (CHAT, {"prompt": "hi", "completion": None}, r"has prompt \(and null: completion\): give context"), (CHAT, {"text": "hi"}, "recipes/cpt.py trains on those"),
    (CHAT, {"prompt": "hi", "chosen": "a", "rejected": "b"}, "has prompt, chosen, rejected: give context .* or messages, or say with `fields`"),
    (CHAT, {"conversations": []}, "has conversations: give"), (CHAT, {}, "has nothing: give"), (CHAT, ENTRY | {"context": 3}, "context is a number, 3"),
    (STRICT, {"messages": [ASSISTANT, ASSISTANT]}, r"the chat template refuses these messages \(begin with the user\): change"),
])  # fmt: skip
def test_what_cannot_be_learned_as_it_stands_is_refused_with_its_line(tmp_path, template, entry, match):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "hi", "completion": "yo"}) + "\n" + json.dumps(entry) + "\n")
    with pytest.raises(ValueError, match=match) as error:
        examples(path, tokenizer=letters(template))
    assert f"{path}, line 2" in str(error.value)


ODD = [None, True, 3, 1.5, "", " ", "x", [], {}, [None], [[]], ["x"], [{}], {"a": 1}, [{"role": "user"}], [{"role": 3}],
       [USER], [CALL], [{"type": "text"}], [{"type": None, "text": "x"}], {"name": "look"}, "\ud83d"]  # fmt: skip


def oddities(value):
    """The value with each of its parts, at any depth, made odd or left out."""
    yield from ODD
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        rest = {k: v for k, v in items if k != key} if isinstance(value, dict) else value[:key] + value[key + 1 :]
        yield rest
        for odd in oddities(inner):
            yield value | {key: odd} if isinstance(value, dict) else [*value[:key], odd, *value[key + 1 :]]


@pytest.mark.parametrize("template", [CHAT, None, TOOLS, ABSENT, EMPTY])
@pytest.mark.parametrize("entry", [
    ENTRY, {"prompt": "hi", "completion": "yo"}, {"prompt": [USER], "completion": [ASSISTANT]},
    {"messages": [USER, CALLS, TOOL, ASSISTANT], "tools": [{"name": "look"}]},
], ids=["choices", "texts", "sides", "messages"])  # fmt: skip
def test_rows_are_read_or_refused_by_name_whatever_is_in_them(entry, template):
    tokenizer = letters(template)
    for odd in (o for o in oddities(entry) if isinstance(o, dict)):
        try:
            found = tokenised(tokenizer, odd, "line 7")
        except ValueError as error:
            assert type(error) is ValueError and "line 7" in str(error), odd
        else:
            text = tokenizer.decode(found.context + found.question + found.completion)
            assert "None" not in text and found.completion, odd


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.parquet"])
def test_files_of_every_kind_hold_rows(tmp_path, name):
    rows = [{"prompt": f"hi {i}\u2028", "completion": "yo"} for i in range(4)]
    path = tmp_path / name
    if name == "a.parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif name == "a.csv":
        path.write_text("prompt,completion\n" + "".join(f'"{r["prompt"]}",{r["completion"]}\n' for r in rows))
    else:
        text = json.dumps(rows) if name == "a.json" else "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
        data = text.encode("utf-8-sig")
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert [row for _, row in read_entries(str(path), {})] == rows
    with pytest.raises(ValueError, match="a.txt is a text, which has no rows: give a .jsonl"):
        (tmp_path / "a.txt").write_text("x")
        read_entries(str(tmp_path / "a.txt"), {})


@pytest.mark.parametrize("row", ['"hi"', "3", "null", '["hi"]'])
def test_rows_that_are_no_objects_are_refused(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "hi", "completion": "yo"}) + "\n" + row)
    with pytest.raises(ValueError, match="a.jsonl, line 2 is no JSON object"):
        read_entries(str(tmp_path / "a.jsonl"), {})


@pytest.mark.parametrize("fields,match", [
    ({"prompt": "Say {a}"}, "does not fit `fields` .a is null.: mend"), ({"prompt": "{b[text]}"}, "does not fit `fields`"),
    ({"prompt": "{b"}, "does not fit `fields`"), ({"prompt": "{b.no}"}, "does not fit `fields`"), ({"prompt": "{}"}, "row 0"),
    ({"labels": "{b}", "answer": "{b}"}, "labels is a text: let"),
])  # fmt: skip
def test_rows_that_fields_do_not_fit_are_refused(fields, match):
    with pytest.raises(ValueError, match=match) as error:
        filled(fields, {"a": None, "b": "x"}, "row 0")
    assert type(error.value) is ValueError


def test_fields_make_entries_of_rows():
    fields = {
        "context": "{goal}!",
        "question": "Which?",
        "choices": "{choices[text]}",
        "labels": "{choices[label]}",
        "answer": "{key}",
    }
    row = {"goal": "go", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "key": "B"}
    assert filled(fields, row, "row 0") == {"context": "go!", "question": "Which?", "choices": ["a", "b"], "answer": 1}
    assert filled({"choices": ["no", "{goal}"], "answer": "{flag}"}, row | {"flag": True}, "") == {
        "choices": ["no", "go"],
        "answer": True,
    }
    with pytest.raises(ValueError, match="row 0 has no column 'gaol'"):
        filled({"context": "{gaol}"}, row, "row 0")
    with pytest.raises(ValueError, match="none of the labels"):
        filled(fields, row | {"key": "C"}, "row 0")


def test_data_sets_by_name_are_read_as_files_are(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or [{"p": "hi", "c": "yo"}])
    found = read_entries("org/set:sub", {"prompt": "{p}", "completion": "{c}"}, "validation")
    assert found == [("data set org/set:sub, row 0", {"prompt": "hi", "completion": "yo"})]
    assert asked == [(("org/set", "sub"), {"split": "validation"})]


def tuned(family="llama", dtype=torch.float32, lora=True, gate="mlp", **spec):
    torch.manual_seed(0)
    spec = dict(window=4, sinks=2, hidden=8, heads=2, head_dim=4, relaxation="ste", initial_logit=0.5) | spec
    lora = {"r": 4, "target_modules": "all-linear"} if lora else None
    model = get_peft_model(tiny(family, dtype), gatekv.GateKVConfig(gate=gate, lora=lora, **spec)).to(dtype).train()
    for name, p in model.named_parameters():
        if ".lora_B." in name or name.endswith("out.weight"):  # zero at the start: what is before it would not learn
            torch.nn.init.normal_(p, std=0.3)
    return model


KINDS = {
    "gate + lora": dict(), "gate": dict(lora=False), "lora": dict(gate="none"),
    "prompt gate + lora": dict(gate="attention", context="prompt", window=0),
}  # fmt: skip


def objective_of(model, prefill="dense", sparsity="abs", **options):
    if not any(w.active() for w in wrappers(model)):
        return PlainObjective(model)
    prefill = "sparse" if model.peft_config["default"].context == "prompt" else prefill
    return Objective(model, objective="lm", prefill=prefill, sparsity=sparsity, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_what_learns_moves_and_the_base_does_not(family, file, tmp_path, kind):
    model = tuned(family, **KINDS[kind])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    options = {"window": 4} | {k: v for k, v in KINDS[kind].items() if k != "lora"}
    options |= {"output_dir": str(tmp_path / "out"), "max_steps": 3, "batch_size": 3, "learning_rate": 1e-2}
    options |= {"prefill": "sparse"} if "context" in options else {}
    config = SFTConfig(**options | {"lora_rank": 4 if "lora" in kind else 0})
    objective = objective_of(model, sparsity="budget", oracle_weight=0.0)
    records = train(objective, examples(file), config, Accelerator())
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "gatekv_" in n or ".lora_" in n}
    assert len(records) == 3 and all(torch.tensor(r["loss"]).isfinite() for r in records)
    if kind == "gate + lora":
        found = objective.soft_hard(examples(file).batch(PROBE_ROW, 2, align=True), 0.372)
        assert found["soft_hard_gap"] == pytest.approx(0, abs=1e-5), "straight-through flags are hard already"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["aware", "agnostic"])
def test_a_batch_is_the_mean_of_its_rows_whatever_the_padding(family, file, kind, mode):
    model, data = tuned(family, torch.float64, **KINDS[kind]), examples(file, mode)
    objective = objective_of(model, kl_weight=0.5) if kind != "lora" else objective_of(model)
    whole = objective(data.batch(0, 3, align=True), 0.5)["task"]
    parts = [objective(data.batch(i, 1, align=True), 0.5)["task"] for i in range(3)]
    assert float(whole) == pytest.approx(float(torch.stack(parts).mean()), rel=1e-6)


def deployed_loss(model, batch, policy):
    """Completion loss as inference has it: the prompt is prefilled and compressed, what follows reads what is left."""
    ids, mask, split = batch["input_ids"], batch["attention_mask"], int(batch["split"][0])
    cache, positions = KVCache(model, policy, prefill="dense", decode="keep"), positions_of(mask)
    model(ids[:, :split], attention_mask=mask[:, :split], position_ids=positions[:, :split], past_key_values=cache)
    logits = model(ids[:, split:], attention_mask=mask, position_ids=positions[:, split:], past_key_values=cache).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, split + 1 :], reduction="none")
    weights = batch["weights"][:, split:-1].to(losses)
    return float(((losses * weights).sum(1) / weights.sum(1)).mean())


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("mode", ["aware", "agnostic"])
def test_what_is_trained_is_what_is_deployed(family, file, lora, mode):
    model, batch = tuned(family, torch.float64, lora=lora, initial_logit=0.0), batch_of(file, 3, mode)
    with torch.no_grad():
        trained = float(objective_of(model)(batch, 0.5)["task"])
        model.eval()
        assert deployed_loss(model, batch, "gate") == pytest.approx(trained, rel=1e-5)  # the loss is summed in float32
        assert deployed_loss(model, batch, "full") != pytest.approx(trained, rel=1e-3)


def test_lora_learns_through_the_prompt_and_the_teacher_is_tuned(file):
    """A dense prompt that came from the teacher's cache would leave the prompt's keys and values without a gradient."""
    model, batch = tuned(), batch_of(file, 2)
    first = next(p for n, p in model.named_parameters() if "layers.0" in n and "k_proj.lora_B" in n)
    objective_of(model)(batch, 0.5)["loss"].backward()
    split = int(batch["split"][0])
    behind = first.grad.clone()
    model.zero_grad()
    objective = objective_of(model)
    objective.below_learns = False
    objective(batch, 0.5)["loss"].backward()
    assert not torch.allclose(first.grad, behind) and split > 1
    model.zero_grad()
    wide = tuned(window=200)  # nothing is evicted: the student is its own teacher
    with torch.no_grad():
        plain = objective_of(wide)(batch, 1.0)["task"]
        assert float(objective_of(wide, kl_weight=5.0)(batch, 1.0)["task"]) == pytest.approx(float(plain), rel=1e-4)
        assert float(objective_of(model, kl_weight=5.0)(batch, 1.0)["task"]) > float(
            objective_of(model)(batch, 1.0)["task"]
        )


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs" / "sft").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_committed_config_can_be_read(path):
    config, written = load_config(["--config", str(path)], SFTConfig), yaml.safe_load(path.read_text())
    assert config.output_dir == f"checkpoints/sft/{path.stem}"
    assert all(config.options()[name] == value for name, value in written.items())
    assert type(config)(**config.options()) == config


@pytest.mark.parametrize("options,match", [
    ({"gate": "none", "lora_rank": 0}, "nothing to train"), ({"mode": "blind"}, "unknown mode"), ({"lora_rank": -1}, "lora_rank"),
    ({"gate": "attention", "context": "prompt"}, "prefill='sparse'"), ({"too_long": "cut"}, "unknown too_long"),
    ({"gradient_checkpointing": True, "lora_rank": 0}, "prefill='sparse'"),
    ({"gate": "none", "adapter": "somewhere"}, "leave one of them out"),
])  # fmt: skip
def test_impossible_options_are_errors(options, match):
    with pytest.raises(ValueError, match=match):
        SFTConfig(**options)
    with pytest.raises(TypeError, match="Did you mean 'lora_rank'"):
        SFTConfig(**{"lora_rnk": 4})


@pytest.mark.parametrize("own", [[], ["--gate", "none"], ["--lora_rank", "0", "--mode", "agnostic"]])
def test_the_recipe_writes_one_folder_that_loads(file, tmp_path, own):
    tiny(dtype=torch.float32).save_pretrained(tmp_path / "base")
    letters().save_pretrained(tmp_path / "base")
    argv = [
        "--model",
        str(tmp_path / "base"),
        "--data",
        str(file),
        "--dtype",
        "float32",
        "--max_steps",
        "2",
        "--hidden",
        "8",
    ]
    sft.main([*argv, "--output_dir", str(tmp_path / "out"), *own])
    model = PeftModel.from_pretrained(tiny(dtype=torch.float32), tmp_path / "out")
    config = model.peft_config["default"]
    assert (config.lora is None) == ("--lora_rank" in own) and (config.gate == "none") == ("none" in own)
    assert (config.calibration is None) == ("none" in own)
    assert len(json.loads((tmp_path / "out" / "training.json").read_text())["steps"]) == 2


def test_halves_keep_groups_together_and_are_the_same_each_time():
    pairs = [(f"page {i % 25}", {"n": i, "page": i % 25}) for i in range(200)]
    found = build_sft.halves(iter(pairs))
    assert found == build_sft.halves(iter(pairs)) and len(found["train"]) + len(found["heldout"]) == 200
    assert not {e["page"] for e in found["train"]} & {e["page"] for e in found["heldout"]}
    assert 0.2 <= len(found["heldout"]) / 200 < 0.3


def test_tasks_are_cut_into_context_and_question():
    told = "Ann ran home. She was tired. What will Ann do? "
    task = {"examples": [{"input": told, "target_scores": {"Sleep": 1, "Fly": 0}}]}
    ((_, example),) = build_sft.social_iqa(task)
    assert example == {
        "context": "Ann ran home. She was tired.",
        "question": "What will Ann do?",
        "choices": ["Sleep", "Fly"],
        "answer": 0,
    }
    task = {
        "examples": [
            {"input": "Sentence 1: A b.\n c. \nSentence 2: D.\n\nThe answer is: ", "target_scores": {"x": 0, "y": 1}}
        ]
    }
    ((group, example),) = build_sft.presuppositions(task)
    assert group == "A b.\n c." and example["question"].startswith("Sentence 2: D.\n") and example["answer"] == 1
    assert (
        len(list(build_sft.owners())) == 400
        and list(build_sft.owners())[7]["answer"] in list(build_sft.owners())[7]["choices"]
    )


@pytest.mark.parametrize("name,text,answer,question,fewest", [
    ("family", "Ann is married to Bob. They have a child called Cid.\n\nWhat is Bob to Cid?", "father",
     "What is Bob to Cid?", 4),
    ("haystack", "Ann likes red. Bob hates red. Cid sees red. Di is red. Ed was red. \nWho likes red?", "Ann",
     "Who likes red?", 4),
    ("syllogism", "Consider:\n1. All are.\n\nDoes it follow that:\nNone are?\n(Answer Yes or No)", "No",
     "Does it follow that:\nNone are?\n(Answer Yes or No)", 2),
])  # fmt: skip
def test_generated_questions_have_choices_among_which_the_truth_stands_anywhere(
    monkeypatch, name, text, answer, question, fewest
):
    made = SimpleNamespace(create_dataset=lambda *a, **k: [{"question": text, "answer": answer}] * 40)
    monkeypatch.setitem(sys.modules, "reasoning_gym", made)
    examples = [example for _, example in build_sft.generated(name)]
    for e in examples:
        assert text.startswith(e["context"]) and e["question"] == question
        assert e["choices"][e["answer"]] == answer and len(set(e["choices"])) == fewest
    assert examples == [example for _, example in build_sft.generated(name)]
