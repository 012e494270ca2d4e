"""The README's commands on the real model, shortened: train, reload, generate, evaluate, resume, benchmark, errors."""

import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.xdist_group("real model")  # trained once


DTYPE = ["--dtype", "float32", "--threads", "1"]
SHORT = [*DTYPE, "--max_steps", "2", "--sequence_length", "64"]


def run(script: str, *options: str, expect: int = 0) -> str:
    """What a recipe prints, run in this process as its own would run it: importing takes longer than most of them."""
    said, code = io.StringIO(), 0
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [script, *options])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        finally:
            transformers.logging.set_verbosity_warning()
    assert code == expect, f"{script} {options}\n{said.getvalue()[-5000:]}"
    return said.getvalue()


def start(*command: str, expect: int = 0) -> str:
    """The same in a process of its own, with as many threads: another number rounds otherwise."""
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": threads}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == expect, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture
def adapter(trained):
    return trained


def test_training_writes_an_adapter_and_nothing_of_the_base(adapter):
    names = {p.name for p in adapter.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "training.json", "checkpoint-2"} <= names
    assert (adapter / "adapter_model.safetensors").stat().st_size < 12e6
    log = json.loads((adapter / "training.json").read_text())
    assert len(log["steps"]) == 2 and {"soft", "hard", "soft_hard_gap"} <= set(log["soft_hard"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["calibration"]["ratios"][0] == 1.0 and config["weights_sha256"]


def test_generate_prints_text_kept_share_and_bytes(adapter):
    shared = [*DTYPE, "--max_new_tokens", "4"]
    out = run("recipes/generate.py", "--adapter", str(adapter), "--budget", ".25", *shared)
    ratio = float(re.search(r"after prefill: .* ratio ([\d.]+)", out)[1])
    assert 0.2 < ratio < 0.27 and "generated:" in out and "kept" in out
    assert "expected" in run("recipes/generate.py", "--policy", "snapkv", "--budget", ".5", *shared)
    short = run("recipes/generate.py", "--policy", "random", "--budget", ".05", "--prompt", "short", *shared)
    assert "1 rows too short for the budget held whole" in short


def test_evaluate_writes_results_picture_and_card(adapter):
    options = [*DTYPE, "--n", "1", "--n_ppl", "1", "--tokens", "320", "--budgets", ".25"]
    options += ["--policies", "gate+global,gate,snapkv+ada,untrained+global"]
    out = run("recipes/evaluate.py", "--adapter", str(adapter), *options)
    results = json.loads((adapter / "results.json").read_text())
    assert {r["task"] for r in results["rows"]} == {"niah_multikey", "ppl"} and results["run"]["versions"]["torch"]
    assert (adapter / "frontier.png").stat().st_size > 10_000 and "snapkv+ada" in out
    assert "Measured" in (adapter / "README.md").read_text()


def test_real_model_keeps_the_law_in_float32(adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import gatekv
    from gatekv.fetch import fetch

    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(fetch(), dtype=torch.float32).eval()
    ids, mask = torch.randint(3, 49152, (2, 100)), torch.ones(2, 100, dtype=torch.long)
    mask[1, :25] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=2)
    with torch.no_grad():
        wanted = plain.generate(ids, **options)
        model = PeftModel.from_pretrained(plain, adapter)
        got = model.generate(input_ids=ids, past_key_values=gatekv.KVCache(model, "gate+global", 1.0), **options)
        assert torch.equal(got, wanted)
        level = torch.cat([w for w in _logits(model, ids, mask)]).median().item()
        with gatekv.parallel(model, threshold=level):
            parallel = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for w in gatekv.modules.wrappers(model):
            w.specs["default"].threshold = float(torch.sigmoid(torch.tensor(level, dtype=torch.float64)))
        cache = gatekv.KVCache(model, "gate")
        pieces = [
            model(ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], past_key_values=cache).logits
            for a, b in ((0, 57), (57, 58), (58, 100))
        ]
    recurrent = torch.cat(pieces, 1)
    agree = ((parallel - recurrent)[mask.bool()].abs().max() / parallel.abs().max()).item()
    assert agree < 1e-4 and cache.memory()["ratio"] < 0.9


def _logits(model, ids, mask):
    import gatekv

    with gatekv.parallel(model, threshold=-1e9) as layers:
        model(ids, attention_mask=mask, use_cache=False)
        return [w.recorded.logits.flatten() for w in layers]


def test_resume_continues(adapter):
    shutil.rmtree(adapter / "checkpoint-2")
    options = [*SHORT, "--output_dir", str(adapter), "--resume"]
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    run("recipes/cpt.py", *options)
    assert [s["step"] for s in json.loads((adapter / "training.json").read_text())["steps"]] == [0, 1]
    assert (adapter / "adapter_model.safetensors").read_bytes() == weights, "bit for bit"
    assert "learning_rate=0.001, but" in run("recipes/cpt.py", *options, "--learning_rate", "1e-3", expect=1)


@pytest.mark.exhaustive
def test_sigterm_saves_and_exits_with_75(tmp_path):
    options = [*SHORT, "--max_steps", "50", "--save_every", "1", "--output_dir", str(tmp_path)]
    command = [sys.executable, "recipes/cpt.py", *options]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        while not list(tmp_path.glob("checkpoint-1")) and process.poll() is None:
            time.sleep(0.1)
        process.terminate()
        text = process.communicate(timeout=300)[1]
    assert process.returncode == 75 and "is saved: the same command with --resume goes on" in text


@pytest.mark.parametrize("recipe", ["cpt", "less"])
def test_dry_run_says_what_is_to_come(recipe, tmp_path):
    out = run(f"recipes/{recipe}.py", "--dry_run", "zero2:4", "--output_dir", str(tmp_path / "out"))
    assert "zero2, 4 processes" in out and "MB each process" in out and not (tmp_path / "out").exists()


@pytest.mark.exhaustive
def test_low_rank_maps_train_beside_a_gate_resume_and_are_evaluated(adapter, tmp_path):
    options = [*SHORT, "--sequence_length", "320", "--target_keep", ".25", "--policy", "gate+global"]
    options += ["--output_dir", str(tmp_path), "--adapter", str(adapter)]
    run("recipes/less.py", "--save_every", "1", *options)
    weights = (tmp_path / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "checkpoint-2")
    run("recipes/less.py", "--resume", *options)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == weights, "dropout too resumes bit for bit"
    log = json.loads((tmp_path / "training.json").read_text())
    assert [s["step"] for s in log["steps"]] == [0, 1] and {"error", "alone", "closed"} <= set(log["soft_hard"])
    run("recipes/evaluate.py", "--adapter", str(tmp_path), *DTYPE, "--n", "1", "--n_ppl", "1", "--budgets", ".25", "--policies",
        "gate+global,gate+global+less,snapkv+less", "--tasks", "ppl,recall")  # fmt: skip
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    ratios = {r["policy"]: r["bytes_ratio"] for r in rows if r["task"] == "ppl"}
    assert ratios["gate+global+less"] == pytest.approx(ratios["gate+global"], abs=0.01)


@pytest.mark.exhaustive
def test_report_is_one_page(adapter, tmp_path):
    run(
        "recipes/report.py",
        "--adapter",
        str(adapter),
        *DTYPE,
        "--policies",
        "gate+global,snapkv",
        "--out",
        str(tmp_path),
    )
    page = (tmp_path / "report.html").read_text()
    assert "gate+global" in page and "https://" not in page.replace("https://www.w3.org", "")


@pytest.mark.exhaustive
@pytest.mark.parametrize("what", ["decode", "cache", "train"])
def test_benchmark_ends_in_json(what):
    out = run("recipes/benchmark.py", what, "--quick", *DTYPE)
    last = json.loads(next(line for line in reversed(out.splitlines()) if line.startswith("{")))
    assert {"context", "batch", "keep", "bytes_ratio", "time_vs_full", "time_vs_limit"} <= set(last["rows"][0])
    if what == "decode":
        assert all(r["bytes_ratio"] <= r["keep"] + 0.03 for r in last["rows"])


@pytest.mark.parametrize("command,match", [
    (["recipes/cpt.py", "--max_step", "3"], "Did you mean 'max_steps'"),
    (["recipes/cpt.py", "--sequence_length", "9000"], "exceeds the model's 8192 positions"),
    (["recipes/cpt.py", "--data", "nowhere.txt"], "is not a file"),
    (["recipes/evaluate.py", "--policies", "snapvk"], "Did you mean 'snapkv'"),
    (["recipes/evaluate.py", "--tasks", "niah"], "Known: ppl"),
    (["recipes/evaluate.py", "--adapter", "nowhere"], "error"),
    (["recipes/less.py", "--policy", "gate+global"], "name a trained one's adapter with --adapter"),
    (["recipes/generate.py", "--policy", "random", "--budget", "0", "--prompt", "short"], "above 0"),
])  # fmt: skip
def test_bad_input_is_one_line_and_a_failing_exit(command, match, tmp_path):
    extra = ["--output_dir", str(tmp_path / "out")] if "cpt" in command[0] or "less" in command[0] else []
    out = run(*command, *extra, expect=1)
    assert match in out and "Traceback" not in out
    assert not (tmp_path / "out").exists(), "nothing half-written"


def test_so_it_is_in_a_process_of_its_own():
    out = start("recipes/cpt.py", "--max_step", "3", expect=1)
    assert "Did you mean 'max_steps'" in out and "Traceback" not in out
