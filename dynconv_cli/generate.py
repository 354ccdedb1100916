"""What `dynconv generate` does."""

import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import cached_file, logging

from dynconv_hf import load_conv_adapter, load_lora

__all__ = ["continue_prompt"]

# By the file that makes a directory one of them.
ADAPTERS = {"adapter_config.json": load_lora, "conv_adapter_config.json": load_conv_adapter}


def continue_prompt(
    name_or_path: str,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    device: str | None,
    revision: str | None,
    stream: bool,
) -> dict[str, Any]:
    """The prompt and its continuation; with `stream`, also printed while it is made."""
    # The text is all that is to be read.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # What one library has to change in its use of another.
    warnings.simplefilter("ignore", FutureWarning)
    device = torch.device(_check_device(device) if device else "cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = _load(name_or_path, {} if revision is None else {"revision": revision})
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


def _load(name_or_path: str, arguments: dict[str, str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, or the adapter on the base that it names; and the tokenizer of the one or the other."""
    load_adapter = next((load for file, load in ADAPTERS.items() if _has(name_or_path, file, arguments)), None)
    if load_adapter is None:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **arguments)
        return AutoModelForCausalLM.from_pretrained(name_or_path, **arguments), tokenizer
    model = load_adapter(name_or_path, adapter_revision=arguments.get("revision"))
    own = _has(name_or_path, "tokenizer_config.json", arguments)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path if own else model.config.name_or_path)
    return model, tokenizer


def _has(name_or_path: str, file: str, arguments: dict[str, str]) -> bool:
    # Whoever cannot be reached is told of when the model is loaded.
    quiet = ("missing_entries", "connection_errors", "gated_repo")
    found = cached_file(name_or_path, file, **arguments, **{f"_raise_exceptions_for_{what}": False for what in quiet})
    return found is not None


def _check_device(device: str) -> str:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    return device
