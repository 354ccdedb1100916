"""The short convolution as a module: parameters, their start, and how a token makes its filter."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import MAX_KERNEL_SIZE, headwise_dynamic_conv1d, lowrank_dynamic_conv1d, static_conv1d

__all__ = [
    "DynamicShortConv",
    "FilterProjection",
    "has_plain_parameters",
    "is_token_on_cpu",
    "padded_rows",
    "stack_rows",
]

# cuBLAS is slow where rows of its result do not begin at a multiple of 16 bytes.
ROWS = 16


class FilterProjection(nn.Module):
    """Makes filters from hidden states: (B, T, in_features) to (B, T, out_features), without a bias.

    Not an `nn.Linear` on purpose: quantisers, and PEFT's "all-linear", replace every `nn.Linear` they find. The
    filters stay in their own dtype and are trained in full.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states.to(self.weight.dtype)
        if self.out_features % ROWS == 0 or is_token_on_cpu(hidden_states) or not has_plain_parameters(self):
            return F.linear(hidden_states, self.weight)
        return F.linear(hidden_states, stack_rows([self.weight]))[..., : self.out_features]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class DynamicShortConv(nn.Module):
    """A causal short convolution whose filter each token makes from its own hidden state.

    Args:
        hidden_size: size of the hidden states that make the filters (unused by mode "static").
        channels: D, the channels that are convolved.
        mode: "lowrank", "headwise" or "static".
        kernel_size: W, from 1 to 8.
        rank: R, for "lowrank".
        head_size: channels that share one filter, for "headwise"; divides `channels`.
        static: add a static filter; always so in mode "static".
        residual: add the input to the output.
        init: "uniform" draws the static filter from U(-1/sqrt(W), 1/sqrt(W)) and starts the dynamic part at zero
            output; "identity" starts both at zero.
        init_std: standard deviation of `filter_proj` in mode "lowrank".

    Parameters (their names are the checkpoint format): `filter_proj.weight` (R, hidden_size) or
    (H * W, hidden_size), `basis` (R, W, D), `static_filter` (W, D).

    Source: Sieberling et al. 2026, arXiv 2606.03825.
    """

    def __init__(
        self,
        hidden_size: int,
        channels: int,
        *,
        mode: Literal["lowrank", "headwise", "static"] = "lowrank",
        kernel_size: int = 4,
        rank: int = 15,
        head_size: int = 16,
        static: bool = True,
        residual: bool = True,
        init: Literal["uniform", "identity"] = "uniform",
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if mode not in ("lowrank", "headwise", "static"):
            raise ValueError(f'mode must be "lowrank", "headwise" or "static", got {mode!r}')
        if not 1 <= kernel_size <= MAX_KERNEL_SIZE:
            raise ValueError(f"kernel_size must be from 1 to {MAX_KERNEL_SIZE}, got {kernel_size}")
        if mode == "lowrank" and rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if mode == "static" and not static:
            raise ValueError('static must be True in mode "static", which has no other filter; got False')
        if mode == "headwise" and (head_size < 1 or channels % head_size):
            raise ValueError(f"head_size must divide the channels, got {head_size} for {channels} channels")
        if init not in ("uniform", "identity"):
            raise ValueError(f'init must be "uniform" or "identity", got {init!r}')
        self.hidden_size = hidden_size
        self.channels = channels
        self.mode = mode
        self.heads = channels // head_size if mode == "headwise" else None
        self.kernel_size = kernel_size
        self.residual = residual
        self.init = init
        self.init_std = init_std

        self.filter_proj = None
        if mode == "lowrank":
            self.filter_proj = FilterProjection(hidden_size, rank)
            self.basis = nn.Parameter(torch.empty(rank, kernel_size, channels))
        elif mode == "headwise":
            self.filter_proj = FilterProjection(hidden_size, self.heads * kernel_size)
        if static:
            self.static_filter = nn.Parameter(torch.empty(kernel_size, channels))
        else:
            self.register_parameter("static_filter", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts the dynamic part at zero output, and the static filter as `init` says."""
        if self.mode == "lowrank":
            # Only one factor of the product may start at zero: with both, neither would ever get a gradient.
            nn.init.normal_(self.filter_proj.weight, std=self.init_std)
            nn.init.zeros_(self.basis)
        elif self.mode == "headwise":
            nn.init.zeros_(self.filter_proj.weight)
        if self.static_filter is None:
            return
        if self.init == "identity":
            nn.init.zeros_(self.static_filter)
            return
        bound = 1 / math.sqrt(self.kernel_size)
        nn.init.uniform_(self.static_filter, -bound, bound)

    def forward(
        self,
        x: torch.Tensor,
        hidden_states: torch.Tensor,
        positions: torch.Tensor | None = None,
        initial_state: torch.Tensor | None = None,
        return_final_state: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Convolves x with the filters that the hidden states make.

        Args:
            x: (B, T, channels), the output of a linear layer.
            hidden_states: (B, T, hidden_size), what that layer read; ignored in mode "static".
            positions: (B, T) or (1, T), integer; the index of each token within its own sequence.
            initial_state: (B, W - 1, channels), the inputs before the first token, oldest first.
            return_final_state: also return the state for the next call.

        Returns:
            y (B, T, channels) in x's dtype, or (y, final_state).
        """
        filters = None if self.filter_proj is None else self.filter_proj(hidden_states)
        options = {"initial_state": initial_state, "return_final_state": return_final_state}
        return self.convolve(x, filters, positions=positions, **options)

    def convolve(self, x: torch.Tensor, filters: torch.Tensor | None, **options: Any) -> Any:
        """The convolution with filters (B, T, R or H * W) that `filter_proj` has made, None in mode "static"."""
        options["residual"] = self.residual
        if self.mode == "static":
            return static_conv1d(x, self.static_filter, **options)
        if self.mode == "lowrank":
            return lowrank_dynamic_conv1d(x, filters, self.basis, static_filter=self.static_filter, **options)
        filters_BTHW = filters.unflatten(-1, (-1, self.kernel_size))
        return headwise_dynamic_conv1d(x, filters_BTHW, static_filter=self.static_filter, **options)

    def extra_repr(self) -> str:
        return f"{self.channels}, mode={self.mode!r}, kernel_size={self.kernel_size}, residual={self.residual}"


def is_token_on_cpu(hidden_states: torch.Tensor) -> bool:
    """Whether to leave weights as they are: for one token, to stack or to fill them up costs more than the product."""
    return hidden_states.shape[1] == 1 and hidden_states.device.type == "cpu"


def padded_rows(weight: torch.Tensor) -> int:
    """The rows of a matrix, filled up to a multiple of 16."""
    return -(-weight.shape[0] // ROWS) * ROWS


def stack_rows(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Matrices (rows, N) above each other, each filled up with rows of zeros to `padded_rows`."""
    zeros = weights[0].new_zeros(ROWS, weights[0].shape[1])
    pieces = []
    for weight in weights:
        pieces.append(weight)
        missing = padded_rows(weight) - weight.shape[0]
        if missing:
            pieces.append(zeros[:missing])
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def has_plain_parameters(module: nn.Module) -> bool:
    """Whether the module's own parameters are ordinary tensors: not divided over devices, not quantised."""
    # A loop, not `all`: every group of convolutions asks for every token.
    for parameter in module._parameters.values():
        if parameter is not None and type(parameter) not in (nn.Parameter, torch.Tensor):
            return False
    return True
