"""`SubquadForCausalLM` for vLLM: the student's own model, whose caches are in vLLM's pages.

Embeddings, MLPs, norms and the head are the modules of `transformers`; they see the tokens of all sequences as one row.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
import torch.nn as nn
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, get_temporal_copy_spec

from subquad import SubquadForCausalLM as Student
from subquad.modeling.attention.tracing import trace_attention
from subquad.modeling.cache import CACHE_ARGUMENT, RecurrentCacheLayer
from subquad.modeling.layers import AttentionLayer
from subquad.serving.state_pages import StatePage
from subquad.serving.vllm_layers import FullAttention, StateLayer
from subquad.utils import UserError


class SubquadForCausalLM(nn.Module):
    """A student in vLLM (interfaces `HasInnerState`, `IsHybrid` and `SupportsMambaPrefixCaching`).

    Raises:
        UserError: a student, or an option of vLLM, that cannot be served.
    """

    has_inner_state: ClassVar[Literal[True]] = True
    is_hybrid: ClassVar[Literal[True]] = True
    supports_mamba_prefix_caching: ClassVar[Literal[True]] = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        check_options(vllm_config)
        model = vllm_config.model_config
        student = Student.from_pretrained(model.model, revision=model.revision, dtype=model.dtype)
        self.student = student.eval().requires_grad_(False)
        self.config = student.config
        self.cache = student.new_cache()
        """Stays empty: stands for vLLM's in the arguments of decoder layers."""
        self._replace_layers(vllm_config, prefix)

    @torch.no_grad()
    def _replace_layers(self, vllm_config: VllmConfig, prefix: str) -> None:
        student, example = self.student, self.student.new_cache()
        token = torch.zeros(1, 1, dtype=torch.long, device=student.device)
        student(input_ids=token, **{CACHE_ARGUMENT: example})
        kept = [x for x in student.mixer_layers if isinstance(x, AttentionLayer) and not x.is_local]
        calls = {call.module: call for call in trace_attention(student, token)} if kept else {}
        pages = {
            index: StatePage(student.mixer_layers[index], layer)
            for index, layer in enumerate(example.layers)
            if isinstance(layer, RecurrentCacheLayer)
        }
        page_bytes = max((page.nbytes for page in pages.values()), default=0)
        known = vllm_config.compilation_config.static_forward_context
        for index, layer in enumerate(student.mixer_layers):
            name = f"{prefix}.layers.{index}.mixer" if prefix else f"layers.{index}.mixer"
            new: nn.Module
            if index in pages:
                new = known[name] = StateLayer(layer, pages[index], page_bytes, name)
            else:
                assert isinstance(layer, AttentionLayer)
                new = FullAttention(layer, calls.get(layer.attention), name, vllm_config)
            student.base.set_submodule(student.config.attention_specs[index]["path"], new)

    # ------------------------------------------------------------------ what vLLM asks of a class

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        layers = vllm_config.compilation_config.static_forward_context.values()
        return ((max((x.page_bytes for x in layers if isinstance(x, StateLayer)), default=0),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, ...]:
        return (get_temporal_copy_spec,)

    @classmethod
    def get_mamba_state_copy_funcs(cls, mamba_types: set[Any]) -> dict[Any, tuple[MambaStateCopyFunc, ...]]:
        return dict.fromkeys(mamba_types, cls.get_mamba_state_copy_func())

    # ------------------------------------------------------------------ running

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.student.get_input_embeddings()(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The last hidden states `[N, hidden]` of tokens or embeddings `[N, ...]` at positions `[N]`."""
        tokens = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        tokens = {name: None if x is None else x[None] for name, x in tokens.items()}
        call = {CACHE_ARGUMENT: self.cache, "use_cache": True, "attention_mask": own_mask(positions.device)}
        return self.student.base_model(**tokens, position_ids=positions[None], **call).last_hidden_state[0]

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """The logits `[n, vocabulary]` of last hidden states `[n, hidden]`: the base model's forward behind its
        backbone, which returns the hidden states."""
        base: Any = self.student.base
        result = BaseModelOutputWithPast(last_hidden_state=hidden_states[None])
        backbones = {base.base_model, base.get_decoder()} - {base, None}  # OPT calls the decoder in its backbone
        for module in backbones:
            module.forward = lambda *args, **kwargs: result
        try:
            mask = own_mask(hidden_states.device)
            return base(inputs_embeds=hidden_states[None], attention_mask=mask, use_cache=False).logits[0]
        finally:
            for module in backbones:
                del module.forward

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Nothing: `__init__` has loaded and checked them as `transformers` does. Returns the names of all."""
        return {name for name, _ in self.named_parameters()}


def own_mask(device: torch.device) -> Tensor:
    """The student's own mask (`subquad.modeling.masks`) of a row without padding."""
    return torch.empty(1, 1, 1, 0, dtype=torch.bool, device=device)


def check_options(vllm_config: VllmConfig) -> None:
    """Raises UserError for options of vLLM that have no meaning for a student's own modules."""
    parallel = vllm_config.parallel_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if getattr(parallel, name) > 1:
            raise UserError(f"{name}: got {getattr(parallel, name)}, expected 1; a student runs on one device")
    if vllm_config.quant_config is not None:
        raise UserError(f"quantization: got {vllm_config.model_config.quantization!r}, expected None")
    if vllm_config.speculative_config is not None:
        raise UserError("speculative_config: got a draft model, expected None; states cannot be taken back")
