"""How far back each token's own sequence reaches: one answer to every way of marking padding and documents.

A convolution must see only real tokens of its own document. Callers of a transformers model say where documents
begin in several ways; each gives an upper bound on how many tokens of the same document lie before a token, and the
smallest of them is the `positions` argument of the operation.
"""

import torch

from ..kernels import MAX_KERNEL_SIZE

__all__ = ["token_positions"]


def token_positions(
    shape: tuple[int, int],
    *,
    past_length: int | torch.Tensor = 0,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The index of each token within its own sequence, as far as a convolution can tell the difference.

    Args:
        shape: (B, T).
        past_length: tokens already in the cache, before the first of these T.
        attention_mask: (B, T), or (B, past_length + T) or longer; 0 marks padding.
        position_ids: (B, T) or (1, T); a step other than +1 begins a document, as in transformers' own masks.
        cu_seq_lens_q: (documents + 1,), cumulative lengths over the B * T tokens in a row.
        seq_idx: (B, T) or (1, T), the number of each token's document.

    Returns:
        (B, T) or (1, T) int32: exact up to the largest kernel size, at least that beyond it; None where nothing
        marks a boundary.

    Raises:
        ValueError: a shape does not fit; the message holds it.
    """
    bounds = []
    if attention_mask is not None:
        bounds.append(_from_mask(attention_mask, shape, past_length))
    if position_ids is not None:
        bounds.append(_from_position_ids(position_ids, shape))
    if cu_seq_lens_q is not None:
        bounds.append(_from_cu_seq_lens(cu_seq_lens_q, shape))
    if seq_idx is not None:
        bounds.append(_from_seq_idx(seq_idx, shape))
    if not bounds:
        return None
    positions = bounds[0]
    for bound in bounds[1:]:
        positions = torch.minimum(positions, bound.to(positions.device))
    return positions.to(torch.int32)


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


def _from_position_ids(position_ids: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    _check_rows("position_ids", position_ids, shape)
    starts = torch.zeros_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
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
    last_start = torch.where(starts, index, -1).cummax(dim=1).values
    return torch.where(last_start >= 0, index - last_start, index + before)


def _check_rows(name: str, tensor: torch.Tensor, shape: tuple[int, int]) -> None:
    batch, tokens = shape
    if tensor.shape not in ((batch, tokens), (1, tokens)):
        raise ValueError(f"{name} must have shape {(batch, tokens)} or {(1, tokens)}, got {tuple(tensor.shape)}")
