"""Device, dtype and threads are asked of the machine, and what a user asks for is checked."""

import pytest
import torch

from gatekv import hardware
from gatekv.hardware import choose, fast_bfloat16, use_cores

CPU = torch.device("cpu")


def capabilities(monkeypatch, **flags):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)


@pytest.mark.parametrize("flags,fast", [
    ({"architecture": "x86_64", "avx2": True}, False),
    ({"architecture": "x86_64", "avx512_f": True}, False),
    ({"architecture": "x86_64", "avx512_bf16": True}, True),
    ({"architecture": "x86_64", "amx_bf16": True}, True),
])  # fmt: skip
def test_a_processor_that_says_so_is_believed_and_nothing_is_timed(monkeypatch, flags, fast):
    capabilities(monkeypatch, **flags)
    monkeypatch.setattr(hardware, "_seconds", lambda *a: pytest.fail("timed"))
    assert fast_bfloat16(CPU)[0] is fast
    assert choose("cpu").dtype is (torch.bfloat16 if fast else torch.float32)


@pytest.mark.parametrize("half,fast", [(0.5, True), (1.2, True), (4.0, False), (float("inf"), False)])
def test_where_no_flag_tells_one_product_is_timed(monkeypatch, half, fast):
    capabilities(monkeypatch, architecture="aarch64")
    monkeypatch.setattr(hardware, "_seconds", lambda device, dtype: half if dtype is torch.bfloat16 else 1.0)
    found, why = fast_bfloat16(CPU)
    assert found is fast and f"{half:.1f} times" in why


def test_the_timing_is_of_real_products():
    assert 0 < hardware._seconds(CPU, torch.float32) < 60
    assert hardware._seconds(torch.device("cpu"), torch.bool) == float("inf"), "no such product, so not a fast one"


def test_an_accelerator_is_taken_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    found = choose()
    assert (found.device.type, found.dtype) == ("cuda", torch.float32), "emulated bfloat16 is no gain"
    assert choose("cuda:1", "float16").device.index == 1
    with pytest.raises(ValueError, match="'cuda:2' is not there: PyTorch finds 2 of type cuda"):
        choose("cuda:2")
    with pytest.raises(ValueError, match="no xpu device"):
        choose("xpu")


def test_what_is_asked_for_is_taken_or_refused_in_a_line():
    found = choose("cpu", "bfloat16")
    assert (found.device, found.dtype, found.dtype_name, found.why) == (CPU, torch.bfloat16, "bfloat16", "")
    assert str(found).startswith("running on cpu, ") and str(found).endswith("in bfloat16")
    assert "CPU" in found.machine
    with pytest.raises(ValueError, match="threads is a number of CPU threads"):
        choose("cpu", "float32", -1)
    for device, dtype, match in (
        ("gpu", "auto", "unknown device 'gpu'"),
        ("cpu", "float17", "unknown dtype 'float17'. Did you mean 'float16'"),
    ):
        with pytest.raises(ValueError, match=match) as error:
            choose(device, dtype)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("environment,threads", [
    ({}, 8),  # nobody said anything
    ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "1"}, 8),  # what `accelerate launch` leaves behind
    ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, 8),
    ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 4),  # the machine's cores are shared by its processes
    ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "16"}, 1),
    ({"OMP_NUM_THREADS": "1"}, None),  # a user's own word
    ({"OMP_NUM_THREADS": "3", "LOCAL_WORLD_SIZE": "2"}, None),
])  # fmt: skip
def test_all_cores_are_used_and_a_users_word_is_kept(monkeypatch, environment, threads):
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hardware.os, "environ", environment)
    monkeypatch.setattr(hardware, "cores", lambda: 8)
    said = []
    monkeypatch.setattr(torch, "set_num_threads", said.append)
    found = use_cores()
    assert said == ([] if threads is None else [threads])
    assert found == (torch.get_num_threads() if threads is None else threads)
    assert use_cores(3) == 3 and said[-1] == 3, "an option goes before everything"
