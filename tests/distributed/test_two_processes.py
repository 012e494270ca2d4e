"""Two processes on the CPU over gloo find what one finds, under every sharding that Accelerate offers.

One launch for each backend (worker.py), with the flags and launch files that users have; then its results are compared.
A launch does what the chosen tests ask for. `make test` runs CORE: every way to shard that differs in the forward pass,
each objective under one of them, accumulation, both sources of a resumed run, a checkpoint's shards, one recipe.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from backends import BACKENDS, SHARING, chosen_of, launch, save_base, to_run
from safetensors.torch import load_file

OF_THE_BASE = ("zero3", "fsdp2")  # what these shard is more than optimizer state: the forward passes differ too
JOBS = ["gate", "accumulated", "less"]
MORE_JOBS = ["behind", "local", "recomputed", "less_kl", "centroids", "joint", "bf16", "sft", "lora_bf16"]
OFFLOADED = "zero2_offload"  # optimizer state in host memory: ZeRO-2 otherwise, so that one job tells
WITH_MORE = [(b, j) for b in BACKENDS for j in JOBS if b not in (OFFLOADED, *SHARING)] + [(OFFLOADED, "gate")]
WITH_MORE += [(b, j) for b in OF_THE_BASE for j in MORE_JOBS]
WITH_MORE += [("ddp", "sft"), ("zero2", "lora")]
STOPPED = [(b, j) for b, j in WITH_MORE if j in ("gate", "less")] + [(b, "sft") for b in OF_THE_BASE]
RECIPES = [(b, recipe) for b in OF_THE_BASE for recipe in ("cpt", "less", "sft")]
LOSSES, RESUMED = "test_losses_and_weights_are_those_of_one_process", "test_resumed_is_uninterrupted"
FILLED = "test_a_checkpoint_holds_what_every_process_holds"
CORE = {("ddp", "accumulated"), ("ddp", "sft"), ("zero3", "gate"), ("fsdp2", "less")}
CORE_STOPPED, CORE_RECIPES = {("fsdp2", "less")}, {("zero3", "cpt")}
CORE_FILLED = {("ddp",), ("zero3",), ("fsdp2",)}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model and a task to learn."""
    folder = tmp_path_factory.mktemp("base")
    save_base(folder)
    lines = [{"prompt": f"the cat {i} is {'red ' * (i % 5)}", "completion": "yes no".split()[i % 2]} for i in range(20)]
    (folder / "task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def single(request, base, tmp_path_factory) -> Path:
    """What one process finds."""
    out = tmp_path_factory.mktemp("single")
    jobs = dict.fromkeys(job for test in (LOSSES, RESUMED) for _, job in to_run(request, test))
    stopped = dict.fromkeys(f"{job}:stop" for _, job in to_run(request, RESUMED))
    launch("worker.py", "single", base, out, *jobs, *stopped, *recipes(request))
    return out


def recipes(request, *backend: str) -> list[str]:
    """The task of worker.py that runs the wanted recipes (of a backend); less.py goes on from what sft.py made."""
    names = {recipe for b, recipe in to_run(request, "test_recipes") if b in backend or not backend}
    names |= {"sft"} if "less" in names else set()
    return ["recipes:" + ",".join(sorted(names))] if names else []


@pytest.fixture(scope="module")
def two(request, base, single, tmp_path_factory):
    """backend -> what two processes find; launched once."""
    found, failed = {}, set()

    def get(backend: str) -> Path:
        assert backend not in failed, "its launch failed: see the first test"
        if backend not in found:
            failed.add(backend)
            out = found[backend] = tmp_path_factory.mktemp(backend)
            tasks = [j for b, j in to_run(request, LOSSES) if b == backend]
            tasks += ["fill"] * ((backend,) in to_run(request, FILLED))
            for job in (j for b, j in to_run(request, RESUMED) if b == backend):
                shutil.copytree(single / f"{job}-stop", out / f"{job}-of-one")
                tasks += [f"{job}:stop", *(f"{job}:{out / job}-{source}" for source in ("stop", "of-one"))]
            tasks += ["held"] * (backend == "zero3")
            launch("worker.py", backend, base, out, *tasks, *recipes(request, backend))
            failed.remove(backend)
        return found[backend]

    return get


def compare(one: Path, other: Path, losses: float = 5e-6, weights: float = 1e-6) -> None:
    """Losses of all steps and the adapter's weights."""
    a, b = (json.loads((f / "result.json").read_text()) for f in (one, other))
    assert (a["world"], b["world"]) == (1, 2)
    assert len(set(b["losses"])) == 20, "each step moved something: else agreeing would mean little"
    assert b["losses"] == pytest.approx(a["losses"], abs=losses)
    assert b["probe"] == pytest.approx(a["probe"], abs=20 * losses, nan_ok=True)
    adapters_agree(one, other, weights)


def adapters_agree(one: Path, other: Path, weights: float = 1e-6) -> None:
    a, b = (load_file(f / "adapter_model.safetensors") for f in (one, other))
    assert a.keys() == b.keys() and len(a) >= 4
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=0, atol=weights, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend,job", chosen_of(WITH_MORE, CORE))
def test_losses_and_weights_are_those_of_one_process(backend, job, single, two):
    loose = {}
    if (backend, job) == ("zero3", "bf16"):  # its matrix product rounds bfloat16 in another order
        loose = dict(losses=5e-3, weights=5e-2)
    if job == "lora_bf16":  # what rounds in float32's last bit rounds in bfloat16's behind the next product
        loose = dict(losses=2e-2, weights=5e-2)
    compare(single / job, two(backend) / job, **loose)


@pytest.mark.parametrize("backend,job", chosen_of(STOPPED, CORE_STOPPED))
def test_resumed_is_uninterrupted(backend, job, single, two):
    """From the backend's own checkpoint, and from one that a single process wrote."""
    for source in ("stop", "of-one"):
        compare(single / job, two(backend) / f"{job}-resumed-{job}-{source}")


@pytest.mark.parametrize("backend", chosen_of([(b,) for b in BACKENDS if b not in SHARING], CORE_FILLED))
def test_a_checkpoint_holds_what_every_process_holds(backend, two):
    """worker.fill: every process writes its number, saves, zeroes, loads; the file has the numbers of both."""
    numbers = json.loads((two(backend) / "fill/result.json").read_text())
    assert len(numbers) == 3 * 5 * 2, "parameters and two moments of five tensors in two layers; never the base"
    seen = {
        kind: {n for k, found in numbers.items() if k.startswith(kind) for n in found} for kind in ("param", "adam")
    }
    assert seen["adam"] == ({1} if backend == "ddp" else {1, 2})
    assert seen["param"] == ({1, 2} if backend in OF_THE_BASE else {1})
    if backend in OF_THE_BASE:
        assert all(found == [1, 2] for found in numbers.values()), "each tensor is cut in two"


@pytest.mark.parametrize("backend,recipe", chosen_of(RECIPES, CORE_RECIPES))
def test_recipes(backend, recipe, single, two):
    """Calibration and the base's fingerprint too."""
    one, other = single / f"recipe-{recipe}", two(backend) / f"recipe-{recipe}"
    adapters_agree(one, other)
    a, b = (json.loads((f / "adapter_config.json").read_text()) for f in (one, other))
    assert a["base_fingerprint"] == b["base_fingerprint"] and a["base_fingerprint"]["weights"]
    assert b["weights_sha256"]
    if recipe != "less":
        for row, wanted in zip(b["calibration"]["table"], a["calibration"]["table"]):
            assert row == pytest.approx(wanted, abs=1e-4)
    found, wanted = (json.loads((f / "training.json").read_text())["soft_hard"] for f in (other, one))
    assert found == pytest.approx(wanted, abs=1e-5)


def test_zero3_loads_a_base_in_parts(two):
    for held, whole in json.loads((two("zero3") / "held.json").read_text()):
        assert whole / 2 <= held < 0.51 * whole
