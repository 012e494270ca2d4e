"""kill -9 at any moment: what is on disk is whole, and resuming ends where the uninterrupted run ends, bit for bit."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch._dynamo  # the optimizer would import it, in every process again
from test_survival import run

from gatekv.training import rotation

pytestmark = pytest.mark.xdist_group("kill")  # one uninterrupted run, one server
KILLS = 20  # four of them in `make test`
# Processes are forked from one that has imported this file and has done nothing: one that has trained has threads,
# whose locks a fork would copy as they stand.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])
HERE = Path(__file__).parent
PATHS = os.pathsep.join(map(str, (HERE, HERE.parent, HERE.parents[1])))


@pytest.fixture(scope="module", autouse=True)
def server():
    with pytest.MonkeyPatch.context() as patch:  # it takes over no path of ours, and keeps quiet if it cannot import
        patch.setenv("PYTHONPATH", PATHS)
        forkserver.ensure_running()


def begin(work, *arguments) -> multiprocessing.Process:
    process = SERVER.Process(target=work, args=arguments)
    process.start()
    return process


def code_of(process) -> int:
    process.join(240)
    return process.exitcode


def go(folder: Path) -> None:
    run(folder, save_every=1, resume="auto")


def go_until(folder: Path, count: int) -> None:
    dies_at(folder, count)
    go(folder)


def dies_at(folder: Path, count: int) -> None:
    """Makes this process die just before the count-th thing it does to a file in the folder."""
    left = [count]

    def hook(event, arguments):
        if event.split(".")[0] in ("open", "os", "shutil") and str(folder) in str(arguments):
            left[0] -= 1
            if not left[0]:
                os._exit(9)

    sys.addaudithook(hook)


def three_writes(folder: Path, log: Path, count: int) -> None:
    """Three saves, the number of which is in `log`; dies before its count-th file operation."""
    dies_at(folder, count)
    for step in (1, 2, 3):
        rotation.write(folder, step, {"a": torch.full((3,), float(step))}, {"n": step}, keep=1)
        log.write_text(str(step))


def result(folder: Path) -> dict[str, torch.Tensor]:
    assert rotation.steps(folder)[-1] == 6
    return rotation.read(folder / "checkpoint-6")[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(tensors of the last checkpoint, seconds from its first checkpoint) of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    process = begin(go, folder)
    while not rotation.steps(folder):
        time.sleep(0.001)
    start = time.monotonic()
    assert code_of(process) == 0
    return result(folder), time.monotonic() - start


def check(folder: Path, wanted: dict) -> None:
    """All checkpoints are whole, and going on from them gives what is wanted."""
    for step in rotation.steps(folder):
        rotation.read(folder / f"checkpoint-{step}")
    assert code_of(begin(go, folder)) == 0
    got = result(folder)
    assert got.keys() == wanted.keys() and all(torch.equal(got[k], wanted[k]) for k in wanted)


def killed_somewhere(folder: Path, seconds: float, rng: random.Random) -> None:
    """Kill a run between its first save and its end; where it was too quick, again from the same state, and sooner."""
    before = folder.with_name("before")
    shutil.rmtree(before, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    shutil.copytree(folder, before)
    held = rotation.steps(folder)
    while 6 not in held:  # else the kill before came between the last save and the exit
        process = begin(go, folder)
        while rotation.steps(folder) == held and process.is_alive():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, seconds))
        process.kill()
        if code_of(process) == -signal.SIGKILL:
            return
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        seconds /= 2


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(i, marks=pytest.mark.exhaustive) for i in range(2, KILLS // 2))])
def test_killed_twice_at_random_moments(tmp_path, whole, seed):
    for i in range(2):
        killed_somewhere(tmp_path / "run", whole[1] / 2, random.Random(f"{seed}/{i}"))
    check(tmp_path / "run", whole[0])


def test_whatever_a_save_was_about_to_do_the_checkpoints_are_whole(tmp_path):
    """Every file operation of three saves in turn; also over a damaged checkpoint of the same step."""
    for count in range(1, 1000):
        folder, log = tmp_path / f"{count}" / "run", tmp_path / f"{count}.log"
        (folder / "checkpoint-3").mkdir(parents=True)  # damaged: passed over when resuming, replaced by the third save
        (folder / "checkpoint-3" / rotation.TENSORS).write_bytes(b"half")
        code = code_of(begin(three_writes, folder, log, count))
        done = int(log.read_text()) if log.exists() else 0
        whole = []
        for step in rotation.steps(folder):
            try:
                tensors, state = rotation.read(folder / f"checkpoint-{step}")
            except ValueError:
                assert step == 3 and not done, "only the one that was damaged before"
                continue
            assert state["n"] == step and torch.equal(tensors["a"], torch.full((3,), float(step)))
            whole.append(step)
        assert not done or whole and whole[-1] >= done, f"at operation {count} checkpoint {done} was lost"
        if code == 0:
            break
        assert code == 9
        rotation.write(folder, 4, {"a": torch.ones(1)}, {}, keep=1)
        assert [p.name for p in folder.iterdir()] == ["checkpoint-4"], "what a crash left behind is cleared away"
    assert code == 0 and count > 30


@pytest.mark.parametrize("count", [11, 47, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (3, 29))])
def test_killed_between_the_file_operations_of_a_run(tmp_path, whole, count):
    assert code_of(begin(go_until, tmp_path, count)) == 9
    check(tmp_path, whole[0])


@pytest.mark.exhaustive
def test_kill_9_of_a_real_process(tmp_path, whole):
    """The same with processes that are forked from nothing."""
    program = "import sys, pathlib, test_kill; test_kill.go(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(tmp_path)]
    for step in (1, 4):
        with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": PATHS}, stderr=subprocess.DEVNULL) as child:
            while step not in rotation.steps(tmp_path) and child.poll() is None:
                time.sleep(0.001)
            child.kill()
        assert child.returncode == -signal.SIGKILL
    check(tmp_path, whole[0])
