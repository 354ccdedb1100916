"""Compiles kernels for sm_90 without a GPU and reads registers and spills from the artefact.

    python tests/kernels/artefacts.py    # JSON lines: case, kernel, registers, spilled bytes, ...

Must run without TRITON_INTERPRET: interpreted kernels cannot be compiled.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from dynconv_hf.kernels import direct, launch, lowrank, lowrank_half, lowrank_half_backward, reduction

MULTIPROCESSORS = 132
BATCH, TOKENS = 4, 4096
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")


class Recorder:
    """Stands in for a kernel: takes down what it is launched with."""

    def __init__(self, kernel: Any, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable:
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def record(launcher: Callable, *args: Any) -> list:
    """The kernels a host function launches, as (kernel, args, kwargs); nothing runs."""
    launches: list = []
    modules = (direct, lowrank, lowrank_half, lowrank_half_backward, reduction)
    kernels = {
        (module, name): kernel
        for module in modules
        for name, kernel in vars(module).items()
        if isinstance(kernel, triton.JITFunction) and name.endswith("_kernel")
    }
    try:
        for (module, name), kernel in kernels.items():
            setattr(module, name, Recorder(kernel, launches))
        launcher(*args)
    finally:
        for (module, name), kernel in kernels.items():
            setattr(module, name, kernel)
    return launches


def compile_sm90(kernel: Any, args: tuple, kwargs: dict) -> Any:
    return compile_for(GPUTarget("cuda", 90, 32), kernel, args, kwargs)


class Specialization(NamedTuple):
    """What a kernel is compiled for: other arguments with the same need no other program."""

    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, Any]


def specialization(kernel: Any, args: tuple, kwargs: dict) -> Specialization:
    """As the just-in-time compiler specialises for these arguments."""
    bound = dict(zip([p.name for p in kernel.params], args, strict=False))
    options = {name: kwargs[name] for name in OPTIONS if name in kwargs}
    bound.update({name: value for name, value in kwargs.items() if name not in OPTIONS})
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        specialize = not parameter.do_not_specialize
        if parameter.is_constexpr or (specialize and not isinstance(value, torch.Tensor) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            if specialize and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return Specialization(signature, constants, attributes, options)


def compile_for(target: GPUTarget, kernel: Any, args: tuple, kwargs: dict) -> Any:
    signature, constants, attributes, options = specialization(kernel, args, kwargs)
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def resources(compiled: Any) -> dict[str, int]:
    """Registers a thread and bytes of local memory, from the machine code; shared memory from the compiler.

    These kernels index no arrays at run time, so that local memory means spilled registers.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": numbers["REG"],
        "spilled": numbers["STACK"] + numbers["LOCAL"],
        "shared": compiled.metadata.shared,
    }


def meta_tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def arguments(
    dtype: torch.dtype,
    parameter: torch.dtype,
    size: int,
    channels: int,
    has_static: bool,
    masked: bool,
    batch: int = BATCH,
    tokens: int = TOKENS,
) -> tuple[torch.Tensor, tuple]:
    """x, and what all modes take after their filters; masked: positions and state."""
    x = meta_tensor(batch, tokens, channels, dtype=dtype)
    s = meta_tensor(size, channels, dtype=parameter) if has_static else None
    positions = meta_tensor(batch, tokens, dtype=torch.int64) if masked else None
    state = meta_tensor(batch, size - 1, channels, dtype=dtype) if masked else None
    return x, (s, True, positions, state)


def _lowrank(
    name: str, x: torch.Tensor, rank: int, size: int, parameter: torch.dtype, common: tuple
) -> Iterator[tuple[str, Callable, tuple]]:
    z = meta_tensor(BATCH, TOKENS, rank, dtype=x.dtype)
    u = meta_tensor(rank, size, x.shape[-1], dtype=parameter)
    yield f"lowrank R{rank} {name} forward", lowrank.forward, (x, z, u, *common)
    yield f"lowrank R{rank} {name} backward", lowrank.backward, (x, x, z, u, *common)


