"""Inputs of the operation for the tests, and the comparison with the float64 reference."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from dynconv_hf.kernels import headwise_dynamic_conv1d, lowrank_dynamic_conv1d, static_conv1d

HALVES = (torch.bfloat16, torch.float16)
# Triton's interpreter cuts bfloat16 off where a GPU rounds it.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}


@dataclass
class Case:
    """One call: its shape, its types, and which optional arguments it has. `layout` is how x and dy lie in memory."""

    mode: str
    batch: int = 2
    tokens: int = 37
    channels: int = 40
    kernel_size: int = 4
    rank: int = 15
    heads: int = 5
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype = torch.float32
    static: bool = True
    residual: bool = True
    positions: str = "none"
    state: bool = False
    layout: str = "contiguous"
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def inputs(self) -> dict[str, torch.Tensor]:
        """The floating inputs by name, leaves that want gradients."""
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(self.device)

        b, t, d, w = self.batch, self.tokens, self.channels, self.kernel_size
        made = {"x": lay_out(random(b, t, d, dtype=self.dtype), self.layout)}
        if self.mode == "lowrank":
            z = random(b, t, self.rank, dtype=self.dtype, scale=0.5)
            made["coefficients"] = lay_out(z, self.layout)
            made["basis"] = random(self.rank, w, d, dtype=self.parameter_dtype, scale=0.5)
        if self.mode == "headwise":
            f = random(b, t, self.heads * w, dtype=self.dtype, scale=0.5)
            made["filters"] = lay_out(f, self.layout).unflatten(-1, (self.heads, w))
        if self.static or self.mode == "static":
            made["static_filter"] = random(w, d, dtype=self.parameter_dtype)
        if self.state:
            made["initial_state"] = random(b, w - 1, d, dtype=self.dtype)
        return {name: tensor.detach().requires_grad_() for name, tensor in made.items()}

    def token_positions(self) -> torch.Tensor | None:
        """none; packed: documents of a few tokens; padded: negative where there is no token; one: one row for all."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        if self.positions == "none":
            return None
        rows = 1 if self.positions == "one" else self.batch
        positions = torch.arange(self.tokens).repeat(rows, 1)
        if self.positions == "padded":
            positions = positions - torch.randint(0, self.tokens + 1, (rows, 1), generator=generator)
        else:
            starts = torch.rand(rows, self.tokens, generator=generator) < 0.2
            positions = positions - torch.where(starts, positions, 0).cummax(1).values
        return positions.to(self.device)

    def output_gradient(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed + 2)
        dy = torch.randn(self.batch, self.tokens, self.channels, generator=generator)
        return lay_out(dy.to(self.dtype).to(self.device), self.layout)


def lay_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values (B, T, N): contiguous, a slice of a wider tensor, or with dimensions swapped in memory."""
    if layout == "slice":
        return torch.cat([tensor, tensor, tensor], dim=-1)[..., tensor.shape[-1] : 2 * tensor.shape[-1]]
    if layout == "channels first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "tokens first":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return tensor


def operation(mode: str) -> Callable:
    return {"lowrank": lowrank_dynamic_conv1d, "headwise": headwise_dynamic_conv1d, "static": static_conv1d}[mode]


def run(case: Case, inputs: dict[str, torch.Tensor], dy: torch.Tensor, impl: str) -> dict[str, torch.Tensor]:
    """y, the final state and every gradient, by name."""
    y, final_state = operation(case.mode)(
        **inputs, residual=case.residual, positions=case.token_positions(), return_final_state=True, impl=impl
    )
    # The final state takes part in the gradient, as in training over chunks.
    outputs, gradients = [y], [dy]
    if final_state.numel() and final_state.requires_grad:
        outputs.append(final_state)
        gradients.append(torch.ones_like(final_state))
    found = torch.autograd.grad(outputs, list(inputs.values()), gradients)
    return {"y": y, "final state": final_state, **{f"d{n}": g for n, g in zip(inputs, found, strict=True)}}


def errors(case: Case) -> dict[str, float]:
    """Each result's distance from float64, relative to what the sums would be without cancellation."""
    inputs, dy = case.inputs(), case.output_gradient()
    got = run(case, inputs, dy, "triton")

    def reference(change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        wide = {n: change(a.detach().double()).requires_grad_() for n, a in inputs.items()}
        return run(case, wide, change(dy.double()), "reference")

    want, scale = reference(torch.clone), reference(torch.abs)
    result = {}
    for name, tensor in got.items():
        source = {"y": "x", "final state": "x"}.get(name, name[1:])
        if tensor.dtype != inputs[source].dtype or tensor.shape != want[name].shape:
            raise AssertionError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} for {source} {inputs[source].dtype}")
        distance = (tensor.double() - want[name]).norm()
        result[name] = (distance / scale[name].norm().clamp_min(1e-30)).item()
    return result


def tolerance(case: Case) -> float:
    return max(TOLERANCE[case.dtype], TOLERANCE[case.parameter_dtype])
