"""The fast path of the low-rank convolution for NVIDIA GPUs of compute capability 8.0 and later, in Gluon.

`covers` says whether it serves a call, in words where it does not; `forward` and `backward` trust that it does.
Configurations follow from shapes and the device by rule: nothing is tried out at run time. A compiled kernel
serves all B and T, but for two switches: whether T is a multiple of the tile, and how long a run of the backward
may be.
"""

import functools
from typing import NamedTuple

import torch

try:
    from .lowrank_gluon_backward import lowrank_backward_kernel
    from .lowrank_gluon_forward import lowrank_forward_kernel
    from .lowrank_gluon_reduction import (
        DU_AHEAD,
        DU_ELEMENTS,
        DZ_ROWS,
        lowrank_reduction_kernel,
        lowrank_state_gradient_kernel,
    )

    MISSING = None
except (ImportError, AttributeError) as error:
    # Gluon is young: its names move between versions of Triton, and `experimental` may go.
    MISSING = f"this Triton's Gluon does not fit: {error}"

__all__ = ["Plan", "backward", "covers", "forward", "plan_backward"]

RUNS = 8
WARP_CHANNELS = 32
RANKS = 16
TAPS = 4
FORWARD_RUN_LENGTH = 16
FORWARD_WARPS = 4
FORWARD_STAGES = 6
BACKWARD_STAGES = 4
# What a thread block of the backward costs before and after its loop, counted in tokens of a run.
BACKWARD_OVERHEAD = 12
MAX_GRID = 65535
PARAMETER_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Plan(NamedTuple):
    """How the backward divides its work: thread blocks of `warps` * 32 channels and 8 runs of `run_length` tokens."""

    warps: int
    max_run_length: int
    run_length: int
    chunks: int


