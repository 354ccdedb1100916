"""The fast path of the low-rank convolution for NVIDIA GPUs of compute capability 8.0 and later, in Gluon.

One launch serves a group of tensors (queries, keys and values, say), which share B and T but not their channels; a
single tensor is a group of one. Some of the group may be rotated (RoPE) by the same kernels. `covers_group` says
whether this path serves a call, in words where it does not; `forward_group` and `backward_group` trust that it does.
Configurations follow from shapes and the device by rule: nothing is tried out at run time. A compiled kernel serves
all B, T and channels, but for one switch: whether all channels are multiples of 256.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .rotary import Rotary

try:
    from .lowrank_gluon_backward import lowrank_backward_kernel
    from .lowrank_gluon_forward import lowrank_forward_kernel
    from .lowrank_gluon_reduction import add_partial_sums, lowrank_state_gradient_kernel

    MISSING = None
except (ImportError, AttributeError) as error:
    # Gluon is young: its names move between versions of Triton, and `experimental` may go.
    MISSING = f"this Triton's Gluon does not fit: {error}"

__all__ = [
    "Plan",
    "backward",
    "backward_group",
    "covers",
    "covers_group",
    "forward",
    "forward_group",
    "plan_backward_group",
]

RUNS = 8
WARP_CHANNELS = 32
RANKS = 16
TAPS = 4
# Elements in 16 bytes, as which the kernels count the strides of x.
VECTOR = 8
FORWARD_RUN_LENGTH = 16
FORWARD_WARPS = 4
FORWARD_STAGES = 6
BACKWARD_STAGES = 4
# What a thread block of the backward costs before and after its loop, counted in tokens of a run.
BACKWARD_OVERHEAD = 12
MAX_GRID = 65535
PARAMETER_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (32, 64, 128)

Optionals = Sequence[torch.Tensor | None]


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
    """None where this path serves the call for a single tensor, otherwise why it does not."""
    return covers_group([x], coefficients.unsqueeze(2), [basis], [static_filter], positions, [initial_state], None)


def covers_group(
    xs: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    bases: Sequence[torch.Tensor],
    static_filters: Optionals,
    positions: torch.Tensor | None,
    initial_states: Optionals,
    rotary: Rotary | None,
) -> str | None:
    """None where this path serves the call for a group, otherwise why it does not.

    xs: (B, T, D) each, with a D of its own. coefficients: (B, T, len(xs), R). bases: (R, 4, D) each. static_filters:
    (4, D) each, or all None. initial_states: (B, 3, D) each, or all None.
    """
    if MISSING is not None:
        return MISSING
    batch, tokens, _ = xs[0].shape
    rank, kernel_size, _ = bases[0].shape
    if kernel_size != TAPS:
        return f"W is {kernel_size}, not {TAPS}"
    if rank + (static_filters[0] is not None) > RANKS:
        return f"R is {rank}: with the static filter as one more, at most {RANKS} fit"
    for tensor in (coefficients, *bases, *static_filters):
        if tensor is not None and tensor.dtype not in PARAMETER_DTYPES:
            return f"a parameter is {tensor.dtype}"
    for kind in (bases, static_filters, initial_states):
        dtypes = {None if tensor is None else tensor.dtype for tensor in kind}
        if len(dtypes) > 1:
            return f"the group mixes {' and '.join(sorted(map(str, dtypes)))}"
    for x in xs:
        if x.dtype != torch.bfloat16:
            return f"x is {x.dtype}, not torch.bfloat16"
        channels = x.shape[2]
        if channels % (FORWARD_WARPS * WARP_CHANNELS) or channels == 0:
            return f"D is {channels}, no multiple of {FORWARD_WARPS * WARP_CHANNELS}"
        # Offsets within a thread block are 32-bit.
        if max(channels, x.stride(1), coefficients.stride(1)) >= 1 << 19:
            return (
                f"tokens of x or coefficients are {max(x.stride(1), coefficients.stride(1))} elements apart: too far"
            )
    if batch == 0 or tokens == 0:
        return "the batch is empty"
    if batch > MAX_GRID or tokens > MAX_GRID * RUNS * FORWARD_RUN_LENGTH:
        return f"B, T are {batch}, {tokens}: more than one grid holds"
    if (reason := _uncovered_rotary(xs, rotary)) is not None:
        return reason
    if xs[0].device.type != "cuda" or torch.version.hip is not None:
        return "the device is no NVIDIA GPU"
    return _device_lacks(xs[0].device.index, _head_dim(rotary))


def _uncovered_rotary(xs: Sequence[torch.Tensor], rotary: Rotary | None) -> str | None:
    if not _head_dim(rotary):
        return None
    if rotary.head_dim not in HEAD_DIMS:
        return f"RoPE turns heads of {rotary.head_dim} channels, not one of {HEAD_DIMS}"
    if rotary.cos.shape[-1] != rotary.head_dim:
        return f"RoPE turns {rotary.cos.shape[-1]} of the {rotary.head_dim} channels of a head, not all"
    for tensor in (rotary.cos, rotary.sin):
        if tensor.dtype != torch.bfloat16:
            return f"RoPE's cos and sin are {tensor.dtype}, not torch.bfloat16"
    for x, rotated in zip(xs, rotary.rotated, strict=True):
        if rotated and x.shape[2] % rotary.head_dim:
            return f"D is {x.shape[2]}, no multiple of the {rotary.head_dim} channels of a head"
    return None


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
    tensors = [x], coefficients.unsqueeze(2), [basis], [static_filter]
    return forward_group(*tensors, residual, positions, [initial_state], None)[0]


def forward_group(
    xs: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    bases: Sequence[torch.Tensor],
    static_filters: Optionals,
    residual: bool,
    positions: torch.Tensor | None,
    initial_states: Optionals,
    rotary: Rotary | None,
) -> list[torch.Tensor]:
    """y (B, T, D) of each member of the group, contiguous; arguments as for `covers_group`.

    A member that `rotary` rotates has the same bits as its convolution followed by transformers'
    `apply_rotary_pos_emb`. Only the first half of the last dimension of cos and sin is read: transformers makes
    them as `cat((freqs, freqs))`.
    """
    batch, tokens, _ = xs[0].shape
    ys = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    block = FORWARD_WARPS * WARP_CHANNELS
    group = _kernel_inputs(xs, coefficients, bases, static_filters, positions, initial_states, rotary)
    with torch.cuda.device(xs[0].device):
        lowrank_forward_kernel[(sum(group["channels"]) // block, -(-tokens // (RUNS * FORWARD_RUN_LENGTH)), batch)](
            **group,
            y_ptrs=tuple(ys),
            T=tokens,
            L=FORWARD_RUN_LENGTH,
            WARPS=FORWARD_WARPS,
            STAGES=FORWARD_STAGES,
            RESIDUAL=residual,
            num_warps=FORWARD_WARPS,
        )
    return ys


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
    tensors = [dy], [x], coefficients.unsqueeze(2), [basis], [static_filter]
    dx, dcoefficients, dbasis, dstatic, dstate = backward_group(*tensors, residual, positions, [initial_state], None)
    return dx[0], dcoefficients.squeeze(2), dbasis[0], dstatic[0], dstate[0]


def backward_group(
    dys: Sequence[torch.Tensor],
    xs: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    bases: Sequence[torch.Tensor],
    static_filters: Optionals,
    residual: bool,
    positions: torch.Tensor | None,
    initial_states: Optionals,
    rotary: Rotary | None,
) -> tuple[
    list[torch.Tensor],
    torch.Tensor,
    list[torch.Tensor],
    list[torch.Tensor] | list[None],
    list[torch.Tensor] | list[None],
]:
    """dxs, dcoefficients (B, T, len(xs), R), dbases, dstatic_filters, dinitial_states, in the dtypes of the inputs.

    All are contiguous. dys: (B, T, D) each; the rest as for `covers_group`.
    """
    batch, tokens, _ = xs[0].shape
    device = xs[0].device
    channels = tuple(x.shape[2] for x in xs)
    plan = plan_backward_group(batch, tokens, channels, _head_dim(rotary), device.index)
    block = plan.warps * WARP_CHANNELS
    blocks = sum(channels) // block
    chunks = batch * plan.chunks
    pairs = plan.run_length // 2
    dxs, dbases, dstatics, dstates = map(_like, (xs, bases, static_filters, initial_states))
    dcoefficients = torch.empty(coefficients.shape, dtype=coefficients.dtype, device=device)
    dz_partial = torch.empty((blocks, chunks, pairs, 2 * RUNS, RANKS), dtype=torch.float32, device=device)
    du_partial = torch.empty((chunks, RANKS, TAPS, sum(channels)), dtype=torch.float32, device=device)
    group = _kernel_inputs(xs, coefficients, bases, static_filters, positions, initial_states, rotary)
    dys = tuple(_aligned(dy) for dy in dys)
    with torch.cuda.device(device):
        lowrank_backward_kernel[(blocks, plan.chunks, batch)](
            **group,
            dy_ptrs=dys,
            dx_ptrs=tuple(dxs),
            dz_partial_ptr=dz_partial,
            du_partial_ptr=du_partial,
            T=tokens,
            L=plan.run_length,
            MAX_L=plan.max_run_length,
            WARPS=plan.warps,
            STAGES=BACKWARD_STAGES,
            RESIDUAL=residual,
            num_warps=plan.warps,
        )
        add_partial_sums(dz_partial, du_partial, dcoefficients, dbases, dstatics)
        if initial_states[0] is not None:
            del group["x_ptrs"], group["x_strides"], group["state_ptrs"]
            block = FORWARD_WARPS * WARP_CHANNELS
            lowrank_state_gradient_kernel[(sum(channels) // block, batch)](
                **group,
                dy_ptrs=dys,
                dstate_ptrs=tuple(dstates),
                T=tokens,
                BLOCK=block,
                num_warps=FORWARD_WARPS,
                # Contraction would skip the roundings of RoPE.
                enable_fp_fusion=False,
            )
    return dxs, dcoefficients, dbases, dstatics, dstates


@functools.lru_cache(maxsize=1024)
def plan_backward_group(batch: int, tokens: int, channels: tuple[int, ...], head_dim: int, device_index: int) -> Plan:
    """The division of work for one device, by rule: few waves of thread blocks, each as long as the next.

    channels: those of each member. head_dim: 0 without RoPE.
    """
    device = torch.cuda.get_device_properties(device_index)
    limits = device.multi_processor_count, device.shared_memory_per_block_optin
    return divide_work(batch, tokens, channels, head_dim, *limits)


def divide_work(
    batch: int, tokens: int, channels: tuple[int, ...], head_dim: int, processors: int, shared_memory: int
) -> Plan:
    """`plan_backward_group` for a device of so many multiprocessors and bytes of shared memory for a thread block."""

    def fits(warps: int, max_run_length: int) -> bool:
        return _shared_memory(warps, max_run_length, head_dim) <= shared_memory

    warps = 8 if all(size % 256 == 0 for size in channels) and fits(8, 64) else 4
    blocks = batch * (sum(channels) // (warps * WARP_CHANNELS))
    # A thread block of 4 warps is better off beside another one than with longer runs.
    lengths = (256, 128, 64) if warps == 8 else (128, 64)
    max_run_length = next((length for length in lengths if fits(warps, length)), 64)
    if 2 * _shared_memory(warps, max_run_length, head_dim) <= shared_memory:
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


def _shared_memory(warps: int, max_run_length: int, head_dim: int = 0) -> int:
    """Bytes of shared memory that a thread block of the backward uses."""
    block = warps * WARP_CHANNELS
    rings = BACKWARD_STAGES * 2 * RUNS * (2 * block + head_dim) * 2
    bases = 2 * RANKS * TAPS * block * 2
    dz = warps * 2 * RUNS * RANKS * 4
    coefficients = RUNS * (max_run_length + 4) * RANKS * 2
    positions = (max_run_length // 2 + 2) * RUNS * 4
    return rings + bases + dz + coefficients + positions


@functools.cache
def _device_lacks(index: int, head_dim: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"the GPU's compute capability is {capability[0]}.{capability[1]}, below 8.0"
    shared_memory = torch.cuda.get_device_properties(index).shared_memory_per_block_optin
    if shared_memory < _shared_memory(4, 64, head_dim):
        return f"the GPU has {shared_memory} bytes of shared memory for a thread block, too few"
    return None


def _head_dim(rotary: Rotary | None) -> int:
    """The channels of a head that RoPE turns; 0 where it turns no member."""
    return rotary.head_dim if rotary is not None and any(rotary.rotated) else 0


def _kernel_inputs(
    xs: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    bases: Sequence[torch.Tensor],
    static_filters: Optionals,
    positions: torch.Tensor | None,
    initial_states: Optionals,
    rotary: Rotary | None,
) -> dict[str, object]:
    """The arguments that forward and backward share. Copies what does not lie as the kernels want it."""
    batch = xs[0].shape[0]
    head_dim = _head_dim(rotary)
    rows = [_token_rows(x) for x in xs]
    # Any alignment will do, but tokens have to be one stride apart.
    if coefficients.stride(3) != 1 or not _even(coefficients):
        coefficients = coefficients.contiguous()
    states = [None if state is None else state.to(xs[0].dtype).contiguous() for state in initial_states]
    cos, cos_tokens = _angles(rotary.cos) if head_dim else (None, 0)
    sin, sin_tokens = _angles(rotary.sin) if head_dim else (None, 0)
    if cos_tokens != sin_tokens:
        cos, sin, cos_tokens = rotary.cos.contiguous(), rotary.sin.contiguous(), cos.shape[1]
    return {
        "x_ptrs": tuple(x for x, _ in rows),
        "coefficients_ptr": coefficients,
        "basis_ptrs": tuple(basis.contiguous() for basis in bases),
        "static_ptrs": _tuple([None if static is None else static.contiguous() for static in static_filters]),
        "positions_ptr": None if positions is None else positions.expand(batch, -1).contiguous(),
        "state_ptrs": _tuple(states),
        "cos_ptr": cos,
        "sin_ptr": sin,
        "channels": tuple(x.shape[2] for x in xs),
        "x_strides": tuple(stride // VECTOR for _, stride in rows),
        "z_stride": coefficients.stride(1),
        "z_member_stride": coefficients.stride(2),
        "rotary_tokens": cos_tokens,
        "R": coefficients.shape[3],
        "HEAD_DIM": head_dim,
        "ROTATED": rotary.rotated if head_dim else (False,) * len(xs),
    }


def _even(tensor: torch.Tensor) -> bool:
    """Whether all tokens of a (B, T, ...) tensor are one stride apart. Slices of a fused projection are."""
    batch, tokens = tensor.shape[:2]
    return tokens > 1 and (batch == 1 or tensor.stride(0) == tokens * tensor.stride(1))


def _token_rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x, copied only if need be, and the stride of its tokens: asynchronous copies want rows aligned to 16 bytes."""
    if x.stride(2) == 1 and _even(x) and x.stride(1) % VECTOR == 0 and x.data_ptr() % 16 == 0:
        return x, x.stride(1)
    return _aligned(x), x.shape[2]


def _angles(angles: torch.Tensor) -> tuple[torch.Tensor, int]:
    """cos or sin (B or 1, T, head_dim), one sequence after the other, and how many tokens these are apart: T or 0."""
    batch, tokens, _ = angles.shape
    if angles.stride(0) == 0 or batch == 1:
        return _aligned(angles[:1]), 0
    return _aligned(angles), tokens


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _like(tensors: Optionals) -> list[torch.Tensor] | list[None]:
    return [None if a is None else torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in tensors]


def _tuple(tensors: Optionals) -> tuple[torch.Tensor, ...] | None:
    """What kernels get for something that either all members of a group have or none."""
    return None if tensors[0] is None else tuple(tensors)
