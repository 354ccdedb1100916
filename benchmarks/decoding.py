"""Time per generated token of a Llama with 1.14 billion parameters: plain, and with convolutions, in the same run.

    python benchmarks/decoding.py --out decoding.json

Greedy decoding after a prompt of random tokens, bfloat16 weights. `eager` has a DynamicCache; `compiled` a StaticCache
and torch.compile(mode="reduce-overhead"), that is CUDA graphs. `token_ms` is the median over the new tokens of the
time from one token to the next, measured with CUDA events: where the CPU is slower than the GPU, it is the CPU's.
`device_ms` is what the kernels of a token take, from the profiler.
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from report import write_report
from torch.profiler import ProfilerActivity, profile
from training_step import QKV, SIZES
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from dynconv_hf import DynConvLlamaConfig, DynConvLlamaForCausalLM

MODELS = {"Llama": None, "convolutions on Q, K, V": QKV, "convolutions on all linear layers": "all-linear"}
WAYS = ("eager", "compiled")
PROFILED = 5

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def build(name: str, sizes: dict[str, Any]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    targets = MODELS[name]
    with torch.device("cuda"):
        if targets is None:
            model = LlamaForCausalLM(LlamaConfig(**sizes))
        else:
            model = DynConvLlamaForCausalLM(DynConvLlamaConfig(**sizes, conv_targets=targets))
    return model.to(torch.bfloat16).eval()


def decoder(model: LlamaForCausalLM, way: str, args: argparse.Namespace, batch: int) -> tuple[Step, torch.Tensor]:
    """One token's step, (B, 1) ids and (B, 1) position_ids to the next ids, and the ids after the prompt."""
    length = args.prompt + args.warm_up + args.new_tokens + PROFILED
    if way == "compiled":
        cache = StaticCache(config=model.config, max_cache_len=length)
    else:
        cache = DynamicCache(config=model.config)

    def step(ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        logits = model(ids, position_ids=position_ids, past_key_values=cache, logits_to_keep=1).logits
        return logits.argmax(-1)

    generator = torch.Generator("cuda").manual_seed(0)
    prompt = torch.randint(SIZES["vocab_size"], (batch, args.prompt), device="cuda", generator=generator)
    ids = step(prompt, torch.arange(args.prompt, device="cuda").expand(batch, -1))
    return torch.compile(step, mode="reduce-overhead", fullgraph=True) if way == "compiled" else step, ids


@torch.no_grad()
def measure(model: LlamaForCausalLM, way: str, args: argparse.Namespace, batch: int) -> dict[str, Any]:
    step, ids = decoder(model, way, args, batch)
    position_ids = torch.full((batch, 1), args.prompt, device="cuda")

    def advance() -> None:
        # A compiled step hands out the graph's own memory, and must not read its input there.
        torch.compiler.cudagraph_mark_step_begin()
        ids.copy_(step(ids, position_ids))
        position_ids.add_(1)

    for _ in range(args.warm_up):
        advance()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(args.new_tokens + 1)]
    for event in events[:-1]:
        event.record()
        advance()
    events[-1].record()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(PROFILED):
            advance()
        torch.cuda.synchronize()
    kernels = sorted(recorded.key_averages(), key=lambda event: -event.self_device_time_total)
    row = {
        "token_ms": statistics.median(a.elapsed_time(b) for a, b in pairwise(events)),
        "device_ms": sum(event.self_device_time_total for event in kernels) / PROFILED / 1e3,
    }
    if args.kernels:
        row["kernels"] = [
            {"name": e.key, "calls": e.count / PROFILED, "us": e.self_device_time_total / PROFILED}
            for e in kernels[: args.kernels]
        ]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("decoding.json"))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS)[:2])
    parser.add_argument("--key-value-heads", type=int, default=32)
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--prompt", type=int, default=128, help="tokens before the first new one")
    parser.add_argument("--new-tokens", type=int, default=100, help="tokens that are timed")
    parser.add_argument("--warm-up", type=int, default=10, help="tokens before those that are timed")
    parser.add_argument("--kernels", type=int, default=0, help="list this many kernels, the slowest first")
    args = parser.parse_args()
    sizes = SIZES | {"num_key_value_heads": args.key_value_heads, "num_hidden_layers": args.layers}
    settings = {
        "transformers": transformers.__version__,
        "sizes": sizes,
        "shape": {"prompt": args.prompt, "new_tokens": args.new_tokens},
    }
    rows: list[dict[str, Any]] = []
    for way in args.ways:
        for batch in args.batches:
            first = None
            for name in args.models:
                model = build(name, sizes)
                row = {"model": name, "way": way, "batch": batch, **measure(model, way, args, batch)}
                first = first or row
                row["time_ratio"] = row["token_ms"] / first["token_ms"]
                row["device_ratio"] = row["device_ms"] / first["device_ms"]
                rows.append(row)
                print(
                    f"{way}, batch {batch}, {name}: {row['token_ms']:.3f} ms a token ({row['time_ratio']:.3f} of "
                    f"{first['model']}), kernels {row['device_ms']:.3f} ms ({row['device_ratio']:.3f})",
                    flush=True,
                )
                # After every model: a run that is cut short keeps what it has measured.
                write_report(args.out, rows, **settings)
                del model
                gc.collect()
                torch.compiler.reset()
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
