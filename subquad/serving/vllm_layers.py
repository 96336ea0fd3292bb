"""The layers of a student in vLLM: `StateLayer` for mixers and windows, `FullAttention` for attention to all tokens.

vLLM joins the new tokens of all sequences to one row, `[1, N, ...]`, and tells each layer where a sequence begins, how
many tokens it had before, and in which page its state is.
"""

import copy
from collections import defaultdict
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor

from subquad.modeling.attention.activations import hidden_states_of
from subquad.modeling.attention.local import calls_interface
from subquad.modeling.attention.tracing import AttentionCall
from subquad.modeling.cache import SubquadCache
from subquad.modeling.layers import AttentionLayer, MixerLayer
from subquad.serving.state_pages import StatePage
from subquad.utils import UserError

PAGED = "subquad_vllm"
"""Name of the attention implementation of `transformers` that calls vLLM's."""


class SequenceBatch(NamedTuple):
    """Sequences that share one call of a layer: indices of their new tokens `[B, T]` and of their pages `[B]`, and how
    many tokens each had before; layers do not distinguish numbers from `StatePage.settled` on."""

    tokens: Tensor
    pages: Tensor
    past_tokens: int


class StepMetadata:
    """The sequences of one step of the server: offsets of their new tokens, `starts: [sequences + 1]`, their numbers of
    tokens with the new ones, and their pages `[sequences]`."""

    def __init__(self, starts: list[int], lengths: list[int], pages: Tensor):
        self.starts, self.lengths, self.pages = starts, lengths, pages
        self._batches: dict[int, list[SequenceBatch]] = {}

    def batches(self, settled: int) -> list[SequenceBatch]:
        """Groups sequences with as many new tokens each, and as many earlier ones, up to `settled`."""
        if settled not in self._batches:
            groups: dict[tuple[int, int], list[int]] = defaultdict(list)
            for row, (start, end) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
                if end > start:  # a row may be padding
                    groups[end - start, min(self.lengths[row] - (end - start), settled)].append(row)
            self._batches[settled] = [self._batch(rows, *key) for key, rows in groups.items()]
        return self._batches[settled]

    def _batch(self, rows: list[int], new_tokens: int, past_tokens: int) -> SequenceBatch:
        device = self.pages.device
        first = torch.tensor([self.starts[row] for row in rows], device=device)
        tokens = first[:, None] + torch.arange(new_tokens, device=device)
        return SequenceBatch(tokens, self.pages[torch.tensor(rows, device=device)].long(), past_tokens)


class StateBackend(AttentionBackend):
    """Describes `StateLayer` to vLLM."""

    @staticmethod
    def get_name() -> str:
        return "SUBQUAD"

    @staticmethod
    def get_builder_cls() -> type["StateMetadataBuilder"]:
        return StateMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


class StateMetadataBuilder(AttentionMetadataBuilder[StepMetadata]):
    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # abstract in vLLM

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepMetadata:
        common: Any = common_attn_metadata
        mode = self.vllm_config.cache_config.mamba_cache_mode
        table = mamba_get_block_table_tensor(common.block_table_tensor, common.seq_lens, self.kv_cache_spec, mode)
        lengths = common.seq_lens_cpu_upper_bound  # exact without speculative decoding; reading `seq_lens` waits
        lengths = common.seq_lens.cpu() if lengths is None else lengths
        return StepMetadata(common.query_start_loc_cpu.tolist(), lengths.tolist(), table[:, 0])


