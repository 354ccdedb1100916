"""What `dynconv generate` does."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging

import dynconv_hf  # noqa: F401  registers the models

__all__ = ["continue_prompt"]


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
    device = torch.device(_check_device(device) if device else "cuda" if torch.cuda.is_available() else "cpu")
    arguments = {} if revision is None else {"revision": revision}
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, **arguments)
    model = AutoModelForCausalLM.from_pretrained(name_or_path, **arguments).to(device).eval()
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


def _check_device(device: str) -> str:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    return device
