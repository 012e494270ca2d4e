"""Compiles kernels for GPUs that need not be there; prints each one's shared memory.

The interpreter takes Python that the compiler refuses. Run without TRITON_INTERPRET, by test_gated_triton.py and, with
the word "coded", by test_coded_attention.py.
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

from gatekv.ops import coded_triton, gated_triton

TYPES = {"Gate": "*fp32", "Lse": "*fp32", "Delta": "*fp32", "DGate": "*fp32", "Order": "*i32", "Rank": "*i32",
         "Sinks": "*fp32", "Mask": "*u8", "scale": "fp32", "cap": "fp32"}  # fmt: skip
TENSORS = ("Q", "K", "V", "Out", "DOut", "DQ", "DK", "DV")
SHAPE = dict(D=80, WIDTH=128, BLOCK=64, MASKED=True, DECAY=True, CAPPED=True)
KERNELS = {
    gated_triton._forward: SHAPE | dict(SINKS=True),
    gated_triton._grad_queries: SHAPE | dict(QUERIES=True),
    gated_triton._grad_keys: SHAPE | dict(STEP=32, KEYS=True, GATES=True),
}

CODED_TYPES = {"Q": "*fp32", "Records": "*u8", "At": "*u8", "Levels": "*fp32", "Pieces": "*i64", "Facts": "*i32",
               "Out": "*fp32", "Lse": "*fp32", "scale": "fp32", "cap": "fp32"}  # fmt: skip
CODED = dict(M=16, D=128, V_D=128, KEY_DIM=80, HEAD_DIM=96, TILE=32, CAPPED=True)


def compiled(kernel, types, constants, capability, **options):
    """Prints the kernel's name and its shared memory."""
    types = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {name: types.get(name, "i32") for name in kernel.arg_names}, constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    print(kernel.__name__, made.metadata.shared)


if sys.argv[1:] == ["coded"]:
    for capability, kind, size in ((80, 0, 2), (90, 1, 2), (100, 2, 4)):
        compiled(coded_triton._piece, CODED_TYPES, CODED | dict(KIND=kind, SIZE=size), capability, num_stages=2)
else:
    for kernel, constants in KERNELS.items():
        types = TYPES | dict.fromkeys(TENSORS, "*bf16")
        compiled(kernel, types, constants, 90, num_warps=8, num_stages=2)