def covers(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    basis: torch.Tensor,
    static_filter: torch.Tensor | None,
    positions: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> str | None:
    """None where this path serves the call, otherwise why it does not."""
    if MISSING is not None:
        return MISSING
    batch, tokens, channels = x.shape
    rank, kernel_size, _ = basis.shape
    if x.dtype != torch.bfloat16:
        return f"x is {x.dtype}, not torch.bfloat16"
    for tensor in (coefficients, basis, static_filter):
        if tensor is not None and tensor.dtype not in PARAMETER_DTYPES:
            return f"a parameter is {tensor.dtype}"
    if kernel_size != TAPS:
        return f"W is {kernel_size}, not {TAPS}"
    if rank + (static_filter is not None) > RANKS:
        return f"R is {rank}: with the static filter as one more, at most {RANKS} fit"
    if channels % (FORWARD_WARPS * WARP_CHANNELS) or channels == 0:
        return f"D is {channels}, no multiple of {FORWARD_WARPS * WARP_CHANNELS}"
    if batch == 0 or tokens == 0:
        return "the batch is empty"
    if batch > MAX_GRID or tokens > MAX_GRID * RUNS * FORWARD_RUN_LENGTH:
        return f"B, T are {batch}, {tokens}: more than one grid holds"
    # Offsets within a thread block are 32-bit.
    if max(channels, x.stride(1), coefficients.stride(1)) >= 1 << 19:
        return f"tokens of x or coefficients are {max(x.stride(1), coefficients.stride(1))} elements apart: too far"
    if x.device.type != "cuda" or torch.version.hip is not None:
        return "the device is no NVIDIA GPU"
    return _device_lacks(x.device.index)


def forward(
    x: torch.Tensor,
    coefficients: torch.Tensor,
    basis: torch.Tensor,
    static_filter: torch.Tensor | None,
    residual: bool,
    positions: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> torch.Tensor:
    """y (B, T, D)."""
    batch, tokens, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, x_stride = _token_rows(x, alignment=8)
    coefficients, z_stride = _token_rows(coefficients, alignment=1)
    block = FORWARD_WARPS * WARP_CHANNELS
    tile = RUNS * FORWARD_RUN_LENGTH
    with torch.cuda.device(x.device):
        lowrank_forward_kernel[(channels // block, -(-tokens // tile), batch)](
            x,
            coefficients,
            basis.contiguous(),
            _contiguous(static_filter),
            _batched(positions, batch),
            _state(initial_state, x.dtype),
            y,
            tokens,
            D=channels,
            R=basis.shape[0],
            X_STRIDE=x_stride,
            Z_STRIDE=z_stride,
            L=FORWARD_RUN_LENGTH,
            WARPS=FORWARD_WARPS,
            STAGES=FORWARD_STAGES,
            RESIDUAL=residual,
            TAIL=tokens % tile != 0,
            num_warps=FORWARD_WARPS,
        )
    return y


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    coefficients: torch.Tensor,
    basis: torch.Tensor,
    static_filter: torch.Tensor | None,
    residual: bool,
    positions: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dx, dcoefficients, dbasis, dstatic_filter, dinitial_state, each with the dtype of what it is the gradient of."""
    batch, tokens, channels = x.shape
    rank = basis.shape[0]
    plan = plan_backward(batch, tokens, channels, x.device.index)
    blocks = channels // (plan.warps * WARP_CHANNELS)
    chunks = batch * plan.chunks
    pairs = plan.run_length // 2
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dcoefficients = torch.empty(coefficients.shape, dtype=coefficients.dtype, device=x.device)
    dbasis = torch.empty(basis.shape, dtype=basis.dtype, device=x.device)
    dstatic = (
        None if static_filter is None else torch.empty(static_filter.shape, dtype=static_filter.dtype, device=x.device)
    )
    dstate = (
        None if initial_state is None else torch.empty(initial_state.shape, dtype=initial_state.dtype, device=x.device)
    )
    dz_partial = torch.empty((blocks, chunks, pairs, 2 * RUNS, RANKS), dtype=torch.float32, device=x.device)
    du_partial = torch.empty((chunks, RANKS, TAPS, channels), dtype=torch.float32, device=x.device)
    x, x_stride = _token_rows(x, alignment=8)
    coefficients, z_stride = _token_rows(coefficients, alignment=1)
    dy, basis, static_filter, positions = (
        _aligned(dy),
        basis.contiguous(),
        _contiguous(static_filter),
        _batched(positions, batch),
    )
    with torch.cuda.device(x.device):
        lowrank_backward_kernel[(blocks, plan.chunks, batch)](
            dy,
            x,
            coefficients,
            basis,
            static_filter,
            positions,
            _state(initial_state, x.dtype),
            dx,
            dz_partial,
            du_partial,
            tokens,
            plan.run_length,
            D=channels,
            R=rank,
            X_STRIDE=x_stride,
            Z_STRIDE=z_stride,
            MAX_L=plan.max_run_length,
            WARPS=plan.warps,
            STAGES=BACKWARD_STAGES,
            RESIDUAL=residual,
            TAIL=tokens % (RUNS * plan.run_length) != 0,
            num_warps=plan.warps,
        )
        dz_programs = -(-chunks * pairs * 2 * RUNS // DZ_ROWS)
        du_programs = (rank + (static_filter is not None)) * TAPS * channels // DU_ELEMENTS
        lowrank_reduction_kernel[(dz_programs + du_programs,)](
            dz_partial,
            du_partial,
            dcoefficients,
            dbasis,
            dstatic,
            tokens,
            plan.run_length,
            plan.chunks,
            chunks,
            dz_programs,
            D=channels,
            R=rank,
            BLOCKS=blocks,
            DZ_ROWS=DZ_ROWS,
            DU_ELEMENTS=DU_ELEMENTS,
            DU_AHEAD=DU_AHEAD,
            num_warps=4,
        )
        if initial_state is not None:
            block = FORWARD_WARPS * WARP_CHANNELS
            lowrank_state_gradient_kernel[(channels // block, batch)](
                dy,
                coefficients,
                basis,
                static_filter,
                positions,
                dstate,
                tokens,
                D=channels,
                R=rank,
                Z_STRIDE=z_stride,
                BLOCK=block,
                num_warps=FORWARD_WARPS,
            )
    return dx, dcoefficients, dbasis, dstatic, dstate


@functools.lru_cache(maxsize=1024)
def plan_backward(batch: int, tokens: int, channels: int, device_index: int) -> Plan:
    """The division of work for one device, by rule: few waves of thread blocks, each as long as the next."""
    device = torch.cuda.get_device_properties(device_index)
    return divide_work(batch, tokens, channels, device.multi_processor_count, device.shared_memory_per_block_optin)


def divide_work(batch: int, tokens: int, channels: int, processors: int, shared_memory: int) -> Plan:
    """`plan_backward` for a device of so many multiprocessors and bytes of shared memory for a thread block."""
    warps = 8 if channels % 256 == 0 and _shared_memory(8, 64) <= shared_memory else 4
    blocks = batch * (channels // (warps * WARP_CHANNELS))
    max_run_length = 128 if _shared_memory(warps, 128) <= shared_memory else 64
    # More than one wave: longer runs, hence fewer partial sums. With 4 warps their coefficients, which pass through
    # registers on the way to shared memory, would not fit.
    if warps == 8 and _shared_memory(8, 256) <= shared_memory and blocks * tokens > processors * RUNS * 128:
        max_run_length = 256
    if 2 * _shared_memory(warps, max_run_length) <= shared_memory:
        processors = 2 * processors
    least_chunks = -(-tokens // (RUNS * max_run_length))
    least_waves = -(-least_chunks * blocks // processors)
    best = None
    for waves in range(least_waves, least_waves + 4):
        chunks = max(least_chunks, waves * processors // blocks)
        run_length = max(8, 2 * -(-tokens // (2 * RUNS * chunks)))
        cost = waves * (run_length + BACKWARD_OVERHEAD)
        if best is None or cost < best[0]:
            best = cost, run_length
    run_length = best[1]
    return Plan(warps, max_run_length, run_length, -(-tokens // (RUNS * run_length)))


def _shared_memory(warps: int, max_run_length: int) -> int:
    """Bytes of shared memory that a thread block of the backward uses."""
    block = warps * WARP_CHANNELS
    rings = 2 * BACKWARD_STAGES * 2 * RUNS * block * 2
    bases = 2 * RANKS * TAPS * block * 2
    dz = warps * 2 * RUNS * RANKS * 4
    coefficients = RUNS * (max_run_length + 4) * RANKS * 2
    positions = (max_run_length // 2 + 2) * RUNS * 4
    return rings + bases + dz + coefficients + positions


@functools.cache
def _device_lacks(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"the GPU's compute capability is {capability[0]}.{capability[1]}, below 8.0"
    shared_memory = torch.cuda.get_device_properties(index).shared_memory_per_block_optin
    if shared_memory < _shared_memory(4, 64):
        return f"the GPU has {shared_memory} bytes of shared memory for a thread block, too few"
    return None


def _token_rows(tensor: torch.Tensor, alignment: int) -> tuple[torch.Tensor, int]:
    """The tensor, copied only if need be, so that all tokens are one stride apart, and that stride.

    Slices of a fused projection already are. Asynchronous copies want rows aligned to 16 bytes.
    """
    batch, tokens, channels = tensor.shape
    stride = tensor.stride(1)
    even = tensor.stride(2) == 1 and tokens > 1 and (batch == 1 or tensor.stride(0) == tokens * stride)
    if even and stride % alignment == 0 and (alignment == 1 or tensor.data_ptr() % 16 == 0):
        return tensor, stride
    return (tensor.contiguous() if alignment == 1 else _aligned(tensor)), channels


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _batched(positions: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    return None if positions is None else positions.expand(batch, -1).contiguous()


def _state(initial_state: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if initial_state is None else initial_state.to(dtype).contiguous()
