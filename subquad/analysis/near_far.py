"""What near and far each do in a student with both: its score with both, with one of them, and with none."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from subquad.analysis.ablations import Score, mean_loss, zero_output
from subquad.analysis.layer_access import LayerAccess, replaced
from subquad.evaluate.results import Result
from subquad.modeling.near_far import NearFarLayer
from subquad.utils import eval_mode


def near_far_results(model: PreTrainedModel, rows: Tensor, score: Score = mean_loss) -> list[Result]:
    """A student's score on texts `rows: [N, T]` of token ids, task `near and far`; none without layers with both.

    Metrics: `both`; `near_only`, the output of the window (m = 0); `far_only`, that of the memory (m = 1, with `add`
    too) where a token has left the window, before it that of the window; `neither`, the outputs of these layers are
    zero.
    A near part that is nearly as good alone bypasses the memory (arXiv 2510.05901).

    score: a function of model and `rows`; the default is the mean next-token loss in nats.
    """
    layers = [layer for layer in LayerAccess(model).mixer_layers if isinstance(layer, NearFarLayer)]
    if not layers:
        return []
    parts: dict[str, Callable[[], AbstractContextManager]] = {
        "both": ExitStack,
        "near_only": partial(merged_with, layers, forward=near_only),
        "far_only": partial(merged_with, layers, far_only=True),
        "neither": partial(zero_output, layers),
    }
    results = []
    with eval_mode(model):
        for metric, ablation in parts.items():
            with ablation():
                value = score(model, rows)
            results.append(Result("near and far", metric, value, n=rows.numel(), length=rows.shape[1]))
    return results


def merged_with(layers: Iterable[NearFarLayer], **attributes: Any) -> AbstractContextManager:
    """Replaces attributes of what merges near and far in `layers`."""
    return replaced((layer.merge.__dict__, attributes) for layer in layers)


def near_only(near: Tensor, *_: Any) -> Tensor:
    """In place of `Merge.forward`."""
    return near
