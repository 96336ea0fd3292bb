"""Layer-parallel training of stages 1 and 2, whose layers are independent problems: every process trains some layers.

Each process runs the teacher on its own rows of a batch. The activations of N consecutive trained layers, N being the
number of processes, are exchanged when all of them are there: a process gets those of one layer and of all rows, and
computes this layer's loss and gradients alone. Layers without trained parameters, of which only the loss is computed,
are exchanged in the same way. A process holds at most the activations of its rows in N layers of both kinds, and
twice those of one layer of the whole batch during an exchange.

Gradients are not sent, and the optimizer has states of a process's own layers only. Weights are broadcast, and states
sent to the first process, for checkpoints."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.optim import Optimizer

from subquad.modeling.attention.activations import LayerActivations

OnOutput = Callable[[int, LayerActivations], None]
HIDDEN_STATES = object()
"""In place of the hidden states among a layer's arguments, until those of all rows are there."""


class LayerParallel:
    """Which process trains which layer, and what the processes send each other.

    layers: the parameters of each layer; those that require gradients are trained. From then on only those of this
    process's layers require gradients.
    """

    def __init__(self, layers: Sequence[Iterable[nn.Parameter]]):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.trained = [[p for p in layer if p.requires_grad] for layer in layers]
        owners = {True: itertools.cycle(range(self.size)), False: itertools.cycle(range(self.size))}
        self.owners = [next(owners[bool(parameters)]) for parameters in self.trained]
        for parameter, owner in self.parameter_owners():
            parameter.requires_grad_(owner == self.rank)

    def parameter_owners(self) -> Iterator[tuple[nn.Parameter, int]]:
        return ((p, owner) for layer, owner in zip(self.trained, self.owners, strict=True) for p in layer)

    # ------------------------------------------------------------------ activations

    def own_rows(self, x: Tensor) -> Tensor:
        """Of a tensor with the rows of all processes, those of this one."""
        return x.chunk(self.size)[self.rank]

    @contextmanager
    def to_owners(self, on_output: OnOutput) -> Iterator[OnOutput]:
        """Yields a callback that takes the activations of this process's rows, layer by layer, and calls `on_output` in
        the owner of a layer with those of all rows; for the last layers at the end of the context."""
        waiting: dict[bool, list[Message]] = {True: [], False: []}
        arguments: dict[int, tuple[Tensor, Tensor]] = {}

        def collect(index: int, activations: LayerActivations) -> None:
            group = waiting[bool(self.trained[index])]
            group.append(Message(index, activations, self.arguments_of_all_rows(activations, arguments)))
            if len(group) == self.size:
                self.exchange(group, on_output)

        yield collect
        for group in waiting.values():
            if group:
                self.exchange(group, on_output)

    def arguments_of_all_rows(self, activations: LayerActivations, known: dict[int, tuple[Tensor, Tensor]]) -> Any:
        """The arguments of a layer, without hidden states, for all rows. Most are the same tensors in all layers
        (masks, positions): `known` has those of the layer before, by their place, and what they are for all rows."""
        hidden_states, places = activations.hidden_states, itertools.count()

        def of_all_rows(x: Any) -> Any:
            if x is hidden_states:
                return HIDDEN_STATES
            if not isinstance(x, Tensor) or x.dim() < 2 or len(x) != len(hidden_states):
                return x
            place = next(places)
            if place not in known or known[place][0] is not x:
                whole = x.new_empty(self.size * len(x), *x.shape[1:])
                dist.all_gather_into_tensor(whole, x.contiguous())
                known[place] = x, whole
            return known[place][1]

        return map_nested(of_all_rows, (activations.args, activations.kwargs))

    def exchange(self, group: list["Message"], on_output: OnOutput) -> None:
        """Sends the message of each layer to the process of its place in `group`, which is empty afterwards."""
        own = group[self.rank] if self.rank < len(group) else None
        sizes = [len(message.content) for message in group] + [0] * (self.size - len(group))
        sent = torch.cat([message.content for message in group])
        for message in group:
            del message.content
        group.clear()
        received = sent.new_empty(self.size, sizes[self.rank])
        dist.all_to_all_single(received.view(-1), sent, [sizes[self.rank]] * self.size, sizes)
        del sent
        if own is not None:
            activations = own.of_all_rows(received)
            del received
            on_output(own.index, activations)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all processes; it can be differentiated, also where no parameter has a gradient."""
        total = x.double()
        dist.all_reduce(total)
        return total.requires_grad_(torch.is_grad_enabled())

    # ------------------------------------------------------------------ weights, gradients, optimizer

    @torch.no_grad()
    def broadcast_weights(self) -> None:
        """Gives all processes the weights of all layers."""
        for parameter, owner in self.parameter_owners():
            dist.broadcast(parameter, owner)

    def clip_grad_norm_(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """As `torch.nn.utils.clip_grad_norm_`, by the norm over all layers."""
        parameters = [p for p in parameters if p.grad is not None]
        own = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        squared = own.double().square().to(self.device)
        dist.all_reduce(squared)
        norm = squared.sqrt().to(own.dtype)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    @property
    def device(self) -> torch.device:
        return next(p.device for p, _ in self.parameter_owners())

    def use_whole_states(self, optimizer: Optimizer) -> None:
        """Lets `state_dict`, which all processes must call, return the states of all layers in the first process, and
        `load_state_dict` take them: checkpoints are those of training in one process."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def gather(_: Optimizer, saved: dict) -> None:
            formats: list[Any] = [None] * self.size
            own = {key: {name: (x.shape, x.dtype) for name, x in s.items()} for key, s in saved["state"].items()}
            dist.all_gather_object(formats, own)
            for owner, states in enumerate(formats[1:], 1):
                for key, names in states.items():
                    for name, (shape, dtype) in names.items():
                        if self.rank == owner:
                            dist.send(saved["state"][key][name].to(self.device), 0)
                        elif self.rank == 0:
                            x = torch.empty(shape, dtype=dtype, device=self.device)
                            dist.recv(x, owner)
                            saved["state"].setdefault(key, {})[name] = x.cpu()
            saved["state"] = dict(sorted(saved["state"].items()))

        def take_own(_: Optimizer, saved: dict) -> dict:
            return {**saved, "state": {k: s for k, s in saved["state"].items() if parameters[k].requires_grad}}

        optimizer.register_state_dict_post_hook(gather)
        optimizer.register_load_state_dict_pre_hook(take_own)


