"""Dynamic short convolutions as an operation: meaning in `reference`, validation and dispatch in `api`."""

from .api import (
    MAX_KERNEL_SIZE,
    headwise_dynamic_conv1d,
    headwise_dynamic_conv1d_update,
    lowrank_dynamic_conv1d,
    lowrank_dynamic_conv1d_update,
    static_conv1d,
    static_conv1d_update,
)

__all__ = [
    "MAX_KERNEL_SIZE",
    "headwise_dynamic_conv1d",
    "headwise_dynamic_conv1d_update",
    "lowrank_dynamic_conv1d",
    "lowrank_dynamic_conv1d_update",
    "static_conv1d",
    "static_conv1d_update",
]
