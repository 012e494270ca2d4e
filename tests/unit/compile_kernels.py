"""Compiles the kernels of gated attention for a GPU that need not be there; prints each one's shared memory.

The interpreter takes Python that the compiler refuses. Run by test_gated_triton.py, without TRITON_INTERPRET.
"""

import sys
from pathlib import Path
from types import ModuleType

package = ModuleType("gatekv")  # its modules without all that `import gatekv` loads, which takes longer than compiling
package.__path__ = [str(Path(__file__).resolve().parents[2] / "gatekv")]
sys.modules["gatekv"] = package

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gatekv.ops import gated_triton

TYPES = {"Gate": "*fp32", "Lse": "*fp32", "Delta": "*fp32", "DGate": "*fp32", "Order": "*i32", "Rank": "*i32",
         "Sinks": "*fp32", "Mask": "*u8", "scale": "fp32", "cap": "fp32"}  # fmt: skip
TENSORS = ("Q", "K", "V", "Out", "DOut", "DQ", "DK", "DV")
SHAPE = dict(D=80, WIDTH=128, BLOCK=64, MASKED=True, DECAY=True, CAPPED=True)
KERNELS = {
    gated_triton._forward: SHAPE | dict(SINKS=True),
    gated_triton._grad_queries: SHAPE | dict(QUERIES=True),
    gated_triton._grad_keys: SHAPE | dict(STEP=32, KEYS=True, GATES=True),
}

for kernel, constants in KERNELS.items():
    types = TYPES | dict.fromkeys(TENSORS, "*bf16") | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {name: types.get(name, "i32") for name in kernel.arg_names}, constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 2})
    print(kernel.__name__, made.metadata.shared)
