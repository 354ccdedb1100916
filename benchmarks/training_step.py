"""A whole training step of a Llama with 1.14 billion parameters: plain, and with convolutions, in the same run.

    python benchmarks/training_step.py --out training_step.json
    python benchmarks/training_step.py --out training_step.json --compile

Random tokens, bfloat16 weights, tied embeddings, fused AdamW, no checkpointing. Each time is the median of the steps,
measured with CUDA events; memory is the peak that PyTorch's allocator handed out.
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from report import write_report
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from dynconv_hf import DynConvLlamaConfig, DynConvLlamaForCausalLM

SIZES = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
QKV = ["q_proj", "k_proj", "v_proj"]
MODELS = {
    "Llama": None,
    "convolutions on Q, K, V": {"conv_targets": QKV},
    "convolutions on Q, K, V, recomputed": {"conv_targets": QKV, "conv_recompute": True},
    "convolutions on Q, K, V, not fused": {"conv_targets": QKV, "conv_fused": False},
    "convolutions on all linear layers": {"conv_targets": "all-linear"},
}


def build(fields: dict[str, Any] | None, key_value_heads: int) -> LlamaForCausalLM:
    sizes = {**SIZES, "num_key_value_heads": key_value_heads}
    with torch.device("cuda"):
        if fields is None:
            return LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16)
        return DynConvLlamaForCausalLM(DynConvLlamaConfig(**sizes, **fields)).to(torch.bfloat16)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    model = build(MODELS[name], args.key_value_heads).train()
    forward = torch.compile(model) if args.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(SIZES["vocab_size"], (args.batch, args.tokens), device="cuda")

    def step() -> None:
        forward(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(args.warm_up):
        step()
    torch.cuda.reset_peak_memory_stats()
    milliseconds = []
    for _ in range(args.steps):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        stop.record()
        torch.cuda.synchronize()
        milliseconds.append(start.elapsed_time(stop))
    if args.profile:
        print_kernels(step)
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "step_ms": statistics.median(milliseconds),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def print_kernels(step: Callable[[], None]) -> None:
    """The device time of one step, by kernel."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    print(profiled.key_averages().table(sort_by="self_device_time_total", row_limit=30, max_name_column_width=90))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("training_step.json"))
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--key-value-heads", type=int, default=32)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="print the kernels of one more step")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    args = parser.parse_args()
    settings = {
        "transformers": transformers.__version__,
        "sizes": SIZES | {"num_key_value_heads": args.key_value_heads},
        "shape": {"batch": args.batch, "tokens": args.tokens, "compile": args.compile},
    }
    rows: list[dict[str, Any]] = []
    for name in args.models:
        rows.append(measure(name, args))
        first, row = rows[0], rows[-1]
        row["time_ratio"] = row["step_ms"] / first["step_ms"]
        row["tokens_per_second"] = args.batch * args.tokens / row["step_ms"] * 1e3
        print(
            f"{name}: {row['step_ms']:.1f} ms ({row['time_ratio']:.3f} of {first['model']}), "
            f"{row['peak_gib']:.2f} GiB (+{row['peak_gib'] - first['peak_gib']:.2f})",
            flush=True,
        )
        # After every model: a run that is cut short keeps what it has measured.
        write_report(args.out, rows, **settings)
        gc.collect()
        torch.compiler.reset()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
