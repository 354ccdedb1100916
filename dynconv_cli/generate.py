"""What `dynconv generate` does."""

import warnings
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)
from transformers.utils import logging

import dynconv_hf
from dynconv_hf.adapter_kind import LOADERS, adapter_file, find_file

__all__ = ["continue_prompt"]

# One of them is beside every tokenizer that transformers can load for a Llama.
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")


def continue_prompt(
    name_or_path: str,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    device: str | None,
    tokenizer_name: str | None,
    revision: str | None,
    stream: bool,
) -> dict[str, Any]:
    """The prompt and its continuation; with `stream`, also printed while it is made.

    `tokenizer_name` is the directory or Hub name of one that does not lie beside the model.
    """
    # The text is all that is to be read.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # What one library has to change in its use of another.
    warnings.simplefilter("ignore", FutureWarning)
    device = torch.device(_check_device(device) if device else "cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = _load(name_or_path, {} if revision is None else {"revision": revision}, tokenizer_name)
    model = model.to(device).eval()
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    if inputs.input_ids.shape[1] == 0:
        raise ValueError(f"the prompt holds no token, got {prompt!r}")
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    torch.manual_seed(seed)
    output = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True) if stream else None,
        **(sampling or {"do_sample": False}),
    )
    new = output.shape[1] - inputs.input_ids.shape[1]
    return {"prompt": prompt, "text": tokenizer.decode(output[0], skip_special_tokens=True), "new_tokens": new}


def _load(
    name_or_path: str, arguments: dict[str, str], tokenizer_name: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, or the adapter on the base that it names; and the tokenizer: the one asked for, or of either."""
    file = adapter_file(name_or_path, **arguments)
    own = (name_or_path, arguments) if tokenizer_name is None else (tokenizer_name, {})
    if file is None:
        # Raises where there is no model either: then it is not the tokenizer that is missing.
        AutoConfig.from_pretrained(name_or_path, **arguments)
        tokenizer = _load_tokenizer(*own)
        return AutoModelForCausalLM.from_pretrained(name_or_path, **arguments), tokenizer
    model = getattr(dynconv_hf, LOADERS[file])(name_or_path, adapter_revision=arguments.get("revision"))
    if tokenizer_name is None and not _has_tokenizer(*own):
        return model, _load_tokenizer(model.config.name_or_path, {})
    return model, _load_tokenizer(*own)


def _load_tokenizer(name_or_path: str, arguments: dict[str, str]) -> PreTrainedTokenizerBase:
    # Without any file transformers tries to convert one, and fails with advice on packages to install.
    if not _has_tokenizer(name_or_path, arguments):
        raise ValueError(
            f"{name_or_path!r} has no tokenizer: name the directory or repository of one with --tokenizer, or save it "
            "beside the model with tokenizer.save_pretrained()"
        )
    return AutoTokenizer.from_pretrained(name_or_path, **arguments)


def _has_tokenizer(name_or_path: str, arguments: dict[str, str]) -> bool:
    return any(find_file(name_or_path, file, **arguments) is not None for file in TOKENIZER_FILES)


def _check_device(device: str) -> str:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    return device
