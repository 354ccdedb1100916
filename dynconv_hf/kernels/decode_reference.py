"""The decode step in eager PyTorch: what `decode_step` computes, and the path for a token on a CPU.

Shape suffixes: B batch, D channels, S = W - 1 inputs of a state.
"""

import torch
import torch.nn.functional as F

from .reference import lowrank_reference
from .rotary import Rotary, rotate

__all__ = ["decode_step_reference"]


def decode_step_reference(
    hidden_states: torch.Tensor,
    xs: list[torch.Tensor],
    filter_weights: list[torch.Tensor],
    bases: list[torch.Tensor],
    static_filters: list[torch.Tensor],
    states: list[torch.Tensor],
    positions: torch.Tensor | None,
    rotary: Rotary | None,
    residual: bool,
) -> list[torch.Tensor]:
    """One token of a group of low-rank convolutions; arguments, shapes and dtypes are those of `decode_step`.

    The states are shifted in place. Without gradients.
    """
    hidden_states = hidden_states.to(filter_weights[0].dtype)
    ys = []
    for g, (x_B1D, state_BDS) in enumerate(zip(xs, states, strict=True)):
        y_B1D, final_state_BSD = lowrank_reference(
            x_B1D,
            F.linear(hidden_states, filter_weights[g]),
            bases[g],
            static_filter_WD=static_filters[g] if static_filters else None,
            residual=residual,
            positions_BT=positions,
            initial_state_BSD=state_BDS.transpose(1, 2),
        )
        state_BDS.copy_(final_state_BSD.transpose(1, 2))
        ys.append(rotate(y_B1D, rotary) if rotary is not None and rotary.rotated[g] else y_B1D)
    return ys
