"""Llama with dynamic short convolutions after its linear layers.

Shape suffixes: B batch, T tokens, D channels, W kernel size.
"""

import os
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, LlamaConfig
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    eager_attention_forward,
)
from transformers.utils import logging

from ..kernels import Rotary
from ..kernels.rotary import rotate
from ..model_card import keep_users_card, prepare_card_for_push, write_model_card
from .configuration_dynconv_llama import DynConvLlamaConfig, conv_name
from .conv_cache import end_past_recording, exchange_conv_state, prepare_cache
from .conv_group import can_group, convolve_group, rotary_of_group
from .decode_step import step_group
from .divided_sequence import refuse_divided_sequence, refuse_gathering
from .dynamic_conv import DynamicShortConv
from .liger import register_with_liger
from .parallel_styles import register_parallel_styles
from .registration import register_names, register_with_peft
from .token_positions import token_positions

__all__ = [
    "DynConvLlamaForCausalLM",
    "DynConvLlamaForQuestionAnswering",
    "DynConvLlamaForSequenceClassification",
    "DynConvLlamaForTokenClassification",
    "DynConvLlamaModel",
    "DynConvLlamaPreTrainedModel",
]

logger = logging.get_logger(__name__)

register_parallel_styles()
# Here, and not where the package registers with the Auto classes: code loaded from a checkpoint runs this, too.
register_names(__all__)


class ConvolvedProjections:
    """What attention and MLP share: linear layers, some followed by a convolution with a state in the cache."""

    def add_convs(self, config: DynConvLlamaConfig, layer_idx: int, targets: tuple[str, ...]) -> None:
        """Adds `q_conv` for the target `q_proj`, and so on; None where the config has no convolution."""
        self.layer_idx = layer_idx
        self.conv_state_idx = {target: idx for idx, target in enumerate(config.conv_targets)}
        for target in targets:
            has_conv = target in config.conv_targets and config.has_conv(layer_idx)
            setattr(self, conv_name(target), build_conv(config, target) if has_conv else None)

    def project(
        self,
        targets: tuple[str, ...],
        hidden_states: torch.Tensor,
        conv_positions: torch.Tensor | None,
        past_key_values: Cache | None,
        rotary: Rotary | None = None,
        recompute: bool = False,
    ) -> list[torch.Tensor]:
        """The linear layers `targets`, each followed by its convolution if it has one: (B, T, D) for each.

        `rotary` follows on queries and keys, the first two of them. With `recompute` nothing but the hidden states is
        kept for the backward pass.
        """
        convs = [(target, getattr(self, conv_name(target))) for target in targets]
        convs = {target: conv for target, conv in convs if conv is not None}
        if not convs:
            xs = [getattr(self, target)(hidden_states) for target in targets]
            return xs if rotary is None else _rotate_heads(*xs, rotary)
        if recompute:
            inputs = (targets, hidden_states, conv_positions, past_key_values, rotary)
            return checkpoint(self.project, *inputs, use_reentrant=False)
        xs_BTD = {target: getattr(self, target)(hidden_states) for target in targets}
        convolved, modules = [xs_BTD[target] for target in convs], list(convs.values())
        fused, ys_BTD = None, None
        if self.config.conv_fused:
            fused = None if rotary is None else rotary_of_group(rotary, xs_BTD, convs)
            ys_BTD = step_group(self, convs, convolved, hidden_states, conv_positions, past_key_values, fused)
        if ys_BTD is None:
            states = [self.exchange_state(target, xs_BTD[target], past_key_values) for target in convs]
            if self.config.conv_fused and can_group(modules, convolved):
                ys_BTD = convolve_group(modules, convolved, hidden_states, conv_positions, states, fused)
            else:
                fused = None
                ys_BTD = [
                    conv(x_BTD, hidden_states, conv_positions, state)
                    for conv, x_BTD, state in zip(modules, convolved, states, strict=True)
                ]
        xs_BTD.update(zip(convs, ys_BTD, strict=True))
        if rotary is None or fused is not None:
            return list(xs_BTD.values())
        return _rotate_heads(*xs_BTD.values(), rotary)

    def exchange_state(self, target: str, x_BTD: torch.Tensor, past_key_values: Cache | None) -> torch.Tensor | None:
        """Hands what the convolution after `target` reads to the cache; returns what it read before, (B, W - 1, D)."""
        kernel_size = getattr(self, conv_name(target)).kernel_size
        if past_key_values is None or kernel_size == 1:
            return None
        return exchange_conv_state(past_key_values, x_BTD, self.layer_idx, self.conv_state_idx[target], kernel_size)


