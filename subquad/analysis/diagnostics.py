"""Diagnostics of a student: exact mixing matrices, half-lives, hidden states and layer errors, alone and against its
teacher.

Matrices are computed in chunks of rows, one layer and one text at a time, so that 4,096 tokens fit in memory.
docs/analysis.md defines the metrics.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from subquad.analysis import mixing_matrices as matrices
from subquad.analysis.layer_access import (
    WITH_MIXERS,
    LayerAccess,
    Sums,
    layer_access_pair,
    layer_results,
    run_on,
    sums_by_layer,
)
from subquad.analysis.mixing_matrices import MatrixPairs, normalized_abs_rows
from subquad.evaluate.perplexity import prediction_sums
from subquad.evaluate.results import Result
from subquad.mixers.norms import upcast
from subquad.modeling.attention.activations import LayerActivations
from subquad.modeling.layers import AttentionLayer, MixerLayer
from subquad.modeling.near_far import NearFarLayer
from subquad.utils import UserError, eval_mode

CHUNK_ENTRIES = 2**22
"""Entries of a chunk of matrix rows over all heads: 34 MB in float64, of which a few exist at a time."""
SAMPLE_TOKENS = 96
"""Size of sample matrices; entries of larger ones are too small to be seen."""
MAX_HALF_LIFE = 2.0**30
"""Tokens; the half-life of decays that are 1 up to rounding."""


def diagnostics_results(
    model: PreTrainedModel, rows: Tensor, teacher: PreTrainedModel | None = None, top: int = 8
) -> list[Result]:
    """All diagnostics of a student or transformer on texts `rows: [N, T]` of token ids without padding.

    With a teacher also those that compare both. top: see `comparison_results`.

    Raises:
        UserError: attention that cannot be discovered; layers that do not correspond; texts that are too short.
    """
    results = matrix_results(model, rows) + half_life_results(model, rows)
    if teacher is not None:
        results += comparison_results(model, teacher, rows, top) + hidden_state_results(model, teacher, rows)
        results += output_error_results(model, teacher, rows) + swap_results(model, teacher, rows)
    return results


# ---------------------------------------------------------------------- mixing matrices


def matrix_results(model: PreTrainedModel, rows: Tensor) -> list[Result]:
    """`entropy`, `memory_length` and `mass_...` of each head, and `diversity` of each layer (`matrix_statistics`)."""
    access = LayerAccess(model)

    def measure(index: int, recorded: LayerActivations) -> Iterator[Sums]:
        for first, M in matrix_chunks(access.mixer_layers[index], recorded):
            yield matrices.matrix_sums(M, first)

    sums = sums_by_layer(rows, measure, (access, access.mixing_modules))
    return layer_results("matrices", [matrices.matrix_statistics(layer) for layer in sums], rows.numel(), rows.shape[1])


def comparison_results(student: PreTrainedModel, teacher: PreTrainedModel, rows: Tensor, top: int = 8) -> list[Result]:
    """`topk_mass_overlap`, `frobenius` and `row_cosine` (`comparison_statistics`) between the student's mixing matrix
    and the teacher's attention, both on the teacher's input to the layer, and `topk_mass_overlap_chance`.

    top: k of the top-k overlap.

    Raises:
        UserError: layers or heads that do not correspond; texts of at most `top` tokens.
    """
    T = rows.shape[1]
    if not 0 < top < T:
        raise UserError(f"top: got {top} for texts of {T} tokens, expected 1 to {T - 1}")
    ours, theirs = layer_access_pair(student, teacher)

    def measure(index: int, recorded: LayerActivations) -> Iterator[Sums]:
        chunks = (matrix_chunks(access.mixer_layers[index], recorded) for access in (ours, theirs))
        for (first, M), (_, A) in zip(*chunks, strict=True):
            yield matrices.comparison_sums(M, A, first, top)

    with eval_mode(student):
        sums = sums_by_layer(rows, measure, (theirs, theirs.mixing_modules))
    results = layer_results("matrices", [matrices.comparison_statistics(layer) for layer in sums], rows.numel(), T)
    chance = matrices.chance_overlap(T, top)
    return [*results, Result("matrices", "topk_mass_overlap_chance", chance, n=rows.numel(), length=T)]


def matrix_chunks(layer: MixerLayer | AttentionLayer, recorded: LayerActivations) -> Iterator[tuple[int, Tensor]]:
    """The mixing matrix of a layer on the recorded inputs of one text, in chunks of rows `[H, rows, T]`, each with the
    index of its first row."""
    T = recorded.hidden_states.shape[1]
    size = max(1, CHUNK_ENTRIES // (layer.spec.num_heads * T))
    matrix_rows = layer.matrix_rows(*recorded.args, **recorded.kwargs)
    for first in range(0, T, size):
        yield first, matrix_rows(slice(first, min(first + size, T)))[0]


@torch.no_grad()
def sample_matrix_pairs(student: PreTrainedModel, teacher: PreTrainedModel, rows: Tensor) -> MatrixPairs:
    """Matrices to look at, on the teacher's input: the first head of the first, a middle and the last layer on the
    first `SAMPLE_TOKENS` tokens of `rows: [N, T]`. The choice is the same for all students of a teacher."""
    ours, theirs = layer_access_pair(student, teacher)
    last = len(theirs.paths) - 1
    pairs = {}
    with eval_mode(student), eval_mode(teacher):
        recorded = theirs.record(theirs.mixing_modules, rows[:1, :SAMPLE_TOKENS])
        for index in sorted({0, last // 2, last}):
            args, kwargs = recorded[index].args, recorded[index].kwargs
            matrices = (access.mixer_layers[index].matrix_rows(*args, **kwargs) for access in (ours, theirs))
            M, A = (rows(slice(None))[0, 0] for rows in matrices)
            pairs[index, 0] = normalized_abs_rows(M).cpu(), normalized_abs_rows(A).cpu()
    return pairs


# ---------------------------------------------------------------------- decays


def find_log_decay(op_inputs: dict[str, Tensor]) -> Tensor | None:
    """The log decay among an op's inputs, per state `[B, T, G]` or per channel `[B, T, G, K]`; None if it has none."""
    if "forget_gate" in op_inputs:
        return F.logsigmoid(upcast(op_inputs["forget_gate"]))
    return op_inputs.get("log_decay")


