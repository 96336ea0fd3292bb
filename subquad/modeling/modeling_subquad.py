"""The student as a `transformers` model: class, saving and loading.

One class serves every family and every mixer: it holds the teacher's own model class, with attention replaced layer by
layer as the plan says. Embeddings, MLPs, norms and head are the family's, untouched.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from subquad import mixers
from subquad.mixers import AttentionSpec, Mixer
from subquad.modeling.attention.discovery import AttentionInfo
from subquad.modeling.cache import CACHE_ARGUMENT, SubquadCache
from subquad.modeling.configuration_subquad import SubquadConfig
from subquad.modeling.layers import AttentionLayer, MixerLayer
from subquad.modeling.masks import prepare_mask_and_positions
from subquad.utils import UserError


class SubquadForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder whose attention is replaced by the plan in its configuration. Made by `subquad.linearize`, or loaded
    by `AutoModelForCausalLM.from_pretrained` after `import subquad`."""

    config_class = SubquadConfig
    base_model_prefix = "base"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012 (transformers wants a list)
    accepts_loss_kwargs = False

    def __init__(self, config: SubquadConfig, base: PreTrainedModel | None = None):
        """`base`: a model of the base configuration whose attention is to be replaced in place; else a fresh one."""
        config.check()
        super().__init__(config)
        fresh = base is None
        if base is None:
            base = AutoModelForCausalLM.from_config(config.base_config)
        else:
            for module in base.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]  # or `post_init` draws its weights anew
        self._mixer_layers: list[MixerLayer | AttentionLayer] = []
        for index, (place, layer) in enumerate(zip(config.attention_specs, config.layer_specs, strict=True)):
            layout = AttentionSpec(**{name: value for name, value in place.items() if name != "path"})
            try:
                attention = base.get_submodule(place["path"])
            except AttributeError as error:
                raise UserError(
                    f"attention_specs: layer {index}: no module {place['path']!r} in the base model"
                ) from error
            block = make_mixer_layer(attention, layout, index, layer)
            base.set_submodule(place["path"], block)
            self._mixer_layers.append(block)
        self.base = base
        self.post_init()
        if fresh:  # `post_init` gives the projections within a mixer the family's start
            for block in self._mixer_layers:
                if isinstance(block, MixerLayer):
                    block.mixer.reset_parameters()

    @property
    def mixer_layers(self) -> list[MixerLayer | AttentionLayer]:
        """What stands in the place of attention, layer by layer."""
        return self._mixer_layers

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in `transformers`, but a checkpoint that does not hold exactly the weights of its plan is a UserError:
        what is missing would be drawn at random, and a part at random is no student."""
        kwargs["ignore_mismatched_sizes"] = True  # so that they are named here
        try:
            loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise UserError(f"the weights of this student cannot be read (broken or cut off): {error}") from error
        model, info = loaded
        sizes = [f"{key} {list(found)} for {list(wanted)}" for key, found, wanted in info["mismatched_keys"]]
        kinds = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"], "of another size": sizes}
        wrong = [f"{kind}: {_listed(keys)}" for kind, keys in kinds.items() if keys]
        if wrong:
            raise UserError(f"the checkpoint does not match its plan; {'; '.join(wrong)}")
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Mixer):
            if not any(getattr(p, "_is_hf_initialized", False) for p in module.parameters()):
                module.reset_parameters()
        else:
            self.base._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.base.set_output_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in `transformers`; the new size goes into the base configuration, from which the student is loaded."""
        embeddings = self.base.resize_token_embeddings(*args, **kwargs)
        self.config.base_config.get_text_config().vocab_size = self.base.config.get_text_config().vocab_size
        return embeddings

    # ------------------------------------------------------------------ forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: SubquadCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        objective: Callable[..., Any] | None = None,
        cu_seq_lens_q: Tensor | None = None,
        past_key_values: SubquadCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As any causal language model of `transformers`.

        attention_mask: `[B, tokens seen]`, 0 at padding, which may stand anywhere; None where there is none.
        cache: what `new_cache` made, brought up to date in place; `past_key_values` is its older name.
        position_ids: `[B, T]`; without a cache, a position that starts again at 0 starts a new document.
        cu_seq_lens_q: `[documents + 1]`, where the documents of a batch of one row begin, and T; what collators that
            flatten batches give beside it (`cu_seq_lens_k`, `max_length_q`, `max_length_k`) is not needed.
        objective: a training objective, called as `objective(self, input_ids, **kwargs)` in place of the forward, so
            that wrappers which synchronise gradients (DDP, FSDP) see every loss pass through here.

        Raises:
            ValueError: a position past the end of the base model's table of learned positions (GPT-2, OPT); padding
                takes no place in it.
        """
        if objective is not None:
            return objective(self, input_ids, **kwargs)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None and not self.training:
            cache = self.new_cache()
        for name in ("cu_seq_lens_k", "max_length_q", "max_length_k"):
            kwargs.pop(name, None)
        described = self._describe(input_ids, inputs_embeds, attention_mask, position_ids, cache, cu_seq_lens_q)
        return self.base(labels=labels, use_cache=bool(use_cache and cache is not None), **described, **kwargs)

    def last_hidden_state(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """The hidden states that the head is given, `[B, T, hidden]`; without padding and cache."""
        described = self._describe(input_ids, None, None, position_ids, None, None)
        return self.base.base_model(use_cache=False, **described).last_hidden_state

    def _describe(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: SubquadCache | None,
        cu_seqlens: Tensor | None,
    ) -> dict[str, Any]:
        """What the base model is given for these tokens: our own mask, explicit positions, our own cache."""
        like = input_ids if input_ids is not None else inputs_embeds
        if like is None:
            raise ValueError("give input_ids or inputs_embeds")
        if cache is not None and not isinstance(cache, SubquadCache):
            raise TypeError(f"{CACHE_ARGUMENT}: got {type(cache).__name__}, expected student.new_cache()")
        B, T = like.shape[:2]
        seen = 0 if cache is None else cache.get_seq_length()
        mask, position_ids = prepare_mask_and_positions(
            attention_mask, position_ids, B, T, seen, like.device, cu_seqlens
        )
        self.check_positions(position_ids)
        if mask.shape[-1] and not any(self.config.keeps_attention):
            mask = mask[..., -T:]
        return {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": mask,
            "position_ids": position_ids,
            CACHE_ARGUMENT: cache,
        }

    def check_positions(self, position_ids: Tensor) -> None:
        table = self.config.max_learned_positions
        if table is not None and int(position_ids.max()) >= table:
            raise ValueError(
                f"position {int(position_ids.max())} is past the table of {table} learned positions that the "
                f"{self.config.base_config.model_type} teacher has; give at most {table} tokens a row, prompt and "
                "continuation together"
            )

    # ------------------------------------------------------------------ cache and generation

    def new_cache(self) -> SubquadCache:
        """An empty cache; its size does not grow with the context except where layers keep attention."""
        return SubquadCache([block.new_cache_layer() for block in self.mixer_layers])

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            chosen = generation_config.cache_implementation
            raise ValueError(f"cache_implementation: got {chosen!r}; a student has a cache of its own")
        if generation_config.use_cache is not False and model_kwargs.get(CACHE_ARGUMENT) is None:
            model_kwargs[CACHE_ARGUMENT] = self.new_cache()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


def _listed(keys: Iterable[str], shown: int = 6) -> str:
    ordered = sorted(keys)
    rest = len(ordered) - shown
    return ", ".join(ordered[:shown]) + (f" and {rest} more" if rest > 0 else "")


def make_mixer_layer(
    attention: nn.Module, layout: AttentionSpec, index: int, layer: dict[str, Any]
) -> MixerLayer | AttentionLayer:
    """What an entry of the plan puts in the place of `attention`."""
    options = dict(layer)
    name = options.pop("mixer")
    if name not in mixers.REGISTRY:
        return AttentionLayer(attention, layout, index, **options)
    reference = next(attention.parameters())
    with torch.device("meta"):  # or it would draw weights that are drawn, copied or loaded later
        mixer = mixers.create(name, layout, **options)
    return MixerLayer(mixer.to(reference.dtype).to_empty(device=reference.device), index)


def make_config(
    base_config: PreTrainedConfig,
    layers: list[dict[str, Any]],
    sites: list[AttentionInfo],
    positions: int | None = None,
) -> SubquadConfig:
    """The student's configuration over a base configuration, which is relieved of its quantization in place."""
    if hasattr(base_config, "quantization_config"):
        del base_config.quantization_config
    return SubquadConfig(
        base_config=base_config,
        layer_specs=layers,
        attention_specs=[{"path": site.path, **asdict(site.spec)} for site in sites],
        max_learned_positions=positions,
        architectures=["SubquadForCausalLM"],
        dtype=base_config.dtype,
    )


AutoConfig.register("subquad", SubquadConfig)
AutoModelForCausalLM.register(SubquadConfig, SubquadForCausalLM)
