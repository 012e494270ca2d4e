"""recipes/validate.py says, without a model's weights, what the caches of that model then hold or refuse."""

import pytest
import torch
import zoo
from conftest import gated, padded_batch, tiny
from transformers import AutoConfig, AutoModelForCausalLM

import gatekv
from gatekv.recipes import validate


@pytest.fixture
def folders(tmp_path):
    """(config of a base and nothing else, adapter for it, the gated model itself)."""
    base = tiny(dtype=torch.float32, head_dim=32)
    base.save_pretrained(tmp_path / "base")
    model = gated(model=AutoModelForCausalLM.from_pretrained(tmp_path / "base"), dtype=torch.float32, window=8, sinks=2)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base" / "model.safetensors").unlink()
    return str(tmp_path / "base"), str(tmp_path / "adapter"), model


def asked(folders, *more):
    base, adapter, _ = folders
    options = [
        "--model",
        base,
        "--adapter",
        adapter,
        "--dtype",
        "float32",
        "--prompt_tokens",
        "200",
        "--new_tokens",
        "9",
    ]
    return validate.main([*options, *more])


@torch.no_grad()
def held(model, policy, budget, length, new=0):
    cache = gatekv.KVCache(model, policy, budget, strict=True)
    ids, _ = padded_batch([length + new])
    for a, b in [(0, length), *((i, i + 1) for i in range(length, length + new))]:
        model(ids[:, a:b], past_key_values=cache)
    return cache.memory()


SHAPES = {
    "qwen3_5_text": "1 layers evict, 3 keep a state",
    "gemma4": "1 layers evict, 5 have a sliding window",
    "gemma4_text": "1 layers evict, 4 have a sliding window, 4 keep nothing, 1 read an evicting layer's keys",
    "gpt_oss": "2 layers evict, 2 have a sliding window",
    "deepseek_v3": "4 layers evict",
}


@pytest.mark.parametrize("kind", list(SHAPES))
def test_models_with_layers_of_other_kinds(kind, tmp_path, capsys):
    model = zoo.build(kind)
    model.config.save_pretrained(tmp_path)
    options = ["--model", str(tmp_path), "--dtype", "float32", "--prompt_tokens", "200", "--new_tokens", "9"]
    rows = validate.main([*options, "--policies", "snapkv,streaming_llm", "--budgets", ".5", "--window", "8"])
    assert all(row["refused"] is None for row in rows)
    for row in rows:
        for new, told in ((0, row["forecast"].bytes), (9, row["forecast"].bytes_end)):
            cache = gatekv.KVCache(model, row["policy"], row["budget"], window=8, strict=True)
            zoo.logits(model, zoo.inputs(model, (200 + new,)), [*range(200, 200 + new)], cache)
            assert told == pytest.approx(cache.memory()["bytes"], rel=0.01)
    assert f": {SHAPES[kind]}; float32" in capsys.readouterr().out


def test_what_it_prints_is_what_is_held(folders, capsys):
    rows = asked(folders, "--policies", "gate+uniform,snapkv,h2o,streaming_llm,think", "--budgets", ".5,.25")
    assert len(rows) == 10 and {row["refused"] for row in rows} == {None}
    for row in rows:
        found = row["forecast"]
        for new, ratio in ((0, found.ratio), (9, found.ratio_end)):
            real = held(folders[2], row["policy"], row["budget"], 200, new)["ratio"]
            assert ratio == pytest.approx(real, rel=0.01) or (found.at_most_end and new and ratio >= real)
    out = capsys.readouterr().out
    assert "llama: 2 layers evict; float32" in out and "new tokens are judged too" in out
    line = next(line for line in out.splitlines() if line.startswith("snapkv") and "0.2500" in line)
    assert f"{rows[3]['forecast'].ratio:.3f}" in line and " 50 " in line


@pytest.mark.parametrize("policy,budget,length", [
    ("snapkv", 0.25, 100), ("gate+global", 0.25, 20), ("l2", 0.5, 200), ("gate", 0.5, 200), ("snapkv+less", 0.5, 200),
    ("snapkv", None, 200), ("snapkv+threshold", 0.5, 200), ("snapkv+pyramid+global", 0.5, 200), ("gate+decay", 0.5, 200),
    ("snapkv", 1.5, 200), ("snapkv", 20, 200), ("gatte", 0.5, 200),
])  # fmt: skip
def test_it_refuses_in_the_words_of_the_run(policy, budget, length, folders, capsys):
    said = "none" if budget is None else str(budget)
    (row,) = asked(folders, "--policies", policy, "--budgets", said, "--prompt_tokens", str(length))
    with pytest.raises(ValueError) as real:
        held(folders[2], policy, budget, length)
    assert row["refused"] == str(real.value) and f"refused: {real.value}" in capsys.readouterr().out


def test_it_says_from_which_length_on_a_budget_can_be_kept(folders, capsys):
    (row,) = asked(folders, "--policies", "snapkv", "--budgets", ".25", "--prompt_tokens", "100")
    assert row["from"] == 128 and "from 128 tokens on it is not" in capsys.readouterr().out
    assert held(folders[2], "snapkv", 0.25, 128)["ratio"] < 0.4


def test_a_threshold_and_long_prompts_have_their_notes(folders, capsys):
    asked(folders, "--policies", "gate", "--budgets", "none", "--prompt_tokens", "600")
    out = capsys.readouterr().out
    assert "at most: a threshold decides" in out and "the model was made for 512 positions" in out


def test_what_is_not_served_is_said_first(folders, tmp_path, unreachable):
    base, adapter, _ = folders
    tiny(hidden_size=24).config.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="trained for a base with hidden_size=48, but this model has 24"):
        validate.main(["--model", str(tmp_path / "other"), "--adapter", adapter])
    AutoConfig.for_model("xglm", num_layers=2, d_model=48, attention_heads=6).save_pretrained(tmp_path / "xglm")
    with pytest.raises(ValueError, match="computes attention by itself"):
        validate.main(["--model", str(tmp_path / "xglm")])
    for options, match in (
        (["--model", "nowhere"], "config of model 'nowhere' cannot be read"), (["--adapter", base], "is no adapter"),
        (["--model", base, "--budgets", "half"], "'half' is no number"), (["--model", base, "--prompt_tokens", "0"], "count from 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            validate.main(options)
