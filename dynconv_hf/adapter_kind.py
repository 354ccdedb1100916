"""Which kind of adapter a directory or a repository of the Hub holds: PEFT's, or the convolutions alone."""

from typing import Any

from transformers.utils import ADAPTER_CONFIG_NAME, cached_file

__all__ = ["CONV_ADAPTER_CONFIG_NAME", "LOADERS", "check_adapter_kind", "holds"]

CONV_ADAPTER_CONFIG_NAME = "conv_adapter_config.json"
# What loads an adapter, by the file that makes a directory one of its kind.
LOADERS = {ADAPTER_CONFIG_NAME: "load_lora", CONV_ADAPTER_CONFIG_NAME: "load_conv_adapter"}


def holds(name_or_path: str, file: str, **hub_arguments: Any) -> bool:
    """Whether the directory or repository has this file; False where that cannot be found out."""
    # Whoever cannot be reached is told of when the files themselves are loaded.
    quiet = ("missing_entries", "connection_errors", "gated_repo")
    silence = {f"_raise_exceptions_for_{what}": False for what in quiet}
    return cached_file(name_or_path, file, **hub_arguments, **silence) is not None


def check_adapter_kind(name_or_path: str, wanted: str, **hub_arguments: Any) -> None:
    """Raises a ValueError that names the right function where this is an adapter, but not of the kind `wanted`.

    Args:
        name_or_path: directory or Hub name of the adapter.
        wanted: a key of `LOADERS`.
        **hub_arguments: of `cached_file` (`revision`, `token`, ...).
    """
    if holds(name_or_path, wanted, **hub_arguments):
        return
    for file, loader in LOADERS.items():
        if file != wanted and holds(name_or_path, file, **hub_arguments):
            raise ValueError(
                f"{name_or_path!r} has no {wanted}, but {file}: load it with dynconv_hf.{loader}(), "
                f"not {LOADERS[wanted]}()"
            )
