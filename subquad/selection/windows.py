"""A student whose windows can be changed group by group, and how it reads the endings of texts.

What a group is worth is measured at the ends of texts. The contexts before them are read once; an evaluation reads the
endings, a few hundred tokens, with the windows that it asks for, and only the layers from the first whose windows
differ: half of them on average.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from subquad.data.packing import IGNORE_INDEX
from subquad.modeling.attention.activations import (
    LayerActivations,
    capture_activations,
    layer_path,
    record_modules,
)
from subquad.modeling.attention.discovery import AttentionInfo
from subquad.modeling.cache import CACHE_ARGUMENT, HeadGroup, LocalCacheLayer, SubquadCache
from subquad.modeling.linearize import build_student
from subquad.selection.texts import Texts

WHOLE = 2**30
"""The window of a group that is kept whole: more tokens than any text has."""
Windows = Mapping[int, tuple[int, ...]]
"""The window of each key/value head, by layer."""


class WindowedReader:
    """Reads texts with any window for each key/value head; a head sees its window and the first `sinks` tokens.

    Args:
        teacher: stays as it is; the reader has a copy of its weights.
        attention_layers: what `discover_attention(teacher)` returned.
    """

    texts: Texts
    windows: dict[int, tuple[int, ...]]
    """Those of `read`."""

    def __init__(self, teacher: PreTrainedModel, attention_layers: Sequence[AttentionInfo], sinks: int):
        specs = [{"mixer": "attention", "window": WHOLE, "sinks": sinks} for _ in attention_layers]
        self.student = build_student(teacher, specs, list(attention_layers), None).eval()
        self.layers: Any = self.student.mixer_layers
        self.blocks = [self.student.base.get_submodule(layer_path(info.path)) for info in attention_layers]
        self.selects_logits = "logits_to_keep" in inspect.signature(self.student.base.forward).parameters

    @torch.no_grad()
    def read(self, texts: Texts, windows: Windows) -> Tensor:
        """Reads contexts and endings with `windows`, which hold every layer; the next calls of `logits` start from
        there. Returns what `logits` does. The keys and values of all tokens of the contexts are kept."""
        self.texts = Texts(*(ids.to(self.student.device) for ids in texts))
        self.measured = self.texts.labels != IGNORE_INDEX
        self.positions = self.measured.any(0).nonzero().squeeze(1)
        self.windows = dict(windows)
        self._set_windows(windows)
        cache, first = self._new_cache(), torch.zeros(1, dtype=torch.long, device=self.student.device)
        rotary: dict[int, Any] = {}

        def keep(index: int, activations: LayerActivations) -> None:
            rotary[index] = activations.position_embeddings

        with capture_activations([(layer, None) for layer in self.layers], keep):
            self._run(self.texts.contexts, cache, first)
        self.rotary = [rotary[index] for index in range(len(self.layers))]
        self.past = [joined(layer) for layer in cache.layers]  # type: ignore[arg-type]
        with record_modules(self.blocks) as recorded:
            logits = self._read_endings()
        self.results = [recorded[block].result for block in self.blocks]
        return logits

    @torch.no_grad()
    def logits(self, windows: Windows) -> Tensor:
        """The logits of the labelled tokens, `[labels, vocabulary]`, where the endings are read with `windows`; layers
        that it leaves out have those of `read`."""
        changed = [index for index, own in windows.items() if own != self.windows[index]]
        self._set_windows({**self.windows, **windows})
        with self._replayed(min(changed, default=len(self.blocks))):
            return self._read_endings()

    def loss(self, logits: Tensor) -> float:
        """The loss in nats per token: the mean of the means of the answers, which are runs of labels."""
        starts = self.measured & ~F.pad(self.measured, (1, 0))[:, :-1]
        answer = starts.flatten().cumsum(0)[self.measured.flatten()] - 1
        losses = F.cross_entropy(logits.float(), self.texts.labels[self.measured], reduction="none")
        sums = torch.zeros(int(answer[-1]) + 1, device=losses.device).index_add(0, answer, losses)
        return (sums / answer.bincount()).mean().item()

    def _set_windows(self, windows: Windows) -> None:
        for index, own in windows.items():
            self.layers[index].windows = own

    def _new_cache(self) -> SubquadCache:
        """A cache that keeps all tokens."""
        groups = [[HeadGroup(None, 0, group.kv_heads) for group in layer.head_groups] for layer in self.layers]
        return SubquadCache([LocalCacheLayer(each) for each in groups])

    def _read_endings(self) -> Tensor:
        cache, tokens = self._new_cache(), self.texts.contexts.shape[1]
        for index, (layer, (keys, values)) in enumerate(zip(cache.layers, self.past, strict=True)):
            assert isinstance(layer, LocalCacheLayer)
            layer.update_states(tuple(x for g in layer.groups for x in (g.select(keys), g.select(values))), tokens)
            rotary, lasts = self.rotary[index], {group.last_full for group in self.layers[index].head_groups}
            for last in lasts if rotary is not None else ():
                if last is not None and last < tokens:
                    layer.sink_rotations[last] = rotary[0][:, last, None], rotary[1][:, last, None]
        logits = self._run(self.texts.endings, cache, self.positions)
        return logits[self.measured[:, self.positions]]

    def _run(self, ids: Tensor, cache: SubquadCache, positions: Tensor) -> Tensor:
        """The logits at `positions` of the tokens `ids: [B, T]` that follow those in the cache."""
        given = {"logits_to_keep": positions} if self.selects_logits else {}
        logits = self.student(ids, use_cache=True, **given, **{CACHE_ARGUMENT: cache}).logits
        return logits if self.selects_logits else logits[:, positions]

    @contextmanager
    def _replayed(self, count: int) -> Iterator[None]:
        """The first `count` blocks return what they returned in `read`."""
        with ExitStack() as stack:
            for block, result in zip(self.blocks[:count], self.results, strict=False):
                block.forward = lambda *args, result=result, **kwargs: result
                stack.callback(delattr, block, "forward")
            yield


def joined(layer: LocalCacheLayer) -> tuple[Tensor, Tensor]:
    """Keys `[B, G, T, K]` and values of all heads in a cache layer that keeps all tokens."""
    assert layer.states is not None
    order = torch.cat([group.index(layer.states[0].device) for group in layer.groups]).argsort()
    states = layer.states[: 2 * len(layer.groups)]
    keys, values = (torch.cat(states[side::2], 1).index_select(1, order) for side in (0, 1))
    return keys, values
