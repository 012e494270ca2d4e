"""What to run on: the device, a dtype that is fast there, the threads of the CPU; decided once, said in one line."""

import os
import platform
import time
from dataclasses import dataclass, field

import torch

from gatekv.config import check_choice

DTYPES = ("bfloat16", "float16", "float32", "float64")
AUTO = "auto"
SHAPE = (256, 512, 512)  # of the product that is timed: long enough to tell a factor of two, over in milliseconds
SLOWER = 1.25  # a half-width product that takes this many times longer than float32's is no help


@dataclass(frozen=True)
class Hardware:
    """Where a model runs, and in what.

    Attributes:
        device: of the model and of everything that is fed to it.
        dtype: of the frozen weights.
        threads: of this process, for work on the CPU.
        why: what the choices rest on; "" for what the user asked for.
    """

    device: torch.device
    dtype: torch.dtype
    threads: int
    why: str = field(default="", compare=False)

    @property
    def dtype_name(self) -> str:
        """The dtype as options have it: "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def machine(self) -> str:
        """The kind of machine, as results name it: "NVIDIA H200", "x86_64 CPU, AVX2"; never a machine's name."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        if self.device.type != "cpu":
            return self.device.type
        return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"

    def __str__(self) -> str:
        threads = f", {self.threads} thread{'s' if self.threads > 1 else ''}" if self.device.type == "cpu" else ""
        return f"running on {self.device}{threads}, in {self.dtype_name}" + (f" ({self.why})" if self.why else "")


def choose(device: str | torch.device = AUTO, dtype: str = AUTO, threads: int = 0) -> Hardware:
    """Decide what is left to us, check what is not, and let this process use its share of the cores.

    Args:
        device: "auto" takes the accelerator (`cuda`, `mps`, `xpu`, …) where there is one, else the CPU.
        dtype: "auto" takes bfloat16 where it is fast, else float32.
        threads: of this process on the CPU; 0 takes its share of the cores (see `use_cores`).

    Raises:
        ValueError: a device or dtype that does not exist here, or a negative number of threads.
    """
    if threads < 0:
        raise ValueError(f"threads is a number of CPU threads, or 0 for this process's share of them; got {threads}.")
    where = _device(device)
    if dtype == AUTO:
        fast, why = fast_bfloat16(where)
        kind = torch.bfloat16 if fast else torch.float32
    else:
        check_choice("dtype", dtype, (AUTO, *DTYPES))
        kind, why = getattr(torch, dtype), ""
    return Hardware(where, kind, use_cores(threads), why)


def _device(name: str | torch.device) -> torch.device:
    """The device of that name, or the one to take."""
    if name == AUTO:
        here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return here or torch.device("cpu")
    cure = "use 'auto', 'cpu', or the name of a device that this machine has, such as 'cuda' or 'cuda:1'"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {str(name)!r}: {cure}.") from error
    if device.type in ("cpu", "meta"):
        return device
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if here is not None and here.type == device.type else 0
    if (device.index or 0) >= count:
        found = f"{count} of type {device.type}" if count else f"no {device.type} device"
        raise ValueError(f"device {str(name)!r} is not there: PyTorch finds {found}; {cure}.")
    return device


def fast_bfloat16(device: torch.device) -> tuple[bool, str]:
    """(Is bfloat16 at least as fast as float32 on this device, what says so).

    An x86 processor's own word counts, because it is the same at every start; elsewhere (Arm, MPS, …), and where
    PyTorch does not tell what a processor has, a product is timed.
    """
    if device.type == "meta":
        return False, "nothing is computed on this device"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return native, f"this GPU {'computes' if native else 'does not compute'} in bfloat16"
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        if flags.get("architecture") in ("x86_64", "AMD64"):
            units = [n for n in ("amx_bf16", "avx512_bf16", "avx10_2") if flags.get(n)]
            return bool(units), f"this CPU has {units[0] if units else 'no bfloat16 instructions'}"
    half, single = (_seconds(device, dtype) for dtype in (torch.bfloat16, torch.float32))
    return half <= SLOWER * single, f"a product in bfloat16 takes {half / single:.1f} times as long as in float32"


def _seconds(device: torch.device, dtype: torch.dtype) -> float:
    """The shortest of five times of one matrix product; inf where the device has no such product."""
    m, k, n = SHAPE
    try:
        a, b = torch.ones(m, k, dtype=dtype, device=device), torch.ones(k, n, dtype=dtype, device=device)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            (a @ b).sum().item()  # the host read waits for the device
            times.append(time.perf_counter() - start)
    except (RuntimeError, TypeError):
        return float("inf")
    return min(times[1:])


def cores() -> int:
    """The CPU cores that this process may use; containers and task sets are heeded."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def use_cores(threads: int = 0) -> int:
    """Give PyTorch `threads`, or this process's share of the machine's cores; returns the number of threads.

    `accelerate launch` sets OMP_NUM_THREADS to 1, also where one process has the machine to itself. A number above 1,
    or one that a user set without that launcher, is taken as meant.
    """
    if threads:
        torch.set_num_threads(threads)
        return threads
    asked, launched = os.environ.get("OMP_NUM_THREADS", ""), "LOCAL_WORLD_SIZE" in os.environ
    launched = launched or any(name.startswith("ACCELERATE_") for name in os.environ)
    if asked.isdigit() and int(asked) > 1 or asked and not launched:
        return torch.get_num_threads()
    threads = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.set_num_threads(threads)
    return threads
