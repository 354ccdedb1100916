"""What the public operations accept: each check raises a TypeError or ValueError with the offending value."""

import torch

__all__ = [
    "MAX_KERNEL_SIZE",
    "check_common",
    "check_device",
    "check_floating",
    "check_heads",
    "check_input",
    "check_kernel_size",
    "check_rank",
    "check_state",
    "check_tensor",
]

MAX_KERNEL_SIZE = 8


def check_tensor(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")


def check_floating(name: str, tensor: torch.Tensor) -> None:
    check_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got dtype {tensor.dtype}")


def check_input(name: str, x: torch.Tensor, shape: str, ndim: int) -> None:
    check_floating(name, x)
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.ndim != ndim:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")


def check_kernel_size(kernel_size: int, name: str, tensor: torch.Tensor) -> None:
    if not 1 <= kernel_size <= MAX_KERNEL_SIZE:
        raise ValueError(
            f"the kernel size W must be from 1 to {MAX_KERNEL_SIZE}, got {kernel_size} "
            f"from {name} of shape {tuple(tensor.shape)}"
        )


def check_heads(heads: int, channels: int) -> None:
    if heads < 1 or channels % heads:
        raise ValueError(f"the number of filter heads H must divide the channels D, got H = {heads}, D = {channels}")


def check_rank(rank: int, coefficients: torch.Tensor) -> None:
    if rank < 1:
        raise ValueError(f"the rank R must be at least 1, got coefficients of shape {tuple(coefficients.shape)}")


def check_state(state: torch.Tensor) -> None:
    check_floating("state", state)


def check_common(
    x: torch.Tensor,
    kernel_size: int,
    static_filter: torch.Tensor | None,
    positions: torch.Tensor | None,
    initial_state: torch.Tensor | None,
) -> None:
    batch, tokens, channels = x.shape
    if static_filter is not None:
        check_floating("static_filter", static_filter)
        if static_filter.shape != (kernel_size, channels):
            raise ValueError(
                f"static_filter must have shape (W, D) = {(kernel_size, channels)}, got {tuple(static_filter.shape)}"
            )
    if positions is not None:
        check_tensor("positions", positions)
        if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
            raise TypeError(f"positions must be an integer tensor, got dtype {positions.dtype}")
        if positions.shape not in ((batch, tokens), (1, tokens)):
            raise ValueError(
                f"positions must have shape (B, T) = {(batch, tokens)} or {(1, tokens)}, got {tuple(positions.shape)}"
            )
    if initial_state is not None:
        check_floating("initial_state", initial_state)
        if initial_state.shape != (batch, kernel_size - 1, channels):
            raise ValueError(
                f"the state must have shape (B, W - 1, D) = {(batch, kernel_size - 1, channels)}, "
                f"got {tuple(initial_state.shape)}"
            )


def check_device(x: torch.Tensor, **others: torch.Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
