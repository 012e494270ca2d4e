"""Two processes: a signal to one stops both with a checkpoint, a wrong number in one stops both, a dead one no hang."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gatekv.training import rotation

WORKER = str(Path(__file__).with_name("stopper.py"))


def start(folder: Path, factor: float = 1.0) -> list[subprocess.Popen]:
    """Both processes, without a launcher that would stop one when the other ends."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
              "ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": "2"}  # fmt: skip
    return [
        subprocess.Popen([sys.executable, WORKER, str(folder), str(factor)], stderr=subprocess.PIPE, text=True,
                         env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in (0, 1)
    ]  # fmt: skip


def under_way(folder: Path) -> None:
    """Wait until both are in the middle of training."""
    limit = time.monotonic() + 240
    while not all((folder / f"pid-{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < limit, "the two never got to step 2"
        time.sleep(0.05)


def end(processes: list[subprocess.Popen]) -> list[str]:
    """What each wrote to stderr; fails rather than waiting for ever."""
    try:
        return [p.communicate(timeout=240)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_stops_both_with_a_checkpoint(tmp_path, rank):
    processes = start(tmp_path)
    under_way(tmp_path)
    processes[rank].send_signal(signal.SIGTERM)
    texts = end(processes)
    assert [p.returncode for p in processes] == [75, 75], texts
    step = rotation.steps(tmp_path)[-1]
    assert all(f"stopped after step {step} of 1000" in text for text in texts)
    assert len(rotation.read(tmp_path / f"checkpoint-{step}")[1]["records"]) == step


def test_a_loss_that_is_no_number_in_one_stops_both_and_names_its_rows(tmp_path):
    processes = start(tmp_path, float("nan"))
    texts = end(processes)
    assert [p.returncode for p in processes] == [1, 1], texts
    for text in texts:
        assert "the loss is nan at step 3; worst: rows 7…7" in text and "checkpoint-3 is untouched" in text, text
    assert rotation.steps(tmp_path) == [3]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_process_ends_the_other_with_a_message(tmp_path, rank):
    processes = start(tmp_path)
    under_way(tmp_path)
    processes[rank].kill()
    start_of_end = time.monotonic()
    text = end(processes)[1 - rank]
    assert processes[1 - rank].returncode == 1, text
    assert time.monotonic() - start_of_end < 60
    assert "another process of this run is gone" in text and "--resume" in text, text