class DynConvLlamaMLP(ConvolvedProjections, LlamaMLP):
    def __init__(self, config: DynConvLlamaConfig, layer_idx: int) -> None:
        super().__init__(config)
        # Liger's class, which may stand in place of LlamaMLP, has none.
        self.act_fn = ACT2FN[config.hidden_act]
        self.add_convs(config, layer_idx, ("gate_proj", "up_proj", "down_proj"))

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Cache | None = None,
        conv_positions: torch.Tensor | None = None,
        conv_recompute: bool = False,
    ) -> torch.Tensor:
        context = {"conv_positions": conv_positions, "past_key_values": past_key_values, "recompute": conv_recompute}
        gate, up = self.project(("gate_proj", "up_proj"), hidden_states, **context)
        return self.project(("down_proj",), self.activate(gate, up), **context)[0]

    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """A method of its own, in whose place Liger's kernel can stand."""
        return self.act_fn(gate) * up


class DynConvLlamaAttention(ConvolvedProjections, LlamaAttention):
    def __init__(self, config: DynConvLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.add_convs(config, layer_idx, ("q_proj", "k_proj", "v_proj", "o_proj"))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        conv_positions: torch.Tensor | None = None,
        conv_recompute: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        context = {"conv_positions": conv_positions, "past_key_values": past_key_values, "recompute": conv_recompute}
        rotary = Rotary(*position_embeddings, self.head_dim, (True, True, False))
        heads = self.project(("q_proj", "k_proj", "v_proj"), hidden_states, rotary=rotary, **context)
        query, key, value = (x_BTD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x_BTD in heads)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attention = refuse_gathering(attention, self.config)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = output.flatten(2).contiguous()
        return self.project(("o_proj",), output, **context)[0], weights


class DynConvLlamaDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: DynConvLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = DynConvLlamaAttention(config, layer_idx)
        self.mlp = DynConvLlamaMLP(config, layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        conv_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        # Where the whole layer is made again, its parts need not be. The cache must see its tokens once.
        conv_recompute = (
            self.self_attn.config.conv_recompute
            and past_key_values is None
            and torch.is_grad_enabled()
            and not (self.gradient_checkpointing and self.training)
        )
        attention_output, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            conv_positions=conv_positions,
            conv_recompute=conv_recompute,
            **kwargs,
        )
        hidden_states = hidden_states + attention_output
        mlp_output = self.mlp(
            self.post_attention_layernorm(hidden_states),
            past_key_values=past_key_values,
            conv_positions=conv_positions,
            conv_recompute=conv_recompute,
        )
        return hidden_states + mlp_output


class DynConvLlamaPreTrainedModel(LlamaPreTrainedModel):
    config: DynConvLlamaConfig
    config_class = DynConvLlamaConfig
    _no_split_modules = ["DynConvLlamaDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DynConvLlamaDecoderLayer,
        "attentions": DynConvLlamaAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DynamicShortConv):
            module.reset_parameters()

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """False: serving engines with a cache of their own have no place for the states of the convolutions."""
        return False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a checkpoint without convolutions is an error: they would be random.

        Raises:
            ValueError: the checkpoint holds no weights for some convolution, for example because it is a plain Llama
                or an adapter of one; or it is a GGUF file, which knows no convolutions.
        """
        name = repr(str(pretrained_model_name_or_path))
        if kwargs.get("gguf_file") is not None:
            raise ValueError(
                f"gguf_file={kwargs['gguf_file']!r}: GGUF knows no convolutions. Load the Llama in it, with "
                f"LlamaForCausalLM.from_pretrained({name}, gguf_file=...), and give that to dynconv_hf.retrofit(model)"
            )
        if kwargs.get("config") is None:
            # Before the weights are read, which may take long.
            config, _ = LlamaConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)
            if config.get("model_type") == LlamaConfig.model_type:
                raise ValueError(f"{name} is a plain Llama checkpoint, without convolutions. {_use_retrofit(name)}")
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @staticmethod
    def _load_pretrained_model(
        model: "DynConvLlamaPreTrainedModel", *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        # Here rather than after from_pretrained: where an adapter goes onto a checkpoint, what transformers reports in
        # the end are the keys of the adapter alone. An adapter comes here, too; it says which keys it is to hold.
        info, offloaded = LlamaPreTrainedModel._load_pretrained_model(model, *args, **kwargs)
        ignored = model._keys_to_ignore_on_load_missing or ()
        missing = sorted(key for key in info.missing_keys if "_conv." in key)
        missing = [key for key in missing if not any(re.search(pattern, key) for pattern in ignored)]
        if missing and kwargs.get("expected_keys") is None:
            name = repr(str(model.config.name_or_path))
            raise ValueError(
                f"{name} has no weights for {len(missing)} parameters of convolutions that the config asks for, "
                f"{missing[0]} the first of them. {_use_retrofit(name)}. If you gave an adapter made for it, "
                "dynconv_hf.load_lora(adapter) loads both"
            )
        return info, offloaded

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers, with the code of the model and a model card; a README.md that you wrote stays.

        Raises:
            ValueError: a file in the way of the code is somebody else's; no weights are written then.
        """
        if not self._writes_card(is_main_process):
            return super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        with keep_users_card(save_directory):
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        # What has been pushed has its card already, under its name on the Hub.
        if os.path.isdir(save_directory) and not kwargs.get("push_to_hub"):
            write_model_card(self, save_directory)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # Every way to the Hub passes here, with transformers' own card on top of ours.
        if self._writes_card(is_main_process=True):
            prepare_card_for_push(self, working_dir, repo_id, kwargs.get("token"))
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def _writes_card(self, is_main_process: bool) -> bool:
        adapters_only = getattr(self, "_hf_peft_config_loaded", False)
        return not adapters_only and self.should_save_on_this_rank(is_main_process)


class DynConvLlamaModel(DynConvLlamaPreTrainedModel, LlamaModel):
    def __init__(self, config: DynConvLlamaConfig) -> None:
        register_with_peft()
        register_with_liger(import_it=True)
        # Past LlamaModel's own __init__: it would build every layer without convolutions first.
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            DynConvLlamaDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As LlamaModel. The convolutions see only real tokens of a token's own document.

        Documents and padding are known from a 2-D `attention_mask`, from `position_ids` that restart, from
        `cu_seq_lens_q`, from `seq_idx` and from a 4-D mask, as far as it hides the tokens just before a token.

        Raises:
            ValueError: `past_key_values` has no place for the states of the convolutions, or not the states that its
                tokens ask for; a sequence is divided over ranks; a mask has padding inside of a text, or branches,
                which a convolution cannot step over.
        """
        refuse_divided_sequence(self.config)
        if self.config.conv_recompute and self.training and torch.is_grad_enabled() and past_key_values is None:
            if use_cache:
                logger.warning_once("A cache is incompatible with conv_recompute=True. Setting `use_cache=False`.")
            use_cache = False
        attention_mask, padding_mask, whole_mask = _split_masks(attention_mask)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        past_length = 0
        if past_key_values is not None:
            batch = None if tokens is None else tokens.shape[0]
            # In a pipeline, an identity stands in the place of each layer of another stage. A draft by early exit is
            # made with fewer layers in the config.
            layers = zip(range(self.config.num_hidden_layers), self.layers, strict=False)
            own_layers = [idx for idx, layer in layers if not isinstance(layer, nn.Identity)]
            past_length = prepare_cache(past_key_values, self.config.layer_types, batch, own_layers)
        conv_positions = None
        if tokens is not None and self.config.conv_kernel_size > 1:
            conv_positions = token_positions(
                tokens.shape[:2],
                kernel_size=self.config.conv_kernel_size,
                whole_mask=whole_mask,
                # As in transformers' masks: with a mask or a cache, positions may leave some out.
                jumps_begin_documents=attention_mask is None and past_key_values is None,
                past_length=past_length,
                attention_mask=padding_mask,
                position_ids=position_ids,
                cu_seq_lens_q=kwargs.get("cu_seq_lens_q"),
                seq_idx=kwargs.get("seq_idx"),
            )
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            conv_positions=conv_positions,
            **kwargs,
        )


class DynConvLlamaForCausalLM(DynConvLlamaPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config: DynConvLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = DynConvLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a cache that assisted generation made record its past is left as small as it was."""
        given = kwargs.get("past_key_values")
        # A user who records the past for rollbacks of their own goes on doing so.
        if isinstance(given, Cache) and any(getattr(layer, "record_past", False) for layer in given.layers):
            return super().generate(*args, **kwargs)
        output = super().generate(*args, **kwargs)
        # The cache of a model that drafts for another one goes on recording: it is cropped after each draft.
        is_assisted = any(kwargs.get(name) for name in ("assistant_model", "prompt_lookup_num_tokens"))
        made = getattr(output, "past_key_values", None) if is_assisted else None
        for cache in (given, made):
            if isinstance(cache, Cache):
                end_past_recording(cache)
        return output

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, where the convolutions have no state (kernel size 1); an error where they have.

        Raises:
            ValueError: the paged cache of continuous batching has no place for the states of the convolutions.
        """
        if "hybrid" in self.config.layer_types:
            raise ValueError(
                "continuous batching (generate_batch, transformers serve) is not supported: its paged cache has no "
                f"place for the states of convolutions with conv_kernel_size={self.config.conv_kernel_size}; "
                "use generate() with a padded batch"
            )
        return super().init_continuous_batching(*args, **kwargs)


class _BaseModelOfHead:
    """transformers' heads make their base model with AutoModel, which does not know code loaded from a checkpoint."""

    def __init__(self, config: DynConvLlamaConfig) -> None:
        if type(config) not in AutoModel._model_mapping:
            AutoModel.register(type(config), DynConvLlamaModel)
        super().__init__(config)


class DynConvLlamaForSequenceClassification(
    _BaseModelOfHead, GenericForSequenceClassification, DynConvLlamaPreTrainedModel
): ...


class DynConvLlamaForTokenClassification(
    _BaseModelOfHead, GenericForTokenClassification, DynConvLlamaPreTrainedModel
): ...


class DynConvLlamaForQuestionAnswering(_BaseModelOfHead, GenericForQuestionAnswering, DynConvLlamaPreTrainedModel): ...


def _use_retrofit(name: str) -> str:
    return (
        f"To give a Llama checkpoint convolutions, use dynconv_hf.retrofit({name}): the model then starts equal to "
        "the original, instead of with random convolutions"
    )


def build_conv(config: DynConvLlamaConfig, target: str) -> DynamicShortConv:
    """The convolution that follows the linear layer `target`."""
    hidden_size, channels = config.linear_features(target)
    return DynamicShortConv(
        hidden_size,
        channels,
        mode=config.conv_mode,
        kernel_size=config.conv_kernel_size,
        rank=config.conv_rank,
        head_size=config.conv_head_size,
        static=config.conv_static,
        residual=config.conv_residual,
        init=config.conv_init,
        init_std=config.initializer_range,
    )


def _rotate_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rotary: Rotary) -> list[torch.Tensor]:
    """Queries and keys (B, T, D) rotated as by transformers' own function.

    Not by that function itself: Liger puts one in its place that reads heads in another order.
    """
    return [rotate(query, rotary), rotate(key, rotary), value]


def _split_masks(mask: Any) -> tuple[Any, torch.Tensor | None, torch.Tensor | None]:
    """The mask for attention, and what tells the convolutions of padding: a 2-D mask, or a 4-D one."""
    if isinstance(mask, dict):
        # generate() makes the masks itself for a compilable cache: one for each kind of state in a hybrid layer.
        whole = None if "linear_attention" in mask else mask["full_attention"]
        return mask["full_attention"], mask.get("linear_attention"), whole
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return mask, mask, None
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        return mask, None, mask
    return mask, None, None
