"""New convolutions in a model whose weights are divided over several processes."""

import torch
from torch import nn

from .modeling import DynamicShortConv, DynConvLlamaForCausalLM
from .modeling.modeling_dynconv_llama import build_conv

__all__ = ["draw_convs_alike", "is_divided"]


def is_divided(model: nn.Module) -> bool:
    """Whether tensor parallelism or FSDP2 has divided the parameters of the model."""
    return any(_is_divided_tensor(parameter) for parameter in model.parameters())


def draw_convs_alike(model: DynConvLlamaForCausalLM) -> None:
    """Starts every convolution anew, as one process would: each rank keeps its part of the same random numbers.

    Loading has every rank draw on its own. Copies of a parameter then differ from rank to rank; parts drawn from the
    same seed are equal to each other.
    """
    seed = torch.randint(2**63 - 1, (1,), device=model.device)
    torch.distributed.broadcast(seed, src=0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed.item())
        for name, conv in model.named_modules():
            if isinstance(conv, DynamicShortConv):
                target = name.rsplit(".", 1)[-1].removesuffix("_conv") + "_proj"
                _copy_parts(build_conv(model.config, target), conv)


@torch.no_grad()
def _copy_parts(whole: DynamicShortConv, conv: DynamicShortConv) -> None:
    from torch.distributed.tensor import distribute_tensor

    for whole_parameter, parameter in zip(whole.parameters(), conv.parameters(), strict=True):
        source = whole_parameter.detach().to(parameter.device, parameter.dtype)
        if _is_divided_tensor(parameter):
            source = distribute_tensor(source, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(source)


def _is_divided_tensor(tensor: torch.Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
