"""What the tests of adapters share: a short training, and logits from another process."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer

from dynconv_hf.training import parameter_groups

from ..modeling.models import STORIES, random_ids

TEXT = Path(STORIES).parent / "shakespeare.txt"
ROOT = Path(__file__).parents[2]


def text_ids(rows: int = 4, tokens: int = 48) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(STORIES)(TEXT.read_text()[:4000], return_tensors="pt").input_ids
    return ids[0, : rows * tokens].view(rows, tokens)


def train(model: nn.Module, steps: int = 5, conv_learning_rate: float = 1e-2) -> float:
    """Trains whatever requires a gradient; returns the loss at the end."""
    ids = text_ids().to(model.device)
    groups = parameter_groups(model, learning_rate=3e-3, conv_learning_rate=conv_learning_rate)
    optimizer = torch.optim.AdamW(groups)
    model.train()
    for _ in range(steps):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return loss(model)


@torch.no_grad()
def loss(model: nn.Module) -> float:
    ids = text_ids().to(model.device)
    return model(input_ids=ids, labels=ids, use_cache=False).loss.item()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(random_ids(2, 24).to(model.device)).logits


def in_new_process(code: str, *arguments: object) -> str:
    """What the code prints, run with `arguments` as sys.argv[1:]."""
    prelude = "import sys, torch; torch.set_num_threads(1); import dynconv_hf\n"
    command = [sys.executable, "-c", prelude + code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout
