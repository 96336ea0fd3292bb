"""`SubquadForCausalLM`: the student as a `transformers` model.

One class serves every architecture and every mixer. It holds a model of the teacher's own class, whose attention
modules are replaced as the configuration says. Embeddings, MLPs, norms and head are the teacher's.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from subquad import mixers
from subquad.mixers import AttentionSpec, Mixer
from subquad.modeling.attention.local import use_local_attention
from subquad.modeling.backbone import PADDING_FREE, add_hooks
from subquad.modeling.cache import CACHE_ARGUMENT, SubquadCache
from subquad.modeling.cache_files import load_cache, save_cache
from subquad.modeling.compiled import CompiledStep, is_recurrent
from subquad.modeling.configuration_subquad import SubquadConfig
from subquad.modeling.layer_types import DEFAULT_MERGE, NEAR_OPTIONS
from subquad.modeling.layers import AttentionLayer, MixerLayer
from subquad.modeling.masks import prepare_mask_and_positions
from subquad.modeling.merge import Merge
from subquad.modeling.near_far import NearFarLayer
from subquad.utils import UserError


class SubquadForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder whose attention is replaced layer by layer, as `config.layer_specs` says. Built by `subquad.linearize`,
    or loaded by `AutoModelForCausalLM.from_pretrained` after `import subquad`."""

    config_class = SubquadConfig
    base_model_prefix = "base"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012 (transformers wants a list)

    def __init__(self, config: SubquadConfig, base: PreTrainedModel | None = None):
        """Replaces the attention of `base`, a model of `config.base_config`, in place; None builds a new one."""
        config.check()
        super().__init__(config)
        fresh = base is None
        if base is None:  # in the dtype of the student, which need not be that of the teacher
            base = AutoModelForCausalLM.from_config(config.base_config, dtype=torch.get_default_dtype())
        for module in () if fresh else base.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]  # `post_init` must not draw its weights again
        self.mixer_layers: list[MixerLayer | AttentionLayer] = []
        """What replaces attention, one entry a layer."""
        for index, layer_spec in enumerate(config.layer_specs):
            spec = dict(config.attention_specs[index])
            path = spec.pop("path")
            try:
                attention = base.get_submodule(path)
            except AttributeError as error:
                raise UserError(f"attention_specs: {index}: path: no module {path!r} in the base model") from error
            layer = make_mixer_layer(attention, AttentionSpec(**spec), index, layer_spec)
            base.set_submodule(path, layer)
            self.mixer_layers.append(layer)
        self.base = base
        self._compiled_step: CompiledStep | None = None
        self.accepts_loss_kwargs = takes_loss_kwargs(base)
        """Whether `Trainer` passes `num_items_in_batch`, so that accumulated gradients are those of the whole batch."""
        add_hooks(self)
        self.post_init()
        if fresh:  # `post_init` initializes the projections of mixers as the base model does its own
            for layer in self.mixer_layers:
                if isinstance(layer, MixerLayer | NearFarLayer):
                    layer.reset_parameters()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in `transformers`, but raises UserError unless the checkpoint holds exactly the weights that its
        configuration needs. `transformers` would draw missing weights at random."""
        kwargs["ignore_mismatched_sizes"] = True  # so that they are reported here
        try:
            loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise UserError(f"the weights of this student cannot be read (damaged or truncated): {error}") from error
        model, info = loaded
        shapes = [f"{key} {list(got)} for {list(expected)}" for key, got, expected in info["mismatched_keys"]]
        problems = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"], "wrong shape": shapes}
        wrong = []
        for problem, keys in problems.items():
            more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
            wrong += [f"{problem}: {', '.join(sorted(keys)[:6])}{more}"] if keys else []
        if wrong:
            raise UserError(f"the weights do not match config.json; {'; '.join(wrong)}")
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Mixer):
            if not any(getattr(p, "_is_hf_initialized", False) for p in module.parameters()):
                module.reset_parameters()
        else:
            self.base._init_weights(module)

    @property
    def base_model(self) -> Any:
        """The backbone, without the head; it takes the arguments of `forward` but for labels and objective."""
        return self.base.base_model

    def get_decoder(self) -> Any:
        return self.base.get_decoder()

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.base.set_output_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in `transformers`; also sets the new size in `base_config`, from which the student is loaded."""
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
        """Runs the student like any causal language model of `transformers`.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, all tokens so far]` or `[B, T]`, 0 at padding, which may be anywhere; None: no padding.
            position_ids: `[B, T]`. Without a cache, a position of 0 within a row starts a new document.
            cache: what `new_cache` returned; it is updated in place. `past_key_values` is its older name.
            inputs_embeds: `[B, T, hidden]`, in place of `input_ids`.
            labels: `[B, T]`, -100 where there is no loss.
            use_cache: None: `config.use_cache`. A cache is made where none is given, except in training.
            objective: a training objective, called as `objective(self, input_ids, **kwargs)` in place of the forward,
                so that wrappers which synchronize gradients (DDP, FSDP) see every loss pass through here.
            cu_seq_lens_q: `[documents + 1]`, offsets of the documents in a batch of one row, from 0 to T. The
                other arguments of padding-free collators (`cu_seq_lens_k`, `max_length_q`, `max_length_k`) are ignored.

        Raises:
            ValueError: a mask of another shape, wrong `cu_seq_lens_q`, neither `input_ids` nor `inputs_embeds`, or a
                position past the base model's learned positions (GPT-2, OPT), which padding does not use up.
            TypeError: a cache that `new_cache` did not make.
        """
        if objective is not None:
            return objective(self, input_ids, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in PADDING_FREE}
        cache = past_key_values if cache is None else cache
        inputs = self.describe_call(
            input_ids, inputs_embeds, attention_mask, position_ids, cache, cu_seq_lens_q, use_cache
        )
        return self.base(labels=labels, **inputs, **kwargs)

    def describe_call(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: SubquadCache | None = None,
        cu_seqlens: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> dict[str, Any]:
        """Arguments of the base model and of its backbone, for those of `forward`: the student's own mask and cache,
        and explicit positions."""
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise ValueError("input_ids: missing; expected input_ids or inputs_embeds")
        if cache is not None and not isinstance(cache, SubquadCache):
            raise TypeError(f"{CACHE_ARGUMENT}: got {type(cache).__name__}, expected student.new_cache()")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None and not self.training:
            cache = self.new_cache()
        past_tokens = 0 if cache is None else cache.get_seq_length()
        mask, position_ids = prepare_mask_and_positions(
            tokens, attention_mask, position_ids, past_tokens, cu_seqlens, self.config.max_learned_positions
        )
        if mask.shape[-1] and not any(self.config.layers_with_attention):
            mask = mask[..., -tokens.shape[1] :]
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, CACHE_ARGUMENT: cache}
        inputs |= {"attention_mask": mask, "position_ids": position_ids}
        return {**inputs, "use_cache": bool(use_cache and cache is not None)}

    # ------------------------------------------------------------------ cache and generation

    def new_cache(self) -> SubquadCache:
        """An empty cache. Only layers that keep full attention make it grow with the context."""
        return SubquadCache([layer.new_cache_layer() for layer in self.mixer_layers])

    def save_cache(self, cache: SubquadCache, path: str | Path) -> None:
        """Writes a cache of this student to a safetensors file."""
        save_cache(cache, self, path)

    def load_cache(self, path: str | Path) -> SubquadCache:
        """The cache in a file that `save_cache` wrote, each layer on the device of its weights.

        Raises:
            UserError: no such file, no cache in it, or one of another student or of other weights.
        """
        devices = [next(layer.parameters()).device for layer in self.mixer_layers]
        # offloaded weights are nowhere between calls
        devices = [self.device if device.type == "meta" else device for device in devices]
        return load_cache(self.new_cache(), self, path, devices)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> None:
        chosen = generation_config.cache_implementation
        if chosen not in (None, "dynamic"):
            raise ValueError(f"cache_implementation: got {chosen!r}, expected None; a student makes its own cache")
        if generation_config.use_cache is not False and model_kwargs.get(CACHE_ARGUMENT) is None:
            model_kwargs[CACHE_ARGUMENT] = self.new_cache()
            if generation_config.is_assistant:  # its drafts are taken back as far as they are rejected
                model_kwargs[CACHE_ARGUMENT].activate_past_recording()
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get(CACHE_ARGUMENT)
        # Read once here, and not at each token. transformers 5.17 finds the new tokens after a cache by the mask.
        if mask is not None and not (cache and cache.get_seq_length()) and bool(mask.all()):
            del model_kwargs["attention_mask"]

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """Whether `generate` compiles the decode step: where `compile_config` is given, on every device."""
        if generation_config.compile_config is None or generation_config.disable_compile:
            return False
        cache = model_kwargs.get(CACHE_ARGUMENT)
        if cache is None or not is_recurrent(cache):
            got = "no cache" if cache is None else "a student with attention, whose cache grows"
            raise ValueError(f"compile_config: got {got}, expected a cache of mixers alone; leave compile_config out")
        return True

    def get_compiled_call(self, compile_config: CompileConfig | None = None) -> CompiledStep:
        """The student with a compiled decode step, called as `student(input_ids=..., cache=...)`; `generate` uses it if
        it gets `compile_config`. Another configuration than that of the last call compiles anew."""
        config = CompileConfig() if compile_config is None else compile_config
        if self._compiled_step is None or self._compiled_step.config != config:
            self._compiled_step = CompiledStep(self, config)
        return self._compiled_step

    def __getstate__(self) -> dict[str, Any]:
        """Without the compiled step, which cannot be copied."""
        return {**self.__dict__, "_compiled_step": None}


def takes_loss_kwargs(model: PreTrainedModel) -> bool:
    """Whether the loss of `model` is divided by `num_items_in_batch`, as `transformers.Trainer` decides it."""
    by_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    return getattr(model, "accepts_loss_kwargs", by_name)


def make_mixer_layer(
    attention: nn.Module, spec: AttentionSpec, index: int, layer_spec: dict[str, Any]
) -> MixerLayer | AttentionLayer:
    """The layer that replaces `attention`, with the dtype and device of its parameters; a mixer is uninitialized."""
    options = dict(layer_spec)
    name = options.pop("mixer")
    if name in mixers.KEPT_ATTENTION:
        layer = AttentionLayer(attention, spec, index, **options)
        if layer.is_local:
            use_local_attention(attention)
        return layer
    reference = next(attention.parameters())
    near = {option: options.pop(option) for option in NEAR_OPTIONS if option in options}
    with torch.device("meta"):  # its weights are initialized, copied or loaded later
        mixer = (mixers.create_memory if near else mixers.create)(name, spec, **options)
        merge = Merge(near.pop("merge", DEFAULT_MERGE), spec, mixer.feature_dim)
    for part in (mixer, merge):
        part.to(reference.dtype).to_empty(device=reference.device)
    if not near:
        return MixerLayer(mixer, index)
    near_far = NearFarLayer(attention, spec, index, mixer=mixer, merge=merge, **near)
    if near_far.is_local:
        use_local_attention(attention)
    return near_far


AutoModelForCausalLM.register(SubquadConfig, SubquadForCausalLM)
