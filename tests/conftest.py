"""What all tests share."""

import os

import torch
from hypothesis import settings

# Triton's interpreter must be asked for before Triton is imported, which transformers does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The first call of a torch function in a process is slow: a deadline would measure that.
settings.register_profile("default", deadline=None, max_examples=100)
settings.load_profile("default")

# The models here are too small to share a product among threads; tests run in several processes instead.
torch.set_num_threads(1)
