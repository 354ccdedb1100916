"""How tensor parallelism divides a convolution: parallel styles in transformers' registry, and the plan naming them.

A rank of a column-parallel layer holds a slice of its output channels, and the convolution after it is divided along
the same channels. A row-parallel layer gives every rank all channels, and so does the convolution after it; only the
hidden states that make its filters are divided.

Shape suffixes: B batch, T tokens, R rank.
"""

from typing import Any

import torch
from torch import nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from .configuration_dynconv_llama import CHANNELS_STYLE, COEFFICIENTS_STYLE

__all__ = ["register_parallel_styles"]


def register_parallel_styles() -> None:
    """Makes known to transformers the styles that `DynConvLlamaConfig.base_model_tp_plan` names."""
    ALL_PARALLEL_STYLES.register(CHANNELS_STYLE, ChannelsParallel())
    ALL_PARALLEL_STYLES.register(COEFFICIENTS_STYLE, CoefficientsParallel())


class ChannelsParallel(TensorParallelLayer):
    """Divides `basis` (R, W, D) and `static_filter` (W, D) along D, as the layer before divides its output."""

    def should_use_local_tensors(self, module: nn.Module) -> bool:
        # The operation knows nothing of DTensor: it sees this rank's channels as if they were all.
        return True

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        from torch.distributed.tensor import Shard, distribute_tensor

        whole = getattr(module, param)
        if whole is not None:
            shard = distribute_tensor(whole, mesh, [Shard(whole.ndim - 1)], src_data_rank=None)
            setattr(module, param, nn.Parameter(shard, requires_grad=whole.requires_grad))

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        ranks = mesh.size()
        if module.channels % ranks:
            raise ValueError(
                f"tensor parallelism must divide the {module.channels} channels of a convolution evenly, got {ranks} "
                "ranks; use another tp_size"
            )
        if module.mode == "headwise" and module.heads % ranks:
            raise ValueError(
                f"tensor parallelism must divide the {module.heads} filter heads of a convolution "
                f"({module.channels} channels) evenly, got {ranks} ranks; use another tp_size"
            )
        return super().install_forward(module, mesh)


class CoefficientsParallel(TensorParallelLayer):
    """Every rank makes all coefficients, but uses them on its own channels: the gradient is the sum over ranks."""

    def transform_output_post_forward(self, module: nn.Module, output: torch.Tensor, mesh: Any) -> torch.Tensor:
        if not output.requires_grad:
            return output
        # Summed here, where there are R numbers a token, and not in the hidden states or the weight.
        from torch.distributed.tensor import DTensor, Partial, Replicate

        coefficients_BTR = DTensor.from_local(output, mesh, [Replicate()], run_check=False)
        return coefficients_BTR.to_local(grad_placements=[Partial()])
