"""Inputs of the operation on a group of tensors, and the comparison with the float64 reference."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dynconv_hf.kernels import Rotary, lowrank_dynamic_conv1d_group

from .cases import Case, lay_out

LISTS = ("xs", "bases", "static_filters", "initial_states")


@dataclass
class GroupCase:
    """One call, as of Q, K and V; `rotary_dim` 0 is none. What is not said here is as in `Case`."""

    batch: int = 2
    tokens: int = 37
    channels: tuple[int, ...] = (48, 16, 16)
    kernel_size: int = 4
    rank: int = 15
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype = torch.float32
    static: bool = True
    residual: bool = True
    positions: str = "none"
    state: bool = False
    head_dim: int = 8
    rotary_dim: int = 8
    rotated: tuple[bool, ...] = (True, True, False)
    rotary_rows: int | None = None
    layout: str = "contiguous"
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def arguments(self) -> dict[str, Any]:
        """By name; floating ones are leaves that want gradients, but for cos and sin."""
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(self.device)

        b, t, w, groups = self.batch, self.tokens, self.kernel_size, len(self.channels)
        # As a model makes them: a part of a product that is filled up to 16 columns.
        wide = random(b, t, groups, 16 * -(-self.rank // 16), dtype=self.dtype, scale=0.5)
        made = {
            "xs": [lay_out(random(b, t, d, dtype=self.dtype), self.layout) for d in self.channels],
            "coefficients": wide[..., : self.rank],
            "bases": [random(self.rank, w, d, dtype=self.parameter_dtype, scale=0.5) for d in self.channels],
        }
        if self.static:
            made["static_filters"] = [random(w, d, dtype=self.parameter_dtype) for d in self.channels]
        if self.state:
            made["initial_states"] = [random(b, w - 1, d, dtype=self.dtype) for d in self.channels]
        made = {name: _leaves(value) for name, value in made.items()}
        if self.rotary_dim:
            rows = b if self.rotary_rows is None else self.rotary_rows
            angles = torch.rand(rows, t, self.rotary_dim // 2, generator=generator).repeat(1, 1, 2) * 6.3
            cos, sin = (f(angles).to(self.dtype).to(self.device) for f in (torch.cos, torch.sin))
            made["rotary"] = Rotary(cos, sin, self.head_dim, self.rotated)
        case = Case("lowrank", b, t, positions=self.positions, seed=self.seed, device=self.device)
        return {**made, "residual": self.residual, "positions": case.token_positions()}

    def output_gradients(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 2)
        dys = [torch.randn(self.batch, self.tokens, d, generator=generator) for d in self.channels]
        return [lay_out(dy.to(self.dtype).to(self.device), self.layout) for dy in dys]


def flat(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What wants gradients, by names such as "bases[1]"."""
    found = {"coefficients": arguments["coefficients"]}
    for name in LISTS:
        found |= {f"{name}[{g}]": tensor for g, tensor in enumerate(arguments.get(name, ()))}
    return found


def run_group(arguments: dict[str, Any], dys: list[torch.Tensor], impl: str) -> dict[str, torch.Tensor]:
    """Every y and every gradient, by name."""
    ys = lowrank_dynamic_conv1d_group(**arguments, impl=impl)
    leaves = flat(arguments)
    gradients = torch.autograd.grad(ys, list(leaves.values()), dys)
    return {
        **{f"ys[{g}]": y for g, y in enumerate(ys)},
        **{f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)},
    }


def group_errors(case: GroupCase) -> dict[str, float]:
    """Each result's distance from float64, relative to what the sums would be without cancellation."""
    arguments, dys = case.arguments(), case.output_gradients()
    got = run_group(arguments, dys, "triton")

    def reference(change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        def wide(a: torch.Tensor) -> torch.Tensor:
            return change(a.detach().double()).requires_grad_()

        widened = dict(arguments)
        for name in (*LISTS, "coefficients"):
            if name in arguments:
                value = arguments[name]
                widened[name] = [wide(a) for a in value] if isinstance(value, list) else wide(value)
        if "rotary" in arguments:
            rotary = arguments["rotary"]
            widened["rotary"] = rotary._replace(cos=rotary.cos.double(), sin=rotary.sin.double())
        return run_group(widened, [change(dy.double()) for dy in dys], "reference")

    want, scale, inputs = reference(torch.clone), reference(torch.abs), flat(arguments)
    result = {}
    for name, tensor in got.items():
        source = inputs[name.replace("ys", "xs") if name.startswith("ys") else name[1:]]
        if tensor.dtype != source.dtype or tensor.shape != want[name].shape:
            raise AssertionError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} for {source.dtype}")
        # A rotation takes differences also of what is positive.
        size = torch.maximum(scale[name].norm(), want[name].norm()).clamp_min(1e-30)
        result[name] = ((tensor.double() - want[name]).norm() / size).item()
    return result


def _leaves(value: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    if isinstance(value, list):
        return [_leaves(tensor) for tensor in value]
    return value.detach().requires_grad_()
