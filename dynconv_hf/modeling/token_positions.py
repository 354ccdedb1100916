"""How far back each token's own sequence reaches: one answer to every way of marking padding and documents.

A convolution must see only real tokens of its own document. Callers of a transformers model say where documents
begin in several ways; each gives an upper bound on how many tokens of the same document lie before a token, and the
smallest of them is the `positions` argument of the operation.
"""

import torch
import torch.nn.functional as F

from ..kernels import MAX_KERNEL_SIZE

__all__ = ["token_positions"]

# What a mask that is added to the scores of attention hides; float16 has no number below -65504.
HIDDEN = -1e4


def token_positions(
    shape: tuple[int, int],
    *,
    past_length: int | torch.Tensor = 0,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    whole_mask: torch.Tensor | None = None,
    kernel_size: int = MAX_KERNEL_SIZE,
    jumps_begin_documents: bool = True,
) -> torch.Tensor | None:
    """The index of each token within its own sequence, as far as a convolution can tell the difference.

    Args:
        shape: (B, T).
        past_length: tokens already in the cache, before the first of these T.
        attention_mask: (B, T), or (B, past_length + T) or longer; 0 marks padding.
        position_ids: (B, T) or (1, T); a step other than +1 begins a document, as in transformers' own masks.
        cu_seq_lens_q: (documents + 1,), cumulative lengths over the B * T tokens in a row.
        seq_idx: (B, T) or (1, T), the number of each token's document.
        whole_mask: (B or 1, heads or 1, T, past_length + T or more), what each token attends to: True or 0 where it
            does, False or a large negative number where it does not.
        kernel_size: W; what lies W or more tokens back is not looked at.
        jumps_begin_documents: whether `position_ids` that jump ahead begin a document; a step back always does.

    Returns:
        (B, T) or (1, T) int32: exact up to the largest kernel size, at least that beyond it; None where nothing
        marks a boundary, and, for a token on a CPU, where no boundary is near enough.

    Raises:
        ValueError: a shape does not fit; the message holds it. A mask has padding between tokens of one text, or
            hides a token but shows the one before it: a convolution cannot step over what is hidden.
    """
    positions = None
    if position_ids is not None:
        positions = _from_position_ids(position_ids, shape, jumps_begin_documents)
    if cu_seq_lens_q is not None:
        positions = _least(positions, _from_cu_seq_lens(cu_seq_lens_q, shape))
    if seq_idx is not None:
        positions = _least(positions, _from_seq_idx(seq_idx, shape))
    if attention_mask is not None:
        bound = _from_mask(attention_mask, shape, past_length)
        _check_padding(attention_mask, bound, positions, past_length, kernel_size)
        positions = _least(bound, positions)
    if whole_mask is not None:
        positions = _least(_from_whole_mask(whole_mask, shape, past_length, kernel_size), positions)
    if positions is None or _is_inside(positions, kernel_size):
        return None
    return positions.to(torch.int32)


def _is_inside(positions: torch.Tensor, kernel_size: int) -> bool:
    """Whether a token on a CPU has all the inputs that it reads: the convolutions need not ask each again then."""
    if positions.shape[1] != 1 or positions.device.type != "cpu" or not _can_read(positions):
        return False
    if torch.jit.is_tracing():
        # The answer for these inputs would be recorded as the one for all.
        return False
    return bool((positions >= kernel_size - 1).all())