def cases() -> Iterator[tuple[str, Callable, tuple]]:
    """What users run, and the corners of what registers must hold: types, W, R, positions and state."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    channels = 2048
    settings = [
        # dtype, parameters' dtype, W, R, static, masked (positions and state)
        (bf16, bf16, 4, 15, True, False),
        (bf16, fp32, 4, 15, True, True),
        (bf16, bf16, 8, 15, True, True),
        (bf16, bf16, 4, 64, True, True),
        (bf16, bf16, 1, 1, False, False),
        (bf16, bf16, 3, 16, False, True),
        (fp16, fp16, 4, 15, True, True),
        (fp32, fp32, 4, 15, True, True),
        (fp32, fp32, 8, 16, True, True),
    ]
    for dtype, parameter, size, rank, has_static, masked in settings:
        x, common = arguments(dtype, parameter, size, channels, has_static, masked)
        flags = "".join(flag for flag, on in ((" static", has_static), (" masked", masked)) if on)
        name = f"{TYPES[dtype]}/{TYPES[parameter]} W{size}{flags}"
        yield from _lowrank(name, x, rank, size, parameter, common)
        for head_size in (1, 16, channels):
            f = meta_tensor(BATCH, TOKENS, channels // head_size, size, dtype=dtype)
            yield f"headwise P{head_size} {name} forward", direct.forward, (x, f, *common)
            yield f"headwise P{head_size} {name} backward", direct.backward, (x, x, f, *common)
        if has_static:
            yield f"static {name} forward", direct.forward, (x, None, *common)
            yield f"static {name} backward", direct.backward, (x, x, None, *common)


def lowrank_corners() -> Iterator[tuple[str, Callable, tuple]]:
    """What was found to spill: rows that are not aligned, and variants that the compiler keeps to fewer registers."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for dtype, parameter, size, rank, channels, masked in [
        (bf16, bf16, 4, 15, 1000, False),
        (bf16, bf16, 4, 1, 1000, True),
        (bf16, bf16, 6, 15, 1000, False),
        (bf16, bf16, 8, 1, 40, True),
        (bf16, bf16, 2, 1, 2048, False),
        (bf16, bf16, 3, 8, 2048, True),
        (bf16, fp32, 6, 8, 2048, True),
        (bf16, fp32, 7, 40, 2048, True),
        (fp16, fp16, 7, 15, 2048, True),
        (fp16, fp16, 6, 40, 1000, True),
        (fp32, fp32, 1, 1, 1000, False),
        (fp32, fp32, 8, 15, 2048, True),
    ]:
        x, common = arguments(dtype, parameter, size, channels, True, masked)
        name = f"D{channels} {TYPES[dtype]}/{TYPES[parameter]} W{size}{' masked' if masked else ''}"
        yield from _lowrank(name, x, rank, size, parameter, common)


def one_pass_cases() -> Iterator[tuple[str, Callable, tuple]]:
    """Every variant of the fast kernels of training: packed documents (positions, no state), no static filter, no
    residual, x as a slice of a wider tensor."""
    bf16 = torch.bfloat16
    x, z = meta_tensor(4, 4096, 2048, dtype=bf16), meta_tensor(4, 4096, 15, dtype=bf16)
    u, s = meta_tensor(15, 4, 2048, dtype=bf16), meta_tensor(4, 2048, dtype=bf16)
    positions = meta_tensor(4, 4096, dtype=torch.int64)
    sliced = meta_tensor(4, 4096, 4096, dtype=bf16)[..., :2048]
    for name, dy, source, static, residual, packed in [
        ("packed", x, x, s, True, positions),
        ("packed, no static", x, x, None, True, positions),
        ("packed, sliced", x, sliced, s, True, positions),
        ("no static", x, x, None, True, None),
        ("no residual", x, x, s, False, None),
        ("sliced", sliced, sliced, s, True, None),
    ]:
        yield f"one pass {name} forward", lowrank.forward, (source, z, u, static, residual, packed, None)
        yield f"one pass {name} backward", lowrank.backward, (dy, source, z, u, static, residual, packed, None)


def without_device() -> None:
    """Launchers ask how large the device is: it is not there."""
    for module in (direct, lowrank, lowrank_half, lowrank_half_backward):
        module.multiprocessors = lambda device: MULTIPROCESSORS


def recordable(wanted: str = "") -> Iterator[tuple[str, Callable, tuple]]:
    """The cases whose name holds `wanted`."""
    without_device()
    return (case for case in (*cases(), *lowrank_corners(), *one_pass_cases()) if wanted in case[0])


def report(wanted: str = "") -> Iterator[dict]:
    """One row for each kernel of each case whose name holds `wanted`; fetched_ahead: loads that a loop does early."""
    for case, launcher, args in recordable(wanted):
        for kernel, kernel_args, kwargs in record(launcher, *args):
            compiled = compile_sm90(kernel, kernel_args, kwargs)
            copies = compiled.asm["ttgir"].count("async_copy_global_to_local")
            yield {"case": case, "kernel": kernel.fn.__name__, **resources(compiled), "fetched_ahead": copies}


if __name__ == "__main__":
    if launch.INTERPRETED:
        raise SystemExit(f"TRITON_INTERPRET is {os.environ['TRITON_INTERPRET']!r}: unset it")
    for row in report(*sys.argv[1:]):
        print(json.dumps(row), flush=True)
