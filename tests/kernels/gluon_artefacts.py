"""Compiles the Gluon kernels for sm_90, without a GPU, and prints what each uses of the register file, as JSON lines.

Compiling needs kernels that are not interpreted: run it with TRITON_INTERPRET unset.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from dynconv_hf.kernels import lowrank_gluon

COMMON = {
    "x_ptr": "*bf16",
    "coefficients_ptr": "*bf16",
    "basis_ptr": "*bf16",
    "static_ptr": "*bf16",
    "positions_ptr": None,
    "state_ptr": None,
    "T": "i32",
    "D": 2048,
    "R": 15,
    "X_STRIDE": 2048,
    "Z_STRIDE": 15,
    "RESIDUAL": True,
    "TAIL": False,
}
FORWARD = {"y_ptr": "*bf16", "L": 16, "WARPS": 4, "STAGES": 6}
BACKWARD = {
    "dy_ptr": "*bf16",
    "dx_ptr": "*bf16",
    "dz_partial_ptr": "*fp32",
    "du_partial_ptr": "*fp32",
    "L": "i32",
    "MAX_L": 128,
    "WARPS": 8,
    "STAGES": 4,
}
VARIANTS = {
    "common": {},
    "tail": {"TAIL": True},
    "positions": {"positions_ptr": "*i64"},
    "all": {"TAIL": True, "positions_ptr": "*i64", "state_ptr": "*bf16"},
    "float32 parameters": {"basis_ptr": "*fp32", "static_ptr": "*fp32"},
    "no static filter": {"static_ptr": None, "R": 16, "RESIDUAL": False},
}
OTHER_SHAPES = {
    "4 warps": {"WARPS": 4, "D": 384, "X_STRIDE": 384},
    "long runs": {"MAX_L": 256, "D": 8192, "X_STRIDE": 8192},
}


def cases() -> Iterator[tuple]:
    for name, variant in VARIANTS.items():
        yield f"forward, {name}", lowrank_gluon.lowrank_forward_kernel, COMMON | FORWARD | variant
    for name, variant in (VARIANTS | OTHER_SHAPES).items():
        yield f"backward, {name}", lowrank_gluon.lowrank_backward_kernel, COMMON | BACKWARD | variant


def compiled_cubin(kernel, arguments: dict) -> bytes:
    signature = {name: value if isinstance(value, str) else "constexpr" for name, value in arguments.items()}
    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")
    }
    source = GluonASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, aligned)
    options = {"num_warps": arguments["WARPS"]}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]


def local_memory(cubin: bytes) -> int:
    """Bytes a thread: these kernels index no arrays at run time, so that local memory means spilled registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


if __name__ == "__main__":
    for name, kernel, arguments in cases():
        print(json.dumps({"case": name, "spilled": local_memory(compiled_cubin(kernel, arguments))}), flush=True)
