"""Near and far in one layer: the teacher's attention to a window and the first tokens, a mixer's memory of the rest.

    o_t = (1 - m_t) o_near + m_t o_far        o_far = read(S_{t-window}, q_t)

Near is the teacher's attention, with its projections, norms and rotary embedding. The memory S reads the same queries
and is written with the same keys and values, delayed by `window` tokens of the document: a token is written when it
leaves the window, with its own key (rotated to its own position), value, beta and input gate; the first `sinks` tokens
are never written. Decays and forget gates are not delayed: those of token t shrink the state at token t, so that no
decay waits in the cache. With `memory: all` every token is written when it is read, sinks too. m is the share of the
far part, a number a query head (`MERGES`); it is 0 while the memory is empty. Both parts share the attention's
output projection. Heads with the teacher's own window have no memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from subquad.mixers import AttentionSpec, Mixer
from subquad.modeling.attention.banded import Slots
from subquad.modeling.attention.local import calls_interface
from subquad.modeling.cache import HeadGroup, head_groups
from subquad.modeling.far_call import FarCall, NearFarCacheLayer
from subquad.modeling.layer_types import Window
from subquad.modeling.layers import AttentionLayer
from subquad.modeling.merge import Merge
from subquad.modeling.near_far_matrix import NearFarMatrix
from subquad.utils import UserError


class NearFarLayer(AttentionLayer):
    """The teacher's attention with windows, kept, and a mixer that remembers what has left them.

    Args:
        attention, spec, index, window, sinks: as of `AttentionLayer`.
        memory_heads: the key/value heads with a window that have a memory; None: all.
        mixer: made with `memory_only`: it reads the queries, keys and values of the attention.
        merge: of both parts.
        memory: "outside": of the tokens that have left the window; "all": of all tokens.

    Raises:
        UserError: as `AttentionLayer`; the module computes attention itself.
    """

    def __init__(
        self,
        attention: nn.Module,
        spec: AttentionSpec,
        index: int,
        window: Window | Sequence[Window],
        mixer: Mixer,
        merge: Merge,
        sinks: int = 0,
        memory: str = "outside",
        memory_heads: Sequence[int] | None = None,
    ):
        super().__init__(attention, spec, index, window, sinks)
        if not calls_interface(attention):
            name = type(attention).__name__
            raise UserError(f"window: {name} of layer {index} computes attention itself; a mixer needs its queries")
        self.mixer, self.merge, self.memory = mixer, merge, memory
        self.memory_heads = tuple(range(spec.num_kv_heads) if memory_heads is None else sorted(memory_heads))
        if set(self.memory_heads) - set(range(spec.num_kv_heads)):
            expected = f"expected key/value heads from 0 to {spec.num_kv_heads - 1}"
            raise UserError(f"memory_heads: got {list(self.memory_heads)} for layer {index}, {expected}")

    @property
    def head_groups(self) -> tuple[HeadGroup, ...]:
        return head_groups(self.windows, self.sinks, self.spec.window, self.memory_heads)

    @property
    def has_memory(self) -> bool:
        """Whether some heads have a memory: a window of their own, and not the teacher's."""
        return any(group.memory for group in self.head_groups)

    def reset_parameters(self) -> None:
        """Of the memory and its merge."""
        self.mixer.reset_parameters()
        self.merge.reset_parameters()

    def new_cache_layer(self) -> NearFarCacheLayer | DynamicLayer:  # type: ignore[override]
        return NearFarCacheLayer(self.head_groups) if self.is_local else DynamicLayer()

    @torch.no_grad()
    def memory_nbytes(self) -> int:
        """Bytes of what the memories hold in the cache of one sequence."""
        spec, reference = self.spec, next(self.parameters())
        query = reference.new_empty(1, spec.num_heads, 1, spec.head_dim)
        key, value = (reference.new_empty(1, spec.num_kv_heads, 1, n) for n in (spec.head_dim, spec.value_dim))
        cache = NearFarCacheLayer(self.head_groups)
        call = FarCall(self, reference.new_empty(1, 1, spec.hidden_size), None, cache)
        call.begin(query, key, value, None)
        for index, group in enumerate(self.head_groups):
            if group.memory:
                heads = group.queries(spec.num_heads // spec.num_kv_heads, reference.device)
                slots = Slots(group, query.index_select(1, heads), group.select(key), group.select(value), None, 0)
                call.read(index, slots, heads)
        return sum(x.nbytes for states in cache.far_states.values() for x in states.tensors())

    def matrix_rows(self, *args: Any, **kwargs: Any) -> NearFarMatrix:
        """As of other layers: of both parts (`NearFarMatrix`)."""
        return NearFarMatrix(self, super().matrix_rows(*args, **kwargs), args, kwargs)

    def gates(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As of `MixerLayer`."""
        return NearFarMatrix(self, None, args, kwargs).call.gates

    def matrix_parameters(self) -> list[nn.Parameter]:
        """Those of the memory and of the merge, but for the norm of what the memory reads. Attention, which is the
        teacher's, stays as it is: trained for the memory alone, its queries and keys would make the near part worse."""
        outside = self.mixer.VALUE_PATH_PARAMS
        of_mixer = [p for name, p in self.mixer.named_parameters() if name.split(".")[0] not in outside]
        return [*of_mixer, *self.merge.parameters()]

    def far_call(self, x: Tensor, attention_mask: Tensor | None, cache_layer: Any) -> FarCall:
        packed = attention_mask is not None and attention_mask.dtype == torch.int64
        return FarCall(self, x, attention_mask if packed else None, cache_layer)
