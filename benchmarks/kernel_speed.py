"""Device time of the kernels, against memory's own speed and against the formula in PyTorch.

    python benchmarks/kernel_speed.py --out kernels.json    # then: python benchmarks/plot.py kernels.json

Each time is the median of the profiler's device time over runs that find the caches cold. `floor` is the time that
moving the same bytes takes: copy_ for one read and one write, add for two reads and one write, and for other bytes
their number at copy_'s speed.

Where fla-core is installed (pip install fla-core), its static convolution is measured beside ours: "fla" as it is, and
"fla + residual" with the residual that ours have. FLA_GLUON=1 in the environment makes it take its Gluon kernels.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch._functorch.config
from report import write_report
from torch.profiler import ProfilerActivity, profile

from dynconv_hf.kernels import Rotary, direct, lowrank, lowrank_gluon, lowrank_one_by_one, reference

WARM_UP, RUNS = 3, 15


def device_time(fn: Callable[[], object], flush: torch.Tensor) -> float:
    """Microseconds of device time, all kernels of a run together."""
    for _ in range(WARM_UP):
        fn()
    times = []
    for _ in range(RUNS):
        flush.zero_()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            fn()
            torch.cuda.synchronize()
        times.append(sum(event.self_device_time_total for event in recorded.key_averages()))
    return statistics.median(times)


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def formula(mode: str, x: torch.Tensor, filters: tuple, static_filter: torch.Tensor) -> torch.Tensor:
    options = {"residual": True, "positions_BT": None, "initial_state_BSD": None}
    if mode == "static":
        return reference.static_reference(x, static_filter, **options)[0]
    name = {"lowrank": reference.lowrank_reference, "headwise": reference.headwise_reference}[mode]
    return name(x, *filters, static_filter_WD=static_filter, **options)[0]


def fla_convolutions(x: torch.Tensor, static_filter: torch.Tensor) -> dict[str, tuple]:
    """fla-core's static convolution without and with a residual, each with its leaves; none if it is not installed."""
    if find_spec("fla") is None:
        return {}
    from fla.modules.causal_conv1d import causal_conv1d

    # (D, W), and its last tap multiplies the token itself.
    leaves = [x.detach().requires_grad_(), static_filter.flip(0).T.contiguous().detach().requires_grad_()]

    def convolution() -> torch.Tensor:
        return causal_conv1d(leaves[0], leaves[1])[0]

    def with_residual() -> torch.Tensor:
        return causal_conv1d(leaves[0], leaves[1], residual=leaves[0])[0]

    expected = formula("static", x, (), static_filter)
    torch.testing.assert_close(with_residual(), expected, rtol=2e-2, atol=2e-2)
    return {"fla": (convolution, leaves), "fla + residual": (with_residual, leaves)}


