"""Tables in which libraries look a model up by the name of its class or by its model type: ours stands beside Llama.

Auto classes know what is registered with them, but Trainer, pipelines and PEFT read tables of names. Trainer, for one,
shifts the labels for its label smoothing only for the classes that such a table names.
"""

from importlib.util import find_spec

from transformers import LlamaConfig
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from .configuration_dynconv_llama import DynConvLlamaConfig

__all__ = ["register_names", "register_with_peft"]

logger = logging.get_logger(__name__)

_LLAMA = LlamaConfig.model_type
_OURS = DynConvLlamaConfig.model_type


def register_names(class_names: list[str]) -> None:
    """Puts the model type, and those of the classes that a Llama has too, into the tables that name Llama's."""
    for name, table in vars(modeling_auto).items():
        if not name.startswith("MODEL_") or not name.endswith("_MAPPING_NAMES") or _LLAMA not in table:
            continue
        class_name = f"DynConv{table[_LLAMA]}"
        if class_name in class_names:
            table.setdefault(_OURS, class_name)


def register_with_peft() -> None:
    """What PEFT adapts in a Llama unless told otherwise; for the convolutions, too, there is `lora_config`.

    Called when a model is made, since PEFT takes half a second to import.
    """
    if find_spec("peft") is None:
        return
    try:
        from peft.utils import constants
    except ImportError as error:
        # The model runs without it; whoever uses PEFT meets the same error there.
        logger.warning(f"PEFT cannot be imported, and does not learn of {_OURS}: {error}")
        return
    for name, table in vars(constants).items():
        # Names of layers only: other tables hold functions that compute what a Llama without convolutions would.
        if name.endswith(("_TARGET_MODULES_MAPPING", "_FEEDFORWARD_MODULES_MAPPING")) and _LLAMA in table:
            table.setdefault(_OURS, table[_LLAMA])