def token_means(
    model: PreTrainedModel, rows: Tensor, quantity: Callable[[Any, LayerActivations], Tensor | None]
) -> list[Tensor | None]:
    """The mean of `quantity`, `[B, T, ...]`, over all tokens of `rows: [N, T]` for each layer with a mixer, float64;
    None for attention and where it is None."""
    access = LayerAccess(model)

    def measure(index: int, recorded: LayerActivations) -> Iterator[Sums]:
        layer = access.mixer_layers[index]
        values = quantity(layer, recorded) if isinstance(layer, WITH_MIXERS) else None
        if values is not None:
            yield {"sum": values.double().sum((0, 1))}

    sums = sums_by_layer(rows, measure, (access, access.mixing_modules))
    return [layer["sum"] / rows.numel() if layer else None for layer in sums]


def mean_log_decays(model: PreTrainedModel, rows: Tensor) -> list[Tensor | None]:
    """The mean log decay of each layer over all tokens of `rows: [N, T]`: `[G]` or `[G, K]`, float64; None for mixers
    without a decay (linear attention, DeltaNet) and attention."""

    def log_decay(layer: MixerLayer | NearFarLayer, recorded: LayerActivations) -> Tensor | None:
        return find_log_decay(layer.gates(*recorded.args, **recorded.kwargs))

    return token_means(model, rows, log_decay)


def half_lives(model: PreTrainedModel, rows: Tensor) -> list[Tensor | None]:
    """Half-lives in tokens of each layer on texts `rows: [N, T]`: `[G]`, or `[G, K]` for decays per channel.

    n tokens after a write, its share of the state is exp(sum of g) with g <= 0 the log decays. The half-life is log 2
    over the mean of -g.
    """
    return [
        None if mean is None else (-math.log(2) / mean.clamp_max(-math.log(2) / MAX_HALF_LIFE))
        for mean in mean_log_decays(model, rows)
    ]