def rows_of(mode: str, head_size: int | None, args: argparse.Namespace, flush: torch.Tensor) -> list[dict]:
    """Forward and backward of one mode, by every implementation."""
    dtype = getattr(torch, args.dtype)
    b, t, d, w = args.batch, args.tokens, args.channels, args.kernel_size
    x, dy = random(b, t, d, dtype=dtype), random(b, t, d, dtype=dtype)
    s = random(w, d, dtype=dtype, scale=0.3)
    if mode == "lowrank":
        filters = (random(b, t, args.rank, dtype=dtype, scale=0.3), random(args.rank, w, d, dtype=dtype, scale=0.3))
    elif mode == "headwise":
        filters = (random(b, t, d // head_size, w, dtype=dtype, scale=0.3),)
    else:
        filters = (None,)
    common = (s, True, None, None)
    implementations = {"triton": lowrank if mode == "lowrank" else direct}
    if mode == "lowrank" and lowrank_gluon.covers(x, *filters, *common[:1], *common[2:]) is None:
        implementations = {"gluon": lowrank_gluon} | implementations

    out = torch.empty_like(x)
    copy_us = device_time(lambda: out.copy_(x), flush)
    add_us = device_time(lambda: torch.add(x, dy, out=out), flush)
    read = sum(f.numel() for f in filters if f is not None)
    floors = {"forward": copy_us, "backward": add_us}
    if mode == "headwise":
        per_element = copy_us / (2 * x.numel())
        floors = {
            "forward": per_element * (2 * x.numel() + read),
            "backward": per_element * (3 * x.numel() + 2 * read),
        }

    leaves = [a.detach().requires_grad_() for a in (x, *filters, s) if a is not None]

    def eager() -> torch.Tensor:
        return formula(mode, leaves[0], tuple(leaves[1:-1]), leaves[-1])

    # The backward of one forward pass is run again and again.
    torch._functorch.config.donated_buffer = False
    compiled = torch.compile(eager, fullgraph=True)
    times: dict[tuple[str, str], Callable[[], object]] = {}
    for name, kernels in implementations.items():
        times[name, "forward"] = partial(kernels.forward, x, *filters, *common)
        times[name, "backward"] = partial(kernels.backward, dy, x, *filters, *common)
    others = {"eager": (eager, leaves), "compile": (compiled, leaves)}
    if mode == "static":
        others |= fla_convolutions(x, s)
    for name, (fn, its_leaves) in ({} if args.ours_only else others).items():
        times[name, "forward"] = fn
        times[name, "backward"] = partial(torch.autograd.grad, fn(), its_leaves, dy, retain_graph=True)
    return [
        {
            "mode": mode,
            "head_size": head_size,
            "direction": direction,
            "implementation": name,
            "us": (us := device_time(fn, flush)),
            "floor_us": floors[direction],
            "ratio": us / floors[direction],
        }
        for (name, direction), fn in times.items()
    ]


def group_rows(head_dim: int, args: argparse.Namespace, flush: torch.Tensor) -> list[dict]:
    """Queries, keys and values, the first two with RoPE: in one launch, and one by one with RoPE in eager PyTorch."""
    dtype = getattr(torch, args.dtype)
    b, t, d = args.batch, args.tokens, args.channels
    xs, dys = random(3, b, t, d, dtype=dtype).unbind(), random(3, b, t, d, dtype=dtype).unbind()
    # As the model makes them: one product, each tensor's columns padded to a multiple of 16.
    coefficients = random(b, t, 3, -(-args.rank // 16) * 16, dtype=dtype, scale=0.3)[..., : args.rank]
    bases = random(3, args.rank, args.kernel_size, d, dtype=dtype, scale=0.3).unbind()
    statics = random(3, args.kernel_size, d, dtype=dtype, scale=0.3).unbind()
    rotary = Rotary(*random(2, 1, t, head_dim, dtype=dtype).unbind(), head_dim, (True, True, False))
    inputs = (xs, coefficients, bases, statics, True, None, [None] * 3, rotary)
    x, dy = torch.cat(xs, -1), torch.cat(dys, -1)
    out = torch.empty_like(x)
    floors = {
        "forward": device_time(lambda: out.copy_(x), flush),
        "backward": device_time(lambda: torch.add(x, dy, out=out), flush),
    }
    return [
        {
            "mode": "lowrank, Q K V, RoPE",
            "head_size": head_dim,
            "direction": direction,
            "implementation": name,
            "us": (us := device_time(partial(run, *arguments), flush)),
            "floor_us": floors[direction],
            "ratio": us / floors[direction],
        }
        for name, kernels in (("gluon", lowrank_gluon), ("gluon, one by one", lowrank_one_by_one))
        for direction, run, arguments in (
            ("forward", kernels.forward_group, inputs),
            ("backward", kernels.backward_group, (dys, *inputs)),
        )
    ]


def print_row(row: dict) -> None:
    size = "" if row["head_size"] is None else f" P={row['head_size']}"
    print(
        f"{row['mode']}{size} {row['direction']} {row['implementation']}: {row['us']:.1f} us, "
        f"{row['ratio']:.2f} x {row['floor_us']:.1f}",
        flush=True,
    )


def compare_with_fla(rows: list[dict]) -> None:
    static = {r["direction"]: r["us"] for r in rows if r["implementation"] == "fla"}
    for row in rows:
        if static and row["implementation"] in ("gluon", "triton") and "Q K V" not in row["mode"]:
            size = "" if row["head_size"] is None else f" P={row['head_size']}"
            ratio = row["us"] / static[row["direction"]]
            print(f"{row['mode']}{size} {row['direction']} {row['implementation']} / fla: {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("kernels.json"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--channels", type=int, default=2048)
    parser.add_argument("--kernel-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=15)
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--head-dims", type=int, nargs="*", default=[64, 128], help="of the heads that RoPE turns")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--ours-only", action="store_true", help="leave out the formula, eager and compiled, and fla-core"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    measurements = [
        *(partial(group_rows, head_dim) for head_dim in args.head_dims),
        partial(rows_of, "lowrank", None),
        partial(rows_of, "static", None),
        *(partial(rows_of, "headwise", head_size) for head_size in args.head_sizes),
    ]
    rows = []
    for measurement in measurements:
        for row in measurement(args, flush):
            rows.append(row)
            print_row(row)
    compare_with_fla(rows)
    write_report(args.out, rows, shape={k: v for k, v in vars(args).items() if k != "out"})


if __name__ == "__main__":
    main()
