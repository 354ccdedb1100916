"""Compiles the Gluon kernels for sm_90, without a GPU, and prints what each uses of the register file, as JSON lines.

Compiling needs kernels that are not interpreted: run it with TRITON_INTERPRET unset.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from dynconv_hf.kernels import lowrank_gluon

COMMON = {
    "coefficients_ptr": "*bf16",
    "positions_ptr": None,
    "cos_ptr": None,
    "sin_ptr": None,
    "T": "i32",
    "z_stride": "i32",
    "z_member_stride": "i32",
    "rotary_tokens": "i32",
    "R": 15,
    "HEAD_DIM": 0,
    "RESIDUAL": True,
}
# What differs between the members of a group. In channels and strides the compiler is told a factor of 16.
MEMBER = {
    "x_ptrs": "*bf16",
    "basis_ptrs": "*bf16",
    "static_ptrs": "*bf16",
    "state_ptrs": None,
    "channels": "i32",
    "x_strides": "i32",
    "ROTATED": False,
}
FORWARD = {"y_ptrs": "*bf16", "L": 16, "WARPS": 4, "STAGES": 6}
BACKWARD = {
    "dy_ptrs": "*bf16",
    "dx_ptrs": "*bf16",
    "dz_partial_ptr": "*fp32",
    "du_partial_ptr": "*fp32",
    "L": "i32",
    "MAX_L": 256,
    "WARPS": 8,
    "STAGES": 4,
}
VARIANTS = {
    "common": {},
    "positions": {"positions_ptr": "*i64"},
    "all": {"positions_ptr": "*i64", "state_ptrs": "*bf16"},
    "float32 parameters": {"basis_ptrs": "*fp32", "static_ptrs": "*fp32"},
    "no static filter": {"static_ptrs": None, "R": 16, "RESIDUAL": False},
}
OTHER_SHAPES = {"4 warps": {"WARPS": 4, "MAX_L": 128}}
ROTATED = {"cos_ptr": "*bf16", "sin_ptr": "*bf16", "ROTATED": True}


def cases() -> Iterator[tuple]:
    """Name, kernel, arguments, size of the group."""
    forward, backward = lowrank_gluon.lowrank_forward_kernel, lowrank_gluon.lowrank_backward_kernel
    for name, variant in VARIANTS.items():
        yield f"forward, {name}", forward, COMMON | MEMBER | FORWARD | variant, 1
    for name, variant in (VARIANTS | OTHER_SHAPES).items():
        yield f"backward, {name}", backward, COMMON | MEMBER | BACKWARD | variant, 1
    yield "backward, group", backward, COMMON | MEMBER | BACKWARD, 3
    for head_dim in lowrank_gluon.HEAD_DIMS:
        rope = ROTATED | {"HEAD_DIM": head_dim}
        for name in ("common", "positions", "all") if head_dim == 64 else ("common", "all"):
            variant = VARIANTS[name] | rope
            yield f"forward, RoPE {head_dim}, {name}", forward, COMMON | MEMBER | FORWARD | variant, 3
            yield f"backward, RoPE {head_dim}, {name}", backward, COMMON | MEMBER | BACKWARD | variant, 3
            for shape_name, shape in OTHER_SHAPES.items():
                arguments = COMMON | MEMBER | BACKWARD | variant | shape
                yield f"backward, RoPE {head_dim}, {name}, {shape_name}", backward, arguments, 3


def compiled_cubin(kernel, arguments: dict, members: int) -> bytes:
    signature, constants, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        of_members = name in MEMBER or (name.endswith("_ptrs") and value is not None)
        if not isinstance(value, str):
            signature[name] = "constexpr"
            constants[name] = (value,) * members if name == "ROTATED" else value
        elif of_members:
            signature[name] = (value,) * members
            aligned |= {(i, member): [["tt.divisibility", 16]] for member in range(members)}
        else:
            signature[name] = value
            if value.startswith("*"):
                aligned[(i,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(kernel, signature, constants, aligned)
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
    # As an argument, a word that the cases of interest have in their names.
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    for name, *case in cases():
        if wanted in name:
            print(json.dumps({"case": name, "spilled": local_memory(compiled_cubin(*case))}), flush=True)
