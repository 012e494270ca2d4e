"""Options, rows and facts: precedence, determinism, held-out words and wordings, errors with the cure."""

import dataclasses
import json
import random
import typing
from pathlib import Path

import pytest
import yaml

from gatekv import facts
from gatekv.presets import PRESETS, preset
from gatekv.training.config import CPTConfig
from gatekv.training.data import TrainingData, check_length, read_source
from gatekv.training.less_config import LessConfig
from gatekv.training.options import GATE_OPTIONS, RunConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes" / "configs"


class Letters:
    """A tokenizer whose tokens are characters."""

    chat_template = "<|im_start|>"

    def __call__(self, text, add_special_tokens=False):
        return type("Encoding", (), {"input_ids": [ord(c) % 90 + 1 for c in text]})()

    def decode(self, ids):
        return ids


TEXT = "The ship sailed on. The crew slept below deck and dreamt of land. " * 400


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def data(path, **changes):
    options = dict(retrieval_share=0.5, answer_weight=20.0, seed=0)
    return TrainingData(Letters(), [path], 900, **{**options, **changes})


def test_precedence_preset_file_command_line(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("preset: attention-gate\nwindow: 7\nmax_steps: 3\n")
    config = load_config(["--config", str(file), "--max_steps", "5", "--data=a.txt,b.txt", "--resume"], CPTConfig)
    assert (config.spec.relaxation, config.objective) == ("ste", "lm"), "from the preset"
    assert (
        config.spec.window == 7
        and config.max_steps == 5
        and config.data == ["a.txt", "b.txt"]
        and config.resume == "auto"
    )


@pytest.mark.parametrize("argv,match", [
    (["--max_step", "3"], "Did you mean 'max_steps'"), (["--max_steps", "x"], "invalid int value: 'x'"), (["max_steps"], "--key value"),
    (["--max_steps"], "expected one argument"), (["--config", "nowhere.yaml"], "no such file"), (["--preset", "papr"], "Known: "),
    (["--max_steps", "0"], "at least 1"), (["--target_keep", "0"], "above 0"), (["--gate", "mpl"], "Did you mean 'mlp'"),
    (["--objective", "kll"], "Known: kl, reverse_kl, lm"), (["--window", "-1"], "cannot be negative"), (["--dtype", "int8"], "dtype"),
])  # fmt: skip
def test_bad_options_are_one_line_errors(argv, match):
    with pytest.raises((TypeError, ValueError), match=match) as error:
        load_config(argv, CPTConfig)
    assert "\n" not in str(error.value)


def test_unknown_key_in_a_file_names_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("learning_rat: 1\n")
    with pytest.raises(TypeError, match="c.yaml.*Did you mean 'learning_rate'"):
        load_config(["--config", str(file)], CPTConfig)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_committed_config_can_be_read(path):
    config = load_config(["--config", str(path)], CPTConfig)
    written = yaml.safe_load(path.read_text())
    kinds = typing.get_type_hints(CPTConfig)
    for name, kind in (
        (f.name, kinds[f.name]) for f in dataclasses.fields(CPTConfig)
    ):  # YAML reads 1e-3 as text, and a lone name is no list
        assert isinstance(getattr(config, name), typing.get_origin(kind) or kind), name
        assert name not in written or getattr(config, name) == written[name]
    assert config.output_dir.endswith(path.stem), "configs do not write over each other"
    if config.model:
        command = path.read_text().splitlines()[0].removeprefix("# ").split()
        assert command[:2] == ["accelerate", "launch"] and command[-1] == f"recipes/configs/{path.name}"
        assert all((ROOT / part).is_file() for part in command if "/" in part), "the command names real files"


def test_presets_are_valid_configs():
    for name in PRESETS:
        CPTConfig(**preset(name) | {"preset": name})
    with pytest.raises(ValueError, match="Known: attention-gate, dms"):
        preset("attention_gates")
    assert preset("attention-gate")["objective"] == "lm" and preset("attention-gate")["scope"] == "layer"


def test_options_stay_few():
    shared, cpt, less = ({f.name for f in dataclasses.fields(c)} for c in (RunConfig, CPTConfig, LessConfig))
    assert len(shared) <= 30 and len(cpt - shared - GATE_OPTIONS) <= 30 and len(less - shared) <= 30
    assert len(less) <= 36, "a recipe has few options of its own"
    assert len(cpt - GATE_OPTIONS) <= 39


def test_rows_are_a_pure_function_of_seed_and_index(text_file):
    a, b = data(text_file), data(text_file)
    assert a[7] == b[7] and a[7] != a[8] and a[7] != data(text_file, seed=1)[7]
    assert all(len(a[i].ids) <= 900 and len(a[i].ids) == len(a[i].weights) for i in range(30))
    assert all(a[i].weights[-1] == 0 for i in range(10)), "the last token predicts nothing"


def test_answers_weigh_more_and_plain_rows_are_full(text_file):
    rows = data(text_file, retrieval_share=1.0)
    for i in range(10):
        heavy = sum(w == 20.0 for w in rows[i].weights)
        assert heavy and heavy % 6 == 0, "a space and five digits an answer"
    row = data(text_file, retrieval_share=0.0)[0]
    assert len(row.ids) == 900 and set(row.weights) == {0.0, 1.0}


def test_batches_are_right_padded(text_file):
    batch = data(text_file).batch(0, 4)
    lengths = batch["attention_mask"].sum(-1)
    for r in range(4):
        assert (batch["attention_mask"][r, : lengths[r]] == 1).all() and (
            batch["weights"][r, lengths[r] - 1 :] == 0
        ).all()


def test_sources(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"line {i}"}) for i in range(3)))
    assert read_source(str(tmp_path / "a.jsonl")) == "line 0\n\nline 1\n\nline 2"
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", "y"]}), tmp_path / "b.parquet")
    assert read_source(str(tmp_path / "b.parquet")) == "x\n\ny"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/c.txt").write_text("z")
    assert read_source(str(tmp_path / "folder")) == "z"


