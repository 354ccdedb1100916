"""Dynamic short convolutions as an operation.

Meaning in `reference` and `rotary`, the public functions in `api` and `group`, the choice of implementation in
`dispatch`, Triton behind `ops`.
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
from .dispatch import Choice, describe_group_implementation, describe_implementation
from .group import lowrank_dynamic_conv1d_group
from .rotary import Rotary

__all__ = [
    "MAX_KERNEL_SIZE",
    "Choice",
    "Rotary",
    "describe_group_implementation",
    "describe_implementation",
    "headwise_dynamic_conv1d",
    "headwise_dynamic_conv1d_update",
    "lowrank_dynamic_conv1d",
    "lowrank_dynamic_conv1d_group",
    "lowrank_dynamic_conv1d_update",
    "static_conv1d",
    "static_conv1d_update",
]