def _least(bound: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    """The smaller of two bounds for each token, where the first one lies; None stands for no bound."""
    if bound is None or other is None:
        return other if bound is None else bound
    return torch.minimum(bound, other.to(bound.device))


def _from_mask(mask: torch.Tensor, shape: tuple[int, int], past_length: int | torch.Tensor) -> torch.Tensor:
    batch, tokens = shape
    if mask.shape[0] != batch or mask.shape[1] < tokens:
        raise ValueError(
            f"attention_mask must have shape (batch, past + tokens), here ({batch}, at least {tokens}), "
            f"got {tuple(mask.shape)}"
        )
    follows_padding = torch.zeros_like(mask, dtype=torch.bool)
    follows_padding[:, 1:] = mask[:, :-1] == 0
    positions = _since_start(follows_padding)
    if mask.shape[1] == tokens:
        return positions
    if isinstance(past_length, int) and mask.shape[1] < past_length + tokens:
        raise ValueError(
            f"attention_mask must cover the {past_length} tokens in the cache and the {tokens} new ones, "
            f"got {tuple(mask.shape)}"
        )
    return positions.index_select(1, past_length + torch.arange(tokens, device=mask.device))


def _can_read(mask: torch.Tensor) -> bool:
    """Whether the values of a mask can be looked at: not by a compiled model, and not while a CUDA graph is made."""
    return not torch.compiler.is_compiling() and not (mask.is_cuda and torch.cuda.is_current_stream_capturing())


def _check_padding(
    mask: torch.Tensor,
    bound: torch.Tensor,
    other_bound: torch.Tensor | None,
    past_length: int | torch.Tensor,
    kernel_size: int,
) -> None:
    """Refuses padding inside of a text: the convolutions would take the tokens after it for a text of their own."""
    if not _can_read(mask):
        return
    if not (mask[:, 1:] < mask[:, :-1]).any():
        # Padding on the left, or none: the usual case, and one that costs a generated token little.
        return
    tokens = bound.shape[1]
    index = torch.arange(tokens, device=mask.device) + (past_length if mask.shape[1] > tokens else 0)
    is_real = mask != 0
    cut = (bound < kernel_size - 1) & is_real.index_select(1, index)
    # Where all of the padding lies before the first token of a row, nothing is beyond it.
    first_real = is_real.to(torch.int8).argmax(dim=1, keepdim=True)
    cut &= bound < index - first_real
    if other_bound is not None:
        cut &= bound < other_bound.to(bound.device)
    if cut.any():
        row = int(cut.any(dim=1).nonzero()[0])
        raise ValueError(
            f"attention_mask has padding between the tokens of row {row}, and convolutions with kernel_size="
            f"{kernel_size} cannot step over it; pad on the left, or call the model with each row alone. Where a "
            "document begins after the padding, say so with position_ids that start again"
        )


def _from_whole_mask(
    mask: torch.Tensor, shape: tuple[int, int], past_length: int | torch.Tensor, kernel_size: int
) -> torch.Tensor:
    batch, tokens = shape
    if mask.shape[0] not in (1, batch) or mask.shape[2] != tokens or mask.shape[3] < tokens:
        raise ValueError(
            f"a 4-D attention_mask must have shape (batch, heads, tokens, past + tokens), here ({batch}, any, {tokens}"
            f", at least {tokens}), got {tuple(mask.shape)}"
        )
    is_seen = mask if mask.dtype == torch.bool else mask > HIDDEN
    is_seen = is_seen.any(dim=1)
    index = torch.arange(tokens, device=mask.device) + past_length
    # (B, T, W): whether a token sees itself, the one before it, and so on.
    before = index[:, None] - torch.arange(kernel_size, device=mask.device)
    taps = is_seen.gather(2, before.clamp(min=0).expand(is_seen.shape[0], -1, -1)) | (before < 0)
    reached = taps[..., 1:].to(torch.int64).cumprod(dim=-1)
    if _can_read(mask):
        has_hole = (taps[..., 1:] & (before[:, 1:] >= 0) & (reached == 0)).any(dim=-1) & taps[..., 0]
        if has_hole.any():
            row, token = has_hole.nonzero()[0].tolist()
            raise ValueError(
                f"the 4-D attention_mask shows token {token} of row {row} a token behind one that it hides, within "
                f"the {kernel_size} that convolutions read: they cannot step over it. Put branches and documents "
                "into rows of their own"
            )
    count = reached.sum(dim=-1)
    return torch.where(count == kernel_size - 1, count + MAX_KERNEL_SIZE, count)


def _from_position_ids(
    position_ids: torch.Tensor, shape: tuple[int, int], jumps_begin_documents: bool
) -> torch.Tensor:
    _check_rows("position_ids", position_ids, shape)
    starts = torch.zeros_like(position_ids, dtype=torch.bool)
    if jumps_begin_documents:
        starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    else:
        starts[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
    return _since_start(starts, before=position_ids[:, :1])


def _from_cu_seq_lens(cu_seq_lens: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    batch, tokens = shape
    index = torch.arange(batch * tokens, device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
    document = torch.searchsorted(cu_seq_lens, index, right=True) - 1
    return (index - cu_seq_lens[document]).view(batch, tokens)


def _from_seq_idx(seq_idx: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    _check_rows("seq_idx", seq_idx, shape)
    starts = torch.zeros_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return _since_start(starts)


def _since_start(starts: torch.Tensor, before: torch.Tensor | int = MAX_KERNEL_SIZE) -> torch.Tensor:
    """Tokens since the last start in each row of `starts` (B, T); where there is none, `before` more than the index.

    The first token of a row is never marked: what lies before it is for `before` to say.
    The default for `before` is farther back than any tap reaches: it leaves the tokens before the row to the state.
    """
    if starts.shape[1] == 1:
        # Decoding: a scan over one token would cost launches for each.
        return torch.zeros_like(starts, dtype=torch.int64) + before
    index = torch.arange(starts.shape[1], device=starts.device)
    # A running maximum over as many tokens as any tap can reach, and not over all: ONNX has no cummax.
    marked = F.pad(torch.where(starts, index, -1).to(torch.float32), (MAX_KERNEL_SIZE, 0), value=-1.0)
    last_start = F.max_pool1d(marked, MAX_KERNEL_SIZE + 1, stride=1).to(index.dtype)
    return torch.where(last_start >= 0, index - last_start, index + before)


def _check_rows(name: str, tensor: torch.Tensor, shape: tuple[int, int]) -> None:
    batch, tokens = shape
    if tensor.shape not in ((batch, tokens), (1, tokens)):
        raise ValueError(f"{name} must have shape {(batch, tokens)} or {(1, tokens)}, got {tuple(tensor.shape)}")
