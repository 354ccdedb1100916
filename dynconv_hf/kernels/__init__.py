"""Dynamic short convolutions as an operation.

Meaning in `reference`, validation in `api`, the choice of implementation in `dispatch`, Triton behind `ops`.
"""

from .api import (
    MAX_KERNEL_SIZE,
    headwise_dynamic_conv1d,
    headwise_dynamic_conv1d_update,
    lowrank_dynamic_conv1d,
    lowrank_dynamic_conv1d_update,
    static_conv1d,
    static_conv1d_update,
)
from .dispatch import Choice, describe_implementation

__all__ = [
    "MAX_KERNEL_SIZE",
    "Choice",
    "describe_implementation",
    "headwise_dynamic_conv1d",
    "headwise_dynamic_conv1d_update",
    "lowrank_dynamic_conv1d",
    "lowrank_dynamic_conv1d_update",
    "static_conv1d",
    "static_conv1d_update",
]
