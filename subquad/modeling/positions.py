"""How a model knows where a token stands: a table that ends, or something that does not listen."""

import torch
import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedModel

from subquad.modeling.attention.discovery import random_tokens
from subquad.modeling.attention.tracing import TRACE_LENGTH
from subquad.utils import UserError


@torch.no_grad()
def find_max_learned_positions(model: PreTrainedModel) -> int | None:
    """Length of the table where `model` looks positions up, None where it has none: among its embeddings, the one
    that gives the tokens of a row consecutive rows of its weight."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()]
    looked_up: dict[int, Tensor] = {}

    def keep(table, args, output):
        looked_up[id(table)] = output

    hooks = [table.register_forward_hook(keep) for table in tables]
    try:
        if tables:
            model(input_ids=random_tokens(model), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for table in tables:
        rows = looked_up.get(id(table))
        if rows is None or rows.shape[-2] != TRACE_LENGTH:
            continue
        rows = rows.flatten(0, -2)[:TRACE_LENGTH]
        # some leave the first rows to padding
        first = int((table.weight - rows[0]).abs().sum(-1).argmin())
        if first + TRACE_LENGTH <= len(table.weight) and torch.equal(table.weight[first : first + TRACE_LENGTH], rows):
            return len(table.weight) - first
    return None


@torch.no_grad()
def check_positions_and_cache(model: PreTrainedModel) -> None:
    """UserError where `model` places tokens by counting them itself (BART): behind padding, and in packed documents,
    they would stand elsewhere than alone. And where its layers see something else as soon as there is a cache (Gemma 3n
    before transformers 5.5, whose layers find each other's keys there): attention is watched without.

    A row of one token, repeated, is the same everywhere to attention; what differs then comes from the places.
    """
    name = type(model).__name__
    tokens = random_tokens(model)[:1, :1].expand(1, 4)
    counted, told, cached = (
        model.base_model(input_ids=tokens, **how)[0].float()
        for how in (
            {"use_cache": False},
            {"use_cache": False, "position_ids": torch.zeros_like(tokens)},
            {"use_cache": True},
        )
    )
    size = counted.square().mean().sqrt()
    if torch.equal(counted, told) and float((counted - counted[:, :1]).abs().max()) > 1e-3 * float(size):
        raise UserError(
            f"{name} cannot be linearized: it does not follow position_ids, so that padding and packed documents would "
            "move its tokens"
        )
    if float((counted - cached).square().mean().sqrt()) > 3e-2 * float(size):
        raise UserError(
            f"{name} cannot be linearized: it gives something else with a cache than without, as where layers have no "
            "keys and values of their own"
        )
