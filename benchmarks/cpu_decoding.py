"""Time per generated token on one thread of a CPU, of a Llama of SmolLM2-135M's sizes: plain, and with convolutions.

    python benchmarks/cpu_decoding.py --out cpu_decoding.json

Random float32 weights, batch 1, eager, a DynamicCache and an attention mask as `generate` gives it. The models take
turns token by token, since the speed of a CPU changes from second to second. Times are those of the thread, not of the
clock on the wall, which other processes would add to.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from report import write_report
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from dynconv_hf import DynConvLlamaConfig, DynConvLlamaForCausalLM

SIZES = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
TARGETS = {
    "convolutions on Q, K, V": ["q_proj", "k_proj", "v_proj"],
    "convolutions on all linear layers": "all-linear",
}


class Decoder:
    """A model and its cache, after a prompt."""

    def __init__(self, model: LlamaForCausalLM, prompt: torch.Tensor) -> None:
        self.model = model.eval()
        self.cache = DynamicCache(config=model.config)
        self.mask = torch.ones_like(prompt)
        self.ids = model(prompt, past_key_values=self.cache, attention_mask=self.mask).logits[:, -1:].argmax(-1)

    def seconds_of_a_token(self) -> float:
        start = time.thread_time()
        self.mask = torch.cat([self.mask, self.mask[:, :1]], dim=1)
        position_ids = torch.tensor([[self.mask.shape[1] - 1]])
        logits = self.model(
            self.ids, past_key_values=self.cache, attention_mask=self.mask, position_ids=position_ids
        ).logits
        self.ids = logits.argmax(-1)
        return time.thread_time() - start


@torch.no_grad()
def measure(prompt_tokens: int, new_tokens: int, warm_up: int) -> list[dict[str, str | float]]:
    torch.manual_seed(0)
    prompt = torch.randint(SIZES["vocab_size"], (1, prompt_tokens))
    models = {"Llama": LlamaForCausalLM(LlamaConfig(**SIZES))}
    models |= {
        name: DynConvLlamaForCausalLM(DynConvLlamaConfig(**SIZES, conv_targets=targets))
        for name, targets in TARGETS.items()
    }
    decoders = {name: Decoder(model, prompt) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(warm_up + new_tokens):
        for name, decoder in decoders.items():
            seconds[name].append(decoder.seconds_of_a_token())
    times = {name: [1e3 * second for second in taken[warm_up:]] for name, taken in seconds.items()}
    # Neighbours in time have met the same speed of the CPU.
    pairs = {name: [a / b for a, b in zip(taken, times["Llama"], strict=True)] for name, taken in times.items()}
    return [
        {
            "model": name,
            "token_ms": statistics.median(times[name]),
            "fastest_ms": min(times[name]),
            "ratio": statistics.median(pairs[name]),
            "ratio_of_the_fastest": min(times[name]) / min(times["Llama"]),
        }
        for name in decoders
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cpu_decoding.json"))
    parser.add_argument("--prompt", type=int, default=64, help="tokens before the first new one")
    parser.add_argument("--new-tokens", type=int, default=200, help="tokens that are timed")
    parser.add_argument("--warm-up", type=int, default=10, help="tokens before those that are timed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(args.prompt, args.new_tokens, args.warm_up)
    shape = {"prompt": args.prompt, "new_tokens": args.new_tokens}
    processor = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    cpu = processor.partition(":")[2].strip() or platform.processor()
    write_report(args.out, rows, cpu=cpu, transformers=transformers.__version__, sizes=SIZES, shape=shape)
    for row in rows:
        print(
            f"{row['model']}: {row['token_ms']:.1f} ms a token ({row['ratio']:.3f} of Llama, "
            f"{row['ratio_of_the_fastest']:.3f} of the fastest tokens)"
        )


if __name__ == "__main__":
    main()
