"""The `dynconv` command.

A package beside dynconv_hf and not within it: importing dynconv_hf loads PyTorch and transformers, for which neither
help nor a mistyped option should wait.
"""

from .app import app, main

__all__ = ["app", "main"]
