"""The error that a window of a key/value head causes, for many windows and all heads, from one pass over text.

The error of a head with a window is

    error = sqrt(c E[|d_t|^2 / |h_t|^2])

with d_t the change of the attention's output at token t, and h_t the input of the decoder layer there. The d_t of all
windows follow from the attention probabilities: those outside a window are removed and the rest is normalized again.
The factor c of a head makes its squared error a divergence of the next-token distribution in nats: to second order,
this is KL = 1/2 E[(g_t . d_t)^2] with g_t the gradient, at the attention's output, of the log-likelihood of tokens
sampled from the teacher itself (the Fisher information; Martens, arXiv 1412.1193). It is estimated on the first row; c
is the geometric mean over the windows of its ratio to the relative squared change, which varies much less. The root
favours heads whose windows are still short: the second order overestimates large changes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from subquad import progress
from subquad.modeling.attention.activations import LayerActivations, capture_activations, layer_path
from subquad.modeling.attention.discovery import AttentionInfo, attention_modules
from subquad.modeling.attention.scores import AttentionProbabilities
from subquad.utils import eval_mode

BLOCK = 16
"""Keys are added up in blocks: windows have less than 16 tokens or a multiple of 16."""
BLOCKS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
WINDOWS = (1, 2, 4, 6, 8, 12, *(BLOCK * blocks for blocks in BLOCKS))
"""The windows that are tried, up to 1,024."""
OCTAVES = 6
"""Octaves of the context that count: in rows of 2,048 tokens, contexts of more than 32 tokens."""
QUERY_STRIDE = 8
"""Every eighth token is a query whose error is measured."""
ROUNDING = 2e-6
"""Probabilities whose sum lacks less to one have no learned sink."""
MAX_NUMBERS = 2**25
"""Largest number of sums of values in memory."""


def window_errors(
    teacher: PreTrainedModel,
    layers: Sequence[AttentionInfo],
    input_ids: Tensor,
    windows: Sequence[int],
    sinks: int,
    seed: int = 0,
    visit: Callable[[int, int, tuple[LayerActivations, Tensor, Tensor | None]], None] | None = None,
) -> list[Tensor]:
    """The error of each window of each key/value head (see the file's docstring), `[heads, windows]` a layer.

    input_ids: `[B, T]`. One row is held in memory at a time, the first one last. visit: called with each row, layer and
    what `record_layers` gives. Short contexts count as much as long ones: each octave of
    the number of tokens before a query, from T / 2 to T, from T / 4 to T / 2, and so on, has the same weight.
    """
    changes = [torch.zeros(2, info.spec.num_kv_heads, len(windows), dtype=torch.float64) for info in layers]
    factors: list[Tensor] = []
    weights = octave_weights(input_ids.shape[1])
    generator = torch.Generator(teacher.device).manual_seed(seed)
    with eval_mode(teacher), progress.bar(len(input_ids) * len(layers), "measuring windows", "layers") as bar:
        for row, ids in reversed(list(enumerate(input_ids.to(teacher.device).split(1)))):
            recorded = record_layers(teacher, layers, ids, None if row else generator)
            queries = slice(row % QUERY_STRIDE, None, QUERY_STRIDE)
            own = weights[queries]
            for index, info in enumerate(layers):
                layer = recorded.pop(0)
                if visit is not None:
                    visit(row, index, layer)
                found = squared_changes(info, *layer, queries, windows, sinks).cpu()
                changes[index] += found.double() @ (own / own.sum())
                bar.update()
            if row == 0:
                factors = [mean_ratio(len(input_ids) * effect / 2, relative) for relative, effect in changes]
    return [(c * relative / len(input_ids)).sqrt() for c, (relative, _) in zip(factors, changes, strict=True)]


def mean_ratio(x: Tensor, y: Tensor) -> Tensor:
    """The geometric mean of x / y over the windows where both change something, `[heads, 1]`."""
    used = (x > 0) & (y > 1e-6 * y.amax(-1, keepdim=True))
    logs = torch.where(used, (x / y).log(), 0.0)
    return (logs.sum(-1, keepdim=True) / used.sum(-1, keepdim=True).clamp_min(1)).exp()


def octave_weights(length: int) -> Tensor:
    """Weights `[length]` of the tokens of a row, float64: equal for each of the last `OCTAVES` octaves of their number
    of preceding tokens; 0 for earlier tokens."""
    octave = (length / torch.arange(1, length + 1, dtype=torch.float64)).log2().floor().long()
    counts = torch.bincount(octave).double()
    return torch.where(octave < OCTAVES, 1 / counts[octave], 0.0)


def record_layers(
    teacher: PreTrainedModel, layers: Sequence[AttentionInfo], ids: Tensor, generator: torch.Generator | None
) -> list[tuple[LayerActivations, Tensor, Tensor | None]]:
    """For each layer on `ids: [1, T]` the activations of its attention, the input of the decoder layer, and, with a
    generator, the gradient, at the attention's output, of the log-likelihood of tokens sampled from the teacher's
    predictions; both `[1, T, hidden]`."""
    attention: dict[int, LayerActivations] = {}
    inputs: dict[int, Tensor] = {}

    def keep(index: int, activations: LayerActivations) -> None:
        attention[index] = activations
        if generator is not None:
            activations.output.retain_grad()

    def keep_input(index: int, activations: LayerActivations) -> None:
        inputs[index] = activations.hidden_states.detach()

    decoder_layers = [teacher.get_submodule(layer_path(info.path)) for info in layers]
    with ExitStack() as stack:
        stack.enter_context(capture_activations(attention_modules(layers), keep))
        stack.enter_context(capture_activations([(module, None) for module in decoder_layers], keep_input))
        if generator is None:
            stack.enter_context(torch.no_grad())
            teacher.base_model(input_ids=ids, use_cache=False)
        else:
            stack.enter_context(only_activations_have_gradients(teacher))
            logits = teacher(input_ids=ids, use_cache=False).logits[0].float()
            cumulative = logits.detach().softmax(-1).cumsum(-1)
            drawn = torch.rand(len(logits), 1, device=logits.device, generator=generator) * cumulative[:, -1:]
            sampled = torch.searchsorted(cumulative, drawn, right=True).clamp_max(logits.shape[-1] - 1)[:, 0]
            F.cross_entropy(logits, sampled, reduction="sum").backward()
    return [(attention[i], inputs[i], attention[i].output.grad) for i in range(len(layers))]


@contextmanager
def only_activations_have_gradients(model: PreTrainedModel) -> Iterator[None]:
    """Inside this context the weights are frozen, and the output of the token embedding requires a gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    embeddings: Any = model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    try:
        model.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        hook.remove()
        for p in trained:
            p.requires_grad_(True)


@torch.no_grad()
def squared_changes(
    info: AttentionInfo,
    activations: LayerActivations,
    layer_input: Tensor,
    gradient: Tensor | None,
    queries: slice,
    windows: Sequence[int],
    sinks: int,
) -> Tensor:
    """|d|^2 / |h|^2 and, with a gradient (else 0), (g . d)^2 for the change d of the attention's output that each
    window of each key/value head causes, `[2, heads, windows, queries]`, at some tokens of one row, whose distance
    divides `BLOCK`."""
    spec, G = info.spec, info.spec.num_kv_heads
    kwargs = {name: detached(value) for name, value in activations.kwargs.items()}
    probabilities = AttentionProbabilities(info.module, spec.window, 0, detached(activations.args), kwargs)
    found_values = probabilities.values()
    if found_values is None:
        found_values = info.values(activations.hidden_states).transpose(1, 2)
    values = found_values[0, :: found_values.shape[1] // G].float()  # [G, T, V]
    output = info.projection_weights("o")[0].float().unflatten(-1, (G, -1)).transpose(0, 1)  # [G, hidden, heads * V]
    gram = output.mT @ output
    size = layer_input[0].float().square().sum(-1)
    positions = torch.arange(values.shape[1], device=values.device)[queries]
    found = values.new_zeros(2, G, len(windows), len(positions))
    series = BLOCK // queries.step  # of queries that are `BLOCK` apart
    pieces = max(1, MAX_NUMBERS * BLOCK // (spec.num_heads * len(values[0]) * (spec.value_dim + 1)))
    for piece in torch.arange(len(positions)).split(series * pieces):
        start, end = int(piece[0]), int(piece[-1]) + 1
        rows = slice(int(positions[start]), int(positions[end - 1]) + 1, queries.step)
        P_of_all = probabilities(rows)[0].float().unflatten(0, (G, -1))  # [G, heads, queries, T]
        for first in range(min(series, end - start)):
            some, P = slice(start + first, end, series), P_of_all[:, :, first::series]
            own = positions[some]
            full = P @ values[:, None]
            effect = None if gradient is None else gradient[0, own].float() @ output  # [G, queries, heads * V]
            for index, windowed in enumerate(windowed_outputs(P, values, own, windows, sinks)):
                change = (windowed - full).transpose(1, 2).flatten(2)  # [G, queries, heads * V]
                found[0, :, index, some] = ((change @ gram) * change).sum(-1) / size[own]
                if effect is not None:
                    found[1, :, index, some] = (change * effect).sum(-1).square()
    return found


def detached(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(detached, value))
    return value.detach() if isinstance(value, Tensor) else value


def windowed_outputs(
    P: Tensor, values: Tensor, positions: Tensor, windows: Sequence[int], sinks: int
) -> Iterator[Tensor]:
    """The outputs `[G, heads, queries, V]` of attention that sees only the first `sinks` tokens and a window, for each
    of `windows`, which are less than `BLOCK` or multiples of it.

    P: probabilities of full attention, `[G, heads, queries, T]`; what their sum lacks to one is that of a learned sink,
    which all windows keep. values: `[G, T, V]`. positions: of the queries, `[queries]`, `BLOCK` apart, so that their
    windows consist of whole blocks of keys.
    """
    learned_sink = 1 - P.sum(-1, keepdim=True)
    learned_sink = learned_sink.masked_fill(learned_sink < ROUNDING, 0)
    values = F.pad(values, (0, 1), value=1.0)  # the last channel adds up the probabilities
    first_tokens = P[..., :sinks] @ values[:, None, :sinks]
    padding = (-1 - int(positions[0])) % BLOCK
    ends = (positions + 1 + padding) // BLOCK  # of each query, the number of blocks up to itself
    length = int(ends[-1]) * BLOCK - padding
    P = P[..., :length].clone()
    P[..., :sinks] = 0
    key_blocks = F.pad(P, (padding, 0)).unflatten(-1, (-1, BLOCK)).permute(0, 3, 1, 2, 4)  # [G, blocks, heads, Q, 16]
    value_blocks = F.pad(values[:, :length], (0, 0, padding, 0)).unflatten(1, (-1, BLOCK))  # [G, blocks, 16, V + 1]
    sums = (key_blocks.flatten(2, 3) @ value_blocks).unflatten(2, key_blocks.shape[2:4]).cumsum(1)
    sums = F.pad(sums, (0, 0, 0, 0, 0, 0, 1, 0))  # [G, blocks + 1, heads, Q, V + 1]
    queries = torch.arange(len(positions), device=P.device)
    last_keys = key_blocks[:, ends - 1, :, queries].permute(1, 2, 0, 3)  # [G, heads, Q, 16]
    last_values = value_blocks[:, ends - 1]  # [G, Q, 16, V + 1]
    for window in windows:
        if window < BLOCK:
            near = torch.einsum("ghqk,gqkv->ghqv", last_keys[..., -window:], last_values[:, :, -window:])
        else:
            starts = (ends - window // BLOCK).clamp_min(0)
            near = (sums[:, ends, :, queries] - sums[:, starts, :, queries]).permute(1, 2, 0, 3)
        total = near + first_tokens
        yield total[..., :-1] / (total[..., -1:] + learned_sink).clamp_min(torch.finfo(P.dtype).tiny)
