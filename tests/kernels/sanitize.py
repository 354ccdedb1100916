"""Runs every kernel once on small inputs, for NVIDIA's compute-sanitizer to watch:

    PYTHONPATH=. python tests/kernels/sanitize.py    # compiles the kernels, which the next runs find in Triton's cache
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    PYTHONPATH=. compute-sanitizer --tool memcheck --error-exitcode 9 python tests/kernels/sanitize.py
    PYTHONPATH=. compute-sanitizer --tool racecheck --error-exitcode 9 python tests/kernels/sanitize.py

Without the caching of PyTorch's allocator every tensor is an allocation of its own, beside which nobody may read.
Arguments take only the cases whose name holds one of them.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from dynconv_hf.kernels import (
    Rotary,
    describe_implementation,
    headwise_dynamic_conv1d_update,
    lowrank_dynamic_conv1d_group,
    lowrank_dynamic_conv1d_update,
    static_conv1d_update,
)
from dynconv_hf.kernels.decode_ops import decode_step as decode
from tests.kernels.cases import Case, run

UPDATES = {
    "lowrank": lowrank_dynamic_conv1d_update,
    "headwise": headwise_dynamic_conv1d_update,
    "static": static_conv1d_update,
}
BF16 = torch.bfloat16
# Tails: no dimension is a multiple of its tile.
GENERAL = Case("lowrank", batch=2, tokens=37, channels=40, heads=5, device=torch.device("cuda"))
HALF = replace(GENERAL, dtype=BF16, parameter_dtype=BF16, channels=72, heads=9)
# Whole tiles of channels, which the fastest low-rank kernels take.
WIDE = replace(HALF, channels=256, heads=16)
MASKED = {"positions": "packed", "state": True}


def cases() -> Iterator[tuple[str, Case]]:
    """A name, and what is run forward and backward."""
    sizes = {"float32": GENERAL, "half": HALF, "wide": WIDE, "one token": replace(WIDE, tokens=1)}
    # More than one chunk of the backward, the last one cut short.
    sizes["chunks"] = replace(WIDE, batch=1, tokens=1500)
    for size, case in sizes.items():
        for mode in UPDATES:
            yield f"{mode} {size}", replace(case, mode=mode)
            yield f"{mode} {size} packed", replace(case, mode=mode, positions="packed")
            yield f"{mode} {size} masked", replace(case, mode=mode, **MASKED)
    yield "lowrank mixed", replace(WIDE, parameter_dtype=torch.float32, **MASKED)
    yield "lowrank R16", replace(WIDE, rank=16, static=False, residual=False)
    yield "lowrank R40 W8", replace(HALF, rank=40, kernel_size=8, **MASKED)
    # Of 2 and 3 taps, the one-pass backward holds four, the others being 0.
    for kernel_size in (2, 3):
        chunks = replace(WIDE, batch=1, tokens=1500, kernel_size=kernel_size)
        yield f"lowrank W{kernel_size}", chunks
        yield f"lowrank W{kernel_size} packed", replace(chunks, positions="packed")
    yield "lowrank fp16 W3", replace(HALF, dtype=torch.float16, kernel_size=3, rank=5)
    for head_size in (1, 4, 64, 256):
        yield f"headwise P{head_size}", replace(WIDE, mode="headwise", heads=256 // head_size, **MASKED)
    # Long filters have steps of their own.
    yield "headwise W8", replace(WIDE, mode="headwise", kernel_size=8, **MASKED)
    for layout in ("slice", "channels first", "tokens first"):
        yield f"lowrank {layout}", replace(WIDE, layout=layout)


def decode_step(case: Case) -> None:
    inputs = {name: tensor.detach() for name, tensor in replace(case, state=True).inputs().items()}
    one = {name: inputs[name][:, 0] for name in ("x", "coefficients", "filters") if name in inputs}
    same = {name: inputs[name] for name in ("basis", "static_filter") if name in inputs}
    UPDATES[case.mode](**one, **same, state=inputs["initial_state"])


def group(case: Case) -> None:
    """Queries, keys and values, the first two with RoPE: forward, backward, and a decode step."""
    inputs, gradient = case.inputs(), case.output_gradient()
    static_filter, state = inputs.get("static_filter"), inputs.get("initial_state")
    cos, sin = torch.rand(2, 1, case.tokens, 64, device=gradient.device).to(gradient.dtype)
    ys = lowrank_dynamic_conv1d_group(
        [inputs["x"]] * 3,
        inputs["coefficients"].unsqueeze(2).expand(-1, -1, 3, -1),
        [inputs["basis"]] * 3,
        static_filters=None if static_filter is None else [static_filter] * 3,
        positions=case.token_positions(),
        initial_states=None if state is None else [state] * 3,
        rotary=Rotary(cos, sin, 64, (True, True, False)),
    )
    torch.autograd.backward(ys, [gradient] * 3)
    one = {name: inputs[name].detach() for name in ("basis", "static_filter")}
    decode(
        torch.randn(case.batch, 1, 100, device=gradient.device, dtype=gradient.dtype),
        [torch.randn_like(gradient[:, :1])] * 3,
        [torch.randn(case.rank, 100, device=gradient.device, dtype=gradient.dtype)] * 3,
        [one["basis"]] * 3,
        [one["static_filter"]] * 3,
        [gradient.new_zeros(case.batch, case.channels, case.kernel_size - 1) for _ in range(3)],
        None,
        cos[:, :1].contiguous(),
        sin[:, :1].contiguous(),
        64,
        [True, True, False],
        True,
    )


def forward_and_backward(case: Case) -> None:
    run(case, case.inputs(), case.output_gradient(), "triton")


def implementation(case: Case) -> str:
    inputs = case.inputs()
    filters = {name: inputs[name] for name in ("coefficients", "basis") if name in inputs}
    return describe_implementation(
        inputs["x"],
        **filters,
        static_filter=inputs.get("static_filter"),
        positions=case.token_positions(),
        initial_state=inputs.get("initial_state"),
    ).name


def runs() -> Iterator[tuple[str, Callable[[Case], None], Case]]:
    for name, case in cases():
        yield name, forward_and_backward, case
    for size, case in (("wide", WIDE), ("chunks", replace(WIDE, batch=1, tokens=1500))):
        yield f"group {size}", group, case
        yield f"group {size} masked", group, replace(case, **MASKED)
    for mode in UPDATES:
        for size, case in (("float32", GENERAL), ("wide", WIDE)):
            yield f"{mode} {size} decode", decode_step, replace(case, mode=mode)


def main() -> None:
    wanted = sys.argv[1:] or [""]
    for name, launch, case in runs():
        if any(part in name for part in wanted):
            launch(case)
            # What is found is reported beside the case that it is found in.
            torch.cuda.synchronize()
            print(f"{name}: {implementation(case)}", flush=True)


if __name__ == "__main__":
    main()
