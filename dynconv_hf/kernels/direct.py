"""Convolutions whose filters lie in memory, in Triton: head-wise filters, a static filter, or their sum.

What launches the kernels; `direct_tiles` says how they divide the work. Sizes follow from shapes and the device by
rule: nothing is tried out at run time, and a compiled kernel serves all B and T.
"""

from typing import NamedTuple

import torch
import triton

from .direct_backward import direct_backward_kernel
from .direct_forward import direct_forward_kernel
from .launch import flat_rows, multiprocessors, on_device, rows, state_rows, up_to_registers
from .reduction import sum_partials

__all__ = ["backward", "forward"]

_FORWARD_WARPS = 4
# Smaller programs: more of them side by side, for as many registers.
_BACKWARD_WARPS = 2
# Channels of a thread: 16 bytes of bfloat16, or half of that, where gradients take twice the registers.
_FORWARD_VECTOR = 8
_BACKWARD_VECTOR = 4
# The forward has nothing to add up over a run: short ones, so that programs that run side by side read what lies
# side by side.
_FORWARD_RUN = 8
# No run is shorter than the state, of at most 7 tokens.
_SHORTEST_RUN = 8
# Programs on one multiprocessor; all run side by side, as their registers allow.
_BACKWARD_PROGRAMS = 6


class _Division(NamedTuple):
    """How the channels are divided: `sizes` for the kernel, blocks of channels, parts of a head."""

    sizes: dict[str, int]
    blocks: int
    parts: int
    lanes: int


class _FilterRows(NamedTuple):
    """Filters (B, T, H, W) as words of `word` bits, `words` for each head; strides count words."""

    tensor: torch.Tensor
    stride_b: int
    stride_t: int
    alignment: int
    word: int
    words: int