def test_data_errors(tmp_path, unreachable):
    (tmp_path / "empty.txt").write_text("  \n")
    with pytest.raises(ValueError, match="holds no text"):
        read_source(str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match="is not a file"):
        read_source(str(tmp_path / "missing.txt"))
    with pytest.raises(ValueError, match="neither a file nor a data set"):
        read_source("no-such-data-set-anywhere")
    with pytest.raises(ValueError, match="leaves no room"):
        TrainingData(Letters(), [], 10, retrieval_share=0, answer_weight=1, seed=0)
    from transformers import LlamaConfig

    with pytest.raises(ValueError, match="exceeds the model's 128 positions"):
        check_length(500, LlamaConfig(max_position_embeddings=128))


def test_words_and_wordings_are_held_out():
    assert not set(facts.WORDS["train"]) & set(facts.WORDS["heldout"])
    assert not {w[0] for w in facts.WORDINGS["train"]} & {w[0] for w in facts.WORDINGS["heldout"]}
    for split in ("train", "heldout"):
        assert len(set(facts.WORDS[split])) == len(facts.WORDS[split])


def test_samples_hold_their_facts_and_ask_for_them():
    rng = random.Random(0)
    for split in ("train", "heldout"):
        for _ in range(30):
            sample = facts.make_sample(TEXT, rng, facts=4, characters=1500, split=split, frame=facts.CHAT, questions=2)
            assert len(sample.questions) == 2 and sample.context.startswith(facts.CHAT[0])
            for q in sample.questions:
                assert q.answer.strip() in sample.context and q.answer.strip() not in q.query
                assert q.answer.startswith(" ") and len(q.answer) == 6
                assert facts.CHAT[1] in q.query


def test_a_recital_asks_for_the_rows_own_words(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(" ".join(f"word{i}" for i in range(4000)))

    class Words:
        chat_template = "<|im_start|>"
        known = {}

        def __call__(self, text, add_special_tokens=False):
            ids = [self.known.setdefault(w, len(self.known)) for w in text.split(" ") if w]
            return type("Encoding", (), {"input_ids": ids})()

        def decode(self, ids):
            names = {i: w for w, i in self.known.items()}
            return " ".join(names[i] for i in ids)

    data = TrainingData(Words(), [str(file)], 400, retrieval_share=0.0, answer_weight=20.0, seed=0, recite_share=1.0)
    for index in range(8):
        row = data[index]
        assert len(row.ids) == len(row.weights) <= 400 and row.split < 280 and row == data[index]
        context = set(row.ids[: row.split])
        asked = [row.ids[t + 1] for t in range(row.split, len(row.ids) - 1) if row.weights[t]]
        assert len(asked) >= 32 and context.issuperset(asked), "what is asked for stood in the context"
        assert not any(row.weights[row.split - 1 : row.split + 5]), "the question itself is not"


def test_training_and_held_out_wordings_share_no_content():
    from gatekv.facts import WORDINGS, WORDS

    held = " ".join(" ".join(w) for w in WORDINGS["heldout"]).lower()
    train = " ".join(" ".join(w) for w in WORDINGS["train"]).lower()
    for word in ("secret", "key", "magic", "special", "costs", "cost", "coins", "exactly"):
        assert word in held and word not in train.split()
    assert not set(WORDS["train"]) & set(WORDS["heldout"])
    assert len(WORDINGS["train"]) == len(set(WORDINGS["train"]))
    for fact, question, lead in WORDINGS["train"] + WORDINGS["heldout"]:
        sentence = fact.format(w="lamp", W="Lamp", n="12345")
        assert "12345" in sentence and "{" not in sentence + question.format(w="lamp", W="Lamp") + lead.format(
            w="", W=""
        )
