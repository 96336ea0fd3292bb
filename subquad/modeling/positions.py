"""How a model encodes positions: the length of a table of learned positions, and whether it follows `position_ids`."""

import torch
import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedModel

from subquad.modeling.attention.discovery import random_tokens
from subquad.modeling.attention.tracing import TRACE_LENGTH
from subquad.utils import UserError


@torch.no_grad()
def find_max_learned_positions(model: PreTrainedModel) -> int | None:
    """Number of positions in `model`'s table of learned positions; None where it has none.

    The table is the embedding that returns consecutive rows of its weight for the tokens of a row.
    """
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()]
    outputs: dict[int, Tensor] = {}

    def record(table, args, output):
        outputs[id(table)] = output

    hooks = [table.register_forward_hook(record) for table in tables]
    try:
        if tables:
            model(input_ids=random_tokens(model), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for table in tables:
        output = outputs.get(id(table))
        if output is None or output.shape[-2] != TRACE_LENGTH:
            continue
        output = output.flatten(0, -2)[:TRACE_LENGTH]
        first = int((table.weight - output[0]).abs().sum(-1).argmin())  # OPT reserves the first rows for padding
        if first + TRACE_LENGTH <= len(table.weight) and torch.equal(
            table.weight[first : first + TRACE_LENGTH], output
        ):
            return len(table.weight) - first
    return None


@torch.no_grad()
def check_positions_and_cache(model: PreTrainedModel) -> None:
    """Raises UserError if `model` ignores `position_ids`, or its output depends on whether there is a cache.

    A model that counts positions itself (BART) would shift tokens after padding and in packed documents. In Gemma 3n,
    before transformers 5.5, layers find the keys of other layers only in a cache; attention is traced without one.

    The test is a row of one repeated token: attention gives the same at each position, so that any difference between
    positions comes from the position encoding.
    """
    name = type(model).__name__
    tokens = random_tokens(model)[:1, :1].expand(1, 4)
    default, zero_positions, cached = (
        model.base_model(input_ids=tokens, **arguments)[0].float()
        for arguments in (
            {"use_cache": False},
            {"use_cache": False, "position_ids": torch.zeros_like(tokens)},
            {"use_cache": True},
        )
    )
    rms = float(default.square().mean().sqrt())
    if torch.equal(default, zero_positions) and float((default - default[:, :1]).abs().max()) > 1e-3 * rms:
        raise UserError(
            f"{name} cannot be linearized: it ignores position_ids, so that padding and packed documents would shift "
            "the positions of its tokens"
        )
    if float((default - cached).square().mean().sqrt()) > 3e-2 * rms:
        raise UserError(
            f"{name} cannot be linearized: its output with a cache differs from that without, as where layers have no "
            "keys and values of their own"
        )
