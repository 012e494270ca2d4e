"""The ablation recipe: its folder parses, its table says what was measured, a failed run is named."""

import json

import pytest

from gatekv.recipes import ablation
from gatekv.training.config import CPTConfig
from gatekv.training.options import load_config

CONFIGS = sorted((ablation.HERE / "configs" / "ablation").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_recipe_parses_and_reads_as_many_tokens(path):
    config = load_config(["--config", str(path)], CPTConfig)
    assert config.sequence_length == 640 and config.batch_size * config.accumulation == 1
    assert 90 <= config.max_steps <= 140, "the rows, so the tokens, of one recipe are those of another"


def cell(policy, budget, task, score, kl=None):
    return {"policy": policy, "budget": budget, "task": task, "score": score, "kl": kl, "bytes_ratio": budget + 0.01}


def test_the_table():
    full = [cell("full", 1.0, "niah_multikey", 0.8), cell("full", 1.0, "ppl", 0.0, 0.0)]
    rows = [cell("gate_alone+global", 0.25, "niah_multikey", 0.75), cell("gate_alone+global", 0.25, "ppl", 0.01, 0.033)]
    free = [cell("l2", 0.25, "niah_multikey", 0.1), cell("l2", 0.25, "ppl", None)]
    results = [
        {"name": "baselines", "rows": full + free, "seconds": None},
        {"name": "default", "rows": full + rows, "seconds": 300.0},
    ]
    text = ablation.table(results, [0.25]).splitlines()
    assert text[2].startswith("| full cache | 0.80 | 0 |")
    assert text[3] == "| l2 | 0.100 | – | 0.260 |  |"
    assert text[4] == "| default | 0.750 | 0.033 | 0.260 | 5.0 min |"


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    calls = []

    def fake(script, options, log, threads):
        calls.append(script)
        if script == "cpt.py":
            (log.parent / "adapter_model.safetensors").touch()
            (log.parent / "adapter_config.json").write_text('{"relaxation": "ste"}')
            return
        rows = [cell("full", 1.0, "niah_multikey", 0.8), cell("gate_alone+global", 0.25, "niah_multikey", 0.7)]
        rows.append(cell("gate_alone+global", 0.25, "ppl", 0.1, 0.2))
        folder = next(b for a, b in zip(options, options[1:]) if a == "--out")
        open(f"{folder}/results.json", "w").write(json.dumps({"rows": rows}))

    options = ["--only", "default", "--work", str(tmp_path), "--budgets", ".25"]
    monkeypatch.setattr(ablation, "call", fake)
    ablation.main(options)
    assert sorted(calls) == ["cpt.py", "evaluate.py", "evaluate.py"]
    assert "| default | 0.700 | 0.200 |" in (tmp_path / "table.md").read_text()
    ablation.main(options)
    assert len(calls) == 3
    with pytest.raises(ValueError, match="Did you mean 'default'"):
        ablation.main(["--only", "defualt", "--work", str(tmp_path)])


@pytest.mark.exhaustive
def test_a_process_that_fails_is_named_with_its_log(tmp_path):
    with pytest.raises(ValueError, match="cpt.py failed on train"):
        ablation.call("cpt.py", ["--nonsense", "1"], tmp_path / "train.log", 1)
    assert "nonsense" in (tmp_path / "train.log").read_text()