class Message:
    """The activations of one layer of this process's rows, as bytes: a copy, as the teacher may change its tensors.
    arguments: `args` and `kwargs` for all rows, with `HIDDEN_STATES`."""

    def __init__(self, index: int, activations: LayerActivations, arguments: Any):
        self.index, self.arguments = index, arguments
        tensors = [x for x in (*activations.tensors, activations.head_outputs) if x is not None]
        self.formats = [(x.nbytes, x.dtype, x.shape[1:]) for x in tensors]
        self.content = torch.cat([x.reshape(-1).view(torch.uint8) for x in tensors])

    def of_all_rows(self, contents: Tensor) -> LayerActivations:
        """The activations from the contents of all processes, `[processes, bytes]`."""
        parts = contents.split([nbytes for nbytes, _, _ in self.formats], 1)
        hidden_states, output, *head_outputs = (
            part.reshape(-1).view(dtype).view(-1, *shape)
            for part, (_, dtype, shape) in zip(parts, self.formats, strict=True)
        )
        args, kwargs = map_nested(lambda x: hidden_states if x is HIDDEN_STATES else x, self.arguments)
        return LayerActivations(args, kwargs, output, *head_outputs)


def map_nested(function: Callable[[Any], Any], value: Any) -> Any:
    """`function` of everything in nested tuples and dicts."""
    if isinstance(value, tuple):
        return tuple(map_nested(function, x) for x in value)
    if isinstance(value, dict):
        return {name: map_nested(function, x) for name, x in value.items()}
    return function(value)
