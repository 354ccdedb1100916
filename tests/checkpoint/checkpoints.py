"""Checkpoints for the tests of retrofit_checkpoint."""

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from dynconv_hf import retrofit_checkpoint

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def save_llama(directory: Path, *, dtype=torch.float32, shard_size="5GB", **config) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **config})).to(dtype)
    model.save_pretrained(directory, max_shard_size=shard_size)
    return directory


def save_sparse_llama(directory: Path, shards: int, **config) -> Path:
    """A checkpoint of any size that takes no room: its bfloat16 weights are holes in the files."""
    config = LlamaConfig(**config, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"])
    config.save_pretrained(directory)
    with torch.device("meta"):
        tensors = list(LlamaForCausalLM(config).state_dict().items())
    per_shard = math.ceil(len(tensors) / shards)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, tensor in tensors[number * per_shard : (number + 1) * per_shard]:
            begin, end = end, end + 2 * tensor.numel()
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
            weight_map[name] = file
        encoded = json.dumps(header).encode()
        with open(directory / file, "wb") as writer:
            writer.write(len(encoded).to_bytes(8, "little") + encoded)
            writer.truncate(8 + len(encoded) + end)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def load_tensors(directory: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def hashes(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def retrofit_with_seed(source: str, destination: str, seed: int = 0, **kwargs) -> None:
    """For a process that will be killed."""
    torch.manual_seed(seed)
    retrofit_checkpoint(source, destination, **kwargs)