def _divide_channels(heads: int, head_size: int, vector: int, warps: int, kernel_size: int, words: int) -> _Division:
    """A thread's vector of channels is of one head, or of as many as their filters are 16 bytes: two, if whole.

    Loads of 16 bytes of both then leave each filter in the thread that holds its channels. Longer filters keep more
    in registers: shorter vectors.
    """
    vector = vector if kernel_size <= 4 else vector // 2
    if words > 0:
        vector = min(vector, 2 * triton.next_power_of_2(head_size))
    width = min(32 * vector, triton.next_power_of_2(heads * head_size))
    part = min(width, triton.next_power_of_2(head_size))
    sizes = {"RUNS": 32 * warps * vector // width, "BH": width // part, "BP": part}
    parts = triton.cdiv(head_size, part)
    return _Division(sizes, triton.cdiv(heads, width // part) * parts, parts, max(1, part // vector))


def _filter_rows(filters: torch.Tensor | None, x: torch.Tensor) -> _FilterRows:
    """The filters; without any, a stand-in that the kernel does not read."""
    if filters is None:
        return _FilterRows(x, 0, 0, 1, 8 * x.element_size(), 0)
    tensor, stride_b, stride_t, alignment = rows(filters)
    kernel_size = filters.shape[3]
    word = _word_bits(tensor, kernel_size, (stride_b * alignment, stride_t))
    taps = word // (8 * tensor.element_size())
    if alignment == 1:
        stride_b //= taps
    else:
        alignment //= taps
    return _FilterRows(tensor, stride_b, stride_t // taps, alignment, word, kernel_size // taps)


def _word_bits(tensor: torch.Tensor, kernel_size: int, strides: tuple[int, ...] = (), lanes: int = 1) -> int:
    """Bits of the largest word, of 64, 32 or one element's, that divides the taps of a head and where they lie.

    Threads that share a head (`lanes` of them) write different words of it: each should have one, if taps suffice.
    """
    size = tensor.element_size()
    for word in (8, 4):
        aligned = tensor.data_ptr() % word == 0 and all(n * size % word == 0 for n in (kernel_size, *strides))
        if size < word and aligned and (lanes == 1 or word * lanes <= kernel_size * size):
            return 8 * word
    return 8 * size


def forward(
    x: torch.Tensor,
    filters: torch.Tensor | None,
    static_filter: torch.Tensor | None,
    residual: bool,
    positions: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> torch.Tensor:
    """y (B, T, D), contiguous, in x's dtype; see `api` for the arguments. At least one filter is given."""
    batch, tokens, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    heads, kernel_size = _heads_and_kernel_size(filters, static_filter)
    head_size = channels // heads
    x_rows, f_rows, position_rows = rows(x), _filter_rows(filters, x), flat_rows(positions, x)
    # As for `_backward_step`; kernels of short filters are short enough.
    step = 4 if kernel_size <= 4 else 2
    division = _divide_channels(heads, head_size, _FORWARD_VECTOR, _FORWARD_WARPS, kernel_size, f_rows.words)
    chunks = triton.cdiv(tokens, division.sizes["RUNS"] * _FORWARD_RUN)
    with on_device(x):
        direct_forward_kernel[(division.blocks * chunks * batch,)](
            x_rows.tensor,
            f_rows.tensor,
            x if static_filter is None else static_filter.contiguous(),
            position_rows.tensor,
            state_rows(initial_state, x),
            y,
            tokens,
            x_rows.stride_b,
            x_rows.stride_t,
            f_rows.stride_b,
            f_rows.stride_t,
            position_rows.stride_b,
            position_rows.stride_t,
            _FORWARD_RUN,
            X_ALIGNMENT=x_rows.alignment,
            X_DENSE=x_rows.stride_t == channels,
            F_ALIGNMENT=f_rows.alignment,
            F_DENSE=f_rows.stride_t == heads * f_rows.words,
            WORD=f_rows.word,
            WORDS=f_rows.words,
            HEADS=heads,
            P=head_size,
            W=kernel_size,
            RESIDUAL=residual,
            HAS_STATIC=static_filter is not None,
            HAS_POSITIONS=positions is not None,
            HAS_STATE=initial_state is not None and kernel_size > 1,
            U=step,
            STAGES=_stages(kernel_size, step),
            num_warps=_FORWARD_WARPS,
            **division.sizes,
        )
    return y


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    filters: torch.Tensor | None,
    static_filter: torch.Tensor | None,
    residual: bool,
    positions: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of x, filters, static filter and initial state, each contiguous, in its dtype."""
    gradients = tuple(
        None if a is None else torch.empty(a.shape, dtype=a.dtype, device=a.device)
        for a in (x, filters, static_filter, initial_state)
    )
    dx, dfilters, dstatic, dstate = gradients
    if x.numel() == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return gradients
    batch, tokens, channels = x.shape
    heads, kernel_size = _heads_and_kernel_size(filters, static_filter)
    head_size = channels // heads
    dy_rows, x_rows, f_rows, position_rows = rows(dy), rows(x), _filter_rows(filters, x), flat_rows(positions, x)
    division = _divide_channels(heads, head_size, _BACKWARD_VECTOR, _BACKWARD_WARPS, kernel_size, f_rows.words)
    step = _backward_step(kernel_size, f_rows.words)
    run = _backward_run(batch, tokens, division, step, x.device)
    chunks = batch * triton.cdiv(tokens, division.sizes["RUNS"] * run)
    ds_partials = torch.empty(chunks, kernel_size * channels, dtype=torch.float32, device=x.device)
    df_partials = ds_partials if dfilters is None else dfilters
    if dfilters is not None and division.parts > 1:
        df_partials = torch.empty(division.parts, filters.numel(), dtype=torch.float32, device=x.device)
    with on_device(x):
        direct_backward_kernel[(division.blocks * chunks,)](
            dy_rows.tensor,
            x_rows.tensor,
            f_rows.tensor,
            x if static_filter is None else static_filter.contiguous(),
            position_rows.tensor,
            state_rows(initial_state, x),
            dx,
            df_partials,
            ds_partials,
            state_rows(dstate, x),
            batch,
            tokens,
            dy_rows.stride_b,
            dy_rows.stride_t,
            x_rows.stride_b,
            x_rows.stride_t,
            f_rows.stride_b,
            f_rows.stride_t,
            position_rows.stride_b,
            position_rows.stride_t,
            run,
            DY_ALIGNMENT=dy_rows.alignment,
            DY_DENSE=dy_rows.stride_t == channels,
            X_ALIGNMENT=x_rows.alignment,
            X_DENSE=x_rows.stride_t == channels,
            F_ALIGNMENT=f_rows.alignment,
            F_DENSE=f_rows.stride_t == heads * f_rows.words,
            WORD=f_rows.word,
            WORDS=f_rows.words,
            DF_WORD=_word_bits(df_partials, kernel_size, lanes=division.lanes),
            HEADS=heads,
            P=head_size,
            W=kernel_size,
            RESIDUAL=residual,
            HAS_STATIC=static_filter is not None,
            HAS_POSITIONS=positions is not None,
            HAS_STATE=initial_state is not None and kernel_size > 1,
            LANES=division.lanes,
            U=step,
            STAGES=_stages(kernel_size, step),
            num_warps=_BACKWARD_WARPS,
            **(up_to_registers(255) if kernel_size > 4 or f_rows.words > 2 else {}),
            **division.sizes,
        )
    if dfilters is not None and division.parts > 1:
        sum_partials(df_partials, dfilters)
    if dstatic is not None:
        sum_partials(ds_partials, dstatic)
    return gradients


def _backward_run(batch: int, tokens: int, division: _Division, step: int, device: torch.device) -> int:
    """Tokens of a run: so many that all programs run side by side, each of them as long as the next."""
    programs = _BACKWARD_PROGRAMS * multiprocessors(device)
    chunks = max(1, programs // (division.blocks * batch))
    run = max(_SHORTEST_RUN, triton.cdiv(tokens, chunks * division.sizes["RUNS"]))
    return triton.cdiv(run, step) * step


def _backward_step(kernel_size: int, words: int) -> int:
    """Tokens of a step: the fewer, the faster it is compiled, in a time that grows with the square of the length.

    Two are enough where a head's taps are few words, which are not so many loads; without filters, four compile fast.
    """
    return 2 if kernel_size >= 4 and 0 < words <= 2 else 4


def _stages(kernel_size: int, step: int) -> int:
    """One step is computed while the loads of the others are under way, in shared memory, as far as registers for
    their addresses allow.
    """
    tokens_under_way = 8 if kernel_size <= 4 else 4
    return 1 + tokens_under_way // step


def _heads_and_kernel_size(filters: torch.Tensor | None, static_filter: torch.Tensor | None) -> tuple[int, int]:
    """Without head-wise filters, all channels count as one head."""
    return (1, static_filter.shape[0]) if filters is None else (filters.shape[2], filters.shape[3])
