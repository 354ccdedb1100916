"""Which kind of adapter a directory or a repository of the Hub holds: PEFT's, or the convolutions alone."""

import json
import os
from pathlib import Path
from typing import Any

from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from .checkpoint_files import check_is_there

__all__ = [
    "CONV_ADAPTER_CONFIG_NAME",
    "LOADERS",
    "adapter_file",
    "check_adapter_kind",
    "check_is_no_adapter",
    "find_file",
]

CONV_ADAPTER_CONFIG_NAME = "conv_adapter_config.json"
# What loads an adapter, by the file that makes a directory one of its kind.
LOADERS = {ADAPTER_CONFIG_NAME: "load_lora", CONV_ADAPTER_CONFIG_NAME: "load_conv_adapter"}


def find_file(name_or_path: str, file: str, **hub_arguments: Any) -> str | None:
    """This file of a directory or repository; None where there is none, or where that cannot be found out."""
    # Whoever cannot be reached is told of when the files themselves are loaded.
    quiet = ("missing_entries", "connection_errors", "gated_repo")
    silence = {f"_raise_exceptions_for_{what}": False for what in quiet}
    return cached_file(name_or_path, file, **hub_arguments, **silence)


def adapter_file(name_or_path: str, **hub_arguments: Any) -> str | None:
    """The key of `LOADERS` whose file the directory or repository has; None where it holds no adapter."""
    return next((file for file in LOADERS if find_file(name_or_path, file, **hub_arguments) is not None), None)


def check_adapter_kind(name_or_path: str | os.PathLike, wanted: str, **hub_arguments: Any) -> None:
    """Refuses an adapter of another kind, with the name of the function that loads it.

    Args:
        name_or_path: directory or Hub name of the adapter.
        wanted: a key of `LOADERS`.
        **hub_arguments: of `cached_file` (`revision`, `token`, ...).

    Raises:
        FileNotFoundError, NotADirectoryError: what is meant as a folder is not there.
        ValueError: this is an adapter, but not of the kind `wanted`.
    """
    check_is_there(name_or_path)
    name = os.fspath(name_or_path)
    if find_file(name, wanted, **hub_arguments) is not None:
        return
    file = adapter_file(name, **hub_arguments)
    if file is not None:
        raise ValueError(
            f"{name!r} has no {wanted}, but {file}: load it with dynconv_hf.{LOADERS[file]}(), not {LOADERS[wanted]}()"
        )


def check_is_no_adapter(name_or_path: str | os.PathLike, **hub_arguments: Any) -> None:
    """Refuses an adapter where a Llama is to be retrofitted; one of PEFT even beside a model.

    Raises:
        FileNotFoundError, NotADirectoryError: what is meant as a folder is not there.
        ValueError: there is an adapter; the message says where it belongs.
    """
    check_is_there(name_or_path)
    name = os.fspath(name_or_path)
    # As transformers looks for it, to load it onto the model that lies beside it.
    found = find_adapter_config_file(name, **hub_arguments)
    if found is not None:
        raise ValueError(
            f"{name!r} holds an adapter of {_base_of(name, found)!r}, and only a whole Llama can be retrofitted. An "
            f"adapter that was trained with convolutions is loaded by dynconv_hf.load_lora({name!r}). For any other, "
            "give the Llama it was made for, or merge it first: PeftModel.merge_and_unload(), and retrofit what that "
            "returns"
        )
    if find_file(name, CONFIG_NAME, **hub_arguments) is not None:
        return
    found = find_file(name, CONV_ADAPTER_CONFIG_NAME, **hub_arguments)
    if found is not None:
        raise ValueError(
            f"{name!r} holds the convolutions for {_base_of(name, found)!r}, and only a whole Llama can be "
            f"retrofitted: dynconv_hf.load_conv_adapter({name!r}) loads both"
        )


def _base_of(name: str, file: str) -> str | None:
    try:
        return json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{name!r} holds an adapter whose {file} cannot be read: {error!r}") from error
