"""What the Gluon path of the low-rank convolution promises without a GPU: what it covers, and no spilled registers."""

import re
import subprocess

import pytest
import torch

from dynconv_hf.kernels import lowrank_gluon

needs_gluon = pytest.mark.skipif(lowrank_gluon.MISSING is not None, reason=str(lowrank_gluon.MISSING))


def call(batch=2, tokens=100, channels=256, rank=15, kernel_size=4, static=True, dtype=torch.bfloat16, parameter=None):
    x = torch.empty(batch, tokens, channels, dtype=dtype)
    coefficients = torch.empty(batch, tokens, rank, dtype=dtype)
    basis = torch.empty(rank, kernel_size, channels, dtype=parameter or dtype)
    static_filter = torch.empty(kernel_size, channels, dtype=parameter or dtype) if static else None
    return lowrank_gluon.covers(x, coefficients, basis, static_filter, None, None)


@needs_gluon
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "no NVIDIA GPU"),
        ({"rank": 16, "static": False}, "no NVIDIA GPU"),
        ({"parameter": torch.float32}, "no NVIDIA GPU"),
        ({"rank": 16}, "R is 16"),
        ({"rank": 17, "static": False}, "R is 17"),
        ({"kernel_size": 3}, "W is 3"),
        ({"channels": 192}, "D is 192"),
        ({"channels": 0}, "D is 0"),
        ({"batch": 0}, "empty"),
        ({"tokens": 0}, "empty"),
        ({"batch": 70000, "tokens": 1, "rank": 1, "channels": 128}, "B, T are 70000, 1"),
        ({"dtype": torch.float16}, "x is torch.float16"),
        ({"parameter": torch.float64}, "a parameter is torch.float64"),
    ],
)
def test_covers_says_why_not(options, reason):
    assert reason in call(**options)


@needs_gluon
@pytest.mark.parametrize(("processors", "shared_memory"), [(132, 232448), (108, 166912), (128, 101376), (46, 101376)])
@pytest.mark.parametrize("channels", [128, 256, 1152, 2048, 8192])
@pytest.mark.parametrize("tokens", [1, 7, 100, 4096, 5000, 131072])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_the_plan_covers_all_tokens_within_the_device(batch, tokens, channels, processors, shared_memory):
    plan = lowrank_gluon.divide_work(batch, tokens, channels, processors, shared_memory)
    assert channels % (32 * plan.warps) == 0
    assert plan.run_length % 2 == 0 and 8 <= plan.run_length <= plan.max_run_length
    assert 0 <= plan.chunks * 8 * plan.run_length - tokens < 8 * plan.run_length
    assert lowrank_gluon._shared_memory(plan.warps, plan.max_run_length) <= shared_memory


@needs_gluon
def test_the_plan_of_the_usual_shape_is_one_full_wave():
    assert lowrank_gluon.divide_work(4, 4096, 2048, 132, 232448) == (8, 128, 128, 4)


def compiled_kernel(kernel, arguments, warps):
    """The artefact for compute capability 9.0, made without a GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    signature = {name: value if isinstance(value, str) else "constexpr" for name, value in arguments.items()}
    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")
    }
    source = GluonASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    return compiled.asm["cubin"]


def resource_usage(cubin, path):
    import triton

    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


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


def assert_no_spills(kernel, arguments, tmp_path):
    usage = resource_usage(compiled_kernel(kernel, arguments, arguments["WARPS"]), tmp_path / "kernel.cubin")
    assert re.search(r"STACK:0 .*LOCAL:0", usage), usage


@needs_gluon
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_forward_does_not_spill(variant, tmp_path):
    assert_no_spills(lowrank_gluon.lowrank_forward_kernel, COMMON | FORWARD | VARIANTS[variant], tmp_path)


@needs_gluon
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_backward_does_not_spill(variant, tmp_path):
    assert_no_spills(lowrank_gluon.lowrank_backward_kernel, COMMON | BACKWARD | VARIANTS[variant], tmp_path)


@needs_gluon
@pytest.mark.parametrize(
    "shape", [{"WARPS": 4, "D": 384, "X_STRIDE": 384}, {"MAX_L": 256, "D": 8192, "X_STRIDE": 8192}]
)
def test_the_backward_of_other_shapes_does_not_spill(shape, tmp_path):
    assert_no_spills(lowrank_gluon.lowrank_backward_kernel, COMMON | BACKWARD | shape, tmp_path)
