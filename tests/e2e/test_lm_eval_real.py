"""lm-evaluation-harness on the real model: three offline tasks, the whole cache, a policy, the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval_tasks import write_tasks

import gatekv
from gatekv.evaluation.tasks import heldout_texts
from gatekv.integrations.lm_eval import GateKVLM

ROOT = Path(__file__).resolve().parents[2]
TASKS = ["choose", "predict", "write"]
pytestmark = [pytest.mark.exhaustive, pytest.mark.xdist_group("lm-eval")]


@pytest.fixture(scope="module")
def base():
    from gatekv.fetch import fetch

    return str(fetch())


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Real text whose beginning is told again: which of four words comes next, how likely it is, what the model writes."""
    text, documents = heldout_texts([])[0].split(), []
    for i, start in enumerate(range(2000, 4000, 500)):
        words = text[start : start + 120 + 20 * i]
        choices = [words[12], "whereupon", "sixteen of them", "Tuesday"]
        asked = {"context": " ".join([*words, *words[:12]]), "continuation": f" {words[12]}"}
        documents.append({**asked, "answer": i % 4, "choices": choices[-i % 4 :] + choices[: -i % 4]})
    return write_tasks(tmp_path_factory.mktemp("tasks"), documents)


def evaluated(lm, tasks, names=TASKS):
    return simple_evaluate(lm, tasks=names, task_manager=tasks, bootstrap_iters=0)


def test_the_whole_cache_gives_the_harness_own_numbers_to_the_last_digit(base, tasks):
    theirs = evaluated(HFLM(base, dtype="float32", device="cpu"), tasks)
    ours = evaluated(GateKVLM(base, dtype="float32", policy="full"), tasks)
    assert ours["results"] == theirs["results"] and ours["results"]["choose"]["acc,none"] > 0.5
    for name in TASKS:
        assert [s["resps"] for s in ours["samples"][name]] == [s["resps"] for s in theirs["samples"][name]]
    assert 1 <= ours["config"]["kv_ratio"] < 1.05


def test_bytes_are_those_of_the_cache_by_hand_and_less_is_worse(base, tasks):
    lm = GateKVLM(base, dtype="float32", policy="streaming_llm", budget=0.25)
    found, held, full = evaluated(lm, tasks, ["choose"]), 0, 0
    for sample in found["samples"]["choose"]:
        cache = gatekv.KVCache(lm.model, "streaming_llm", 0.25)
        with torch.no_grad():
            lm.model(torch.tensor([lm.tok_encode(sample["doc"]["context"])[:-1]]), past_key_values=cache)
        held, full = held + cache.memory()["bytes"], full + cache.memory()["full_bytes"]
    said = found["config"]
    assert said["kv_bytes_held"] == pytest.approx(held, rel=0.01) and said["kv_bytes_full"] == full
    assert 0.25 < said["kv_ratio"] < 0.32 and len(found["samples"]["choose"]) == 4


def test_the_command_line_writes_the_bytes_into_its_results(base, tasks, tmp_path):
    command = [sys.executable, "-m", "gatekv.integrations.lm_eval", "--model", "gatekv", "--tasks", "choose"]
    command += [
        "--model_args",
        f"pretrained={base},policy=snapkv,budget=.5,dtype=float32",
        "--output_path",
        str(tmp_path),
    ]
    command += ["--include_path", str(tasks.include_path), "--limit", "2"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = tmp_path.rglob("results_*.json")
    config = json.loads(path.read_text())["config"]
    assert config["kv_policy"] == "SnapKV x Uniform" and config["kv_prompts"] == 2 and 0.5 < config["kv_ratio"] < 0.6