def half_life_results(model: PreTrainedModel, rows: Tensor) -> list[Result]:
    """`half_life` (tokens): the median over the channels of each state (under `head`); without head the median over a
    layer's states; without layer over all states. Empty without decays."""
    layers = [
        {} if layer is None else {"half_life": layer.view(len(layer), -1).median(-1).values}
        for layer in half_lives(model, rows)
    ]
    return layer_results("decays", layers, rows.numel(), average=lambda all_heads: torch.cat(all_heads).median())


# ---------------------------------------------------------------------- hidden states and layer errors


def hidden_state_results(student: PreTrainedModel, teacher: PreTrainedModel, rows: Tensor) -> list[Result]:
    """`cka` and `cosine` (`state_statistics`) of the outputs of each decoder layer on texts `rows: [N, T]`, and their
    means over layers. Each model runs by itself.

    The first token of each text is left out, because its state is often large enough to dominate (arXiv 2402.17762).

    Raises:
        UserError: models whose layers do not correspond; texts of one token.
    """
    if rows.shape[1] < 2:
        raise UserError(f"rows: got texts of {rows.shape[1]} token, expected at least 2 (the first is left out)")

    def measure(_index: int, a: LayerActivations, b: LayerActivations) -> Iterator[Sums]:
        yield matrices.state_sums(a.output[0, 1:], b.output[0, 1:].to(student.device))

    pair = layer_access_pair(student, teacher)
    sums = sums_by_layer(rows, measure, *((access, access.decoder_layers) for access in pair))
    return layer_results(
        "states", [matrices.state_statistics(layer) for layer in sums], rows[:, 1:].numel(), rows.shape[1]
    )


def output_error_results(student: PreTrainedModel, teacher: PreTrainedModel, rows: Tensor) -> list[Result]:
    """|student - teacher|^2 / |teacher|^2 of each layer's outputs on the teacher's inputs, summed over all tokens.

    `mixer_error`: of the mixer against the attention; a mixer whose output is zero has 1.
    `layer_error`: of the whole decoder layer, with residual stream and MLP.

    The errors do not sum to the student's: in the student, a layer's input contains the errors of those before it.
    """
    ours, theirs = layer_access_pair(student, teacher)

    def measure(index: int, attention: LayerActivations, layer: LayerActivations) -> Iterator[Sums]:
        with ours.installed():
            for metric, module, recorded in (
                ("mixer_error", ours.mixing_modules[index], attention),
                ("layer_error", ours.decoder_layers[index], layer),
            ):
                target = recorded.output.double()
                error = (run_on(module, recorded).double() - target).square().sum()
                yield {metric: error.cpu(), f"{metric} power": target.square().sum().cpu()}

    with eval_mode(student):
        sums = sums_by_layer(rows, measure, (theirs, theirs.mixing_modules), (theirs, theirs.decoder_layers))
    errors = [{metric: s[metric] / s[f"{metric} power"] for metric in ("mixer_error", "layer_error")} for s in sums]
    return layer_results("layer errors", errors, rows.numel(), rows.shape[1])


@torch.no_grad()
def swap_results(student: PreTrainedModel, teacher: PreTrainedModel, rows: Tensor) -> list[Result]:
    """The effect of replacing one decoder layer of the teacher by the student's, for each layer, in nats per token:
    `swap_kl`, the KL divergence from the teacher's next-token distribution, and `swap_loss`, the increase in loss."""
    ours, theirs = layer_access_pair(student, teacher)
    totals = torch.zeros(len(ours.paths), 2, dtype=torch.float64)
    with eval_mode(student), eval_mode(teacher):
        for ids in rows.to(teacher.device).split(1):
            unchanged = teacher(input_ids=ids, use_cache=False).logits[0, :-1]
            for index, total in enumerate(totals):
                with ours.installed(), theirs.with_layer(index, ours):
                    swapped = teacher(input_ids=ids, use_cache=False).logits[0, :-1]
                _, loss, _, teacher_loss, kl, _, _ = prediction_sums(swapped, unchanged, ids[0, 1:])
                total += torch.stack([kl, loss - teacher_loss])
    layers = [{"swap_kl": kl, "swap_loss": loss} for kl, loss in totals / rows[:, 1:].numel()]
    return layer_results("layer errors", layers, rows.numel(), rows.shape[1])