class StateLayer(nn.Module, MambaBase):
    """A mixer, or attention of which all heads have a window, whose cache is in vLLM's pages.

    Args:
        layer: of a student.
        page: how its cache lies in a page.
        page_bytes: size of a page, the same for all layers, so that they are one group with one page a sequence.
        name: of the layer in vLLM.
    """

    def __init__(self, layer: MixerLayer | AttentionLayer, page: StatePage, page_bytes: int, name: str):
        super().__init__()
        self.layer, self.page, self.page_bytes, self.name = layer, page, page_bytes, name
        self.kv_cache: tuple[Tensor, ...] = ()
        self.views: list[Tensor] = []

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((self.page_bytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def get_attn_backend(self) -> type[AttentionBackend]:
        return StateBackend

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        self.views = self.page.views(self.kv_cache[0])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures memory
            args, kwargs = with_cache(None, args, kwargs)
            return self.layer(*args, **kwargs)
        x = hidden_states_of(args, kwargs)
        y, num_outputs = torch.zeros_like(x), self.layer.spec.num_outputs
        for tokens, pages, past_tokens in metadata[self.name].batches(self.page.settled):  # type: ignore[index, call-overload]
            cache_layer = self.page.load(self.views, pages, past_tokens)
            cache = SubquadCache([cache_layer] * (self.layer.index + 1))
            own_args, own_kwargs = with_cache(cache, *with_tokens(tokens, x.shape[1], args, kwargs))
            result = self.layer(*own_args, **own_kwargs)
            own = result[0] if isinstance(result, tuple) else result
            y[0, tokens.flatten()] = own.flatten(0, 1)
            self.page.store(self.views, pages, cache_layer)
        return (y, *[None] * (num_outputs - 1)) if num_outputs else y


class FullAttention(nn.Module):
    """A teacher's attention module whose keys and values vLLM keeps.

    Args:
        layer: attention without windows.
        call: of its module, traced in a forward pass.
        name: of the layer in vLLM.

    Raises:
        UserError: vLLM's attention does not compute what the module does.
    """

    def __init__(self, layer: AttentionLayer, call: AttentionCall | None, name: str, vllm_config: VllmConfig):
        super().__init__()
        spec, attention = layer.spec, layer.attention
        if call is None or not calls_interface(attention):
            raise UserError(f"layer {layer.index}: {type(attention).__name__} computes attention itself")
        options = call.attention_kwargs
        if spec.value_dim != spec.head_dim or options.get("s_aux") is not None:
            raise UserError(f"layer {layer.index}: got values of another size than keys, or learned sinks")
        attention.config = copy.copy(attention.config)  # type: ignore[assignment, arg-type]
        attention.config._attn_implementation_internal = PAGED  # type: ignore[union-attr]
        self.attention, self.spec = attention, spec
        self.paged = Attention(
            num_heads=spec.num_heads,
            head_size=spec.head_dim,
            scale=options.get("scaling") or spec.head_dim**-0.5,
            num_kv_heads=spec.num_kv_heads,
            cache_config=vllm_config.cache_config,
            logits_soft_cap=options.get("softcap"),
            prefix=name,
        )

    def forward(self, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        args, kwargs = with_cache(None, args, kwargs)
        token = _running.set(self)
        try:
            return self.attention(*args, attention_mask=None, **kwargs)
        finally:
            _running.reset(token)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query `[1, H, N, K]`; key and value `[1, G or H, N, K]`; returns `[1, N, H, K]`."""
        repeats = key.shape[1] // self.spec.num_kv_heads
        key, value = key[:, ::repeats], value[:, ::repeats]
        query, key, value = (x[0].transpose(0, 1).flatten(1).to(value.dtype) for x in (query, key, value))
        return self.paged(query, key, value).view(1, len(query), self.spec.num_heads, -1)


_running: ContextVar[FullAttention] = ContextVar("the attention that runs in this thread")


def paged_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """An attention function of `transformers`."""
    return _running.get().attend(query, key, value), None


def with_cache(cache: SubquadCache | None, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of an attention module, with `cache` in place of the student's."""
    return mapped(lambda x: cache if isinstance(x, SubquadCache) else x, args, kwargs)


def with_tokens(tokens: Tensor, N: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of an attention module for tokens `[B, T]` (indices) of the N tokens in its row."""

    def select(x: Any) -> Any:
        if isinstance(x, tuple | list):
            return type(x)(select(each) for each in x)
        return x[0, tokens] if isinstance(x, Tensor) and x.shape[:2] == (1, N) else x

    return mapped(select, args, kwargs)


def mapped(function: Callable[[Any], Any], args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return tuple(function(x) for x in args), {name: function(x) for name, x in kwargs.items()}


AttentionInterface.register(PAGED, paged_attention_forward)
AttentionMaskInterface.register(PAGED, sdpa_mask)
