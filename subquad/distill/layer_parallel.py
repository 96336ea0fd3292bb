"""Layer-parallel training of stages 1 and 2, whose layers are independent problems: every process trains some layers.

Each process runs the teacher on its own rows of a batch. The activations of N consecutive trained layers, N being the
number of processes, are exchanged when all of them are there: a process gets those of one layer from all processes. It
computes the layer's loss and gradients on the rows of one process after those of another. Layers without trained
parameters, of which only the loss is computed, are exchanged in the same way.

Memory: a process holds the inputs and outputs of its own rows in N layers of both kinds, as much again during an
exchange, which is that of one layer and all rows; and the graph of one layer for the rows of one process, as with DDP.

Gradients are not sent, and the optimizer has states of a process's own layers only. Weights are broadcast, and states
sent to the first process, for checkpoints."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.optim import Optimizer

from subquad.modeling.attention.activations import LayerActivations

OnOutput = Callable[[int, LayerActivations], None]
OnLayer = Callable[[int, Iterable[LayerActivations]], None]
"""Takes the number of a layer and its activations for the rows of each process."""


@dataclass(frozen=True)
class Format:
    """A tensor in the content of a message."""

    nbytes: int
    dtype: torch.dtype
    shape: torch.Size
    kept: bool
    """Whether the next layer may have the same tensor."""


LAST, OWN = "as in the last layer", "as in the process of the layer"


class LayerParallel:
    """Which process trains which layer, and what the processes send each other.

    layers: the parameters of each layer; those that require gradients are trained. From then on only those of this
    process's layers require gradients.
    """

    def __init__(self, layers: Sequence[Iterable[nn.Parameter]]):
        self.rank, self.size, self.host_group = dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo")
        self.trained = [[p for p in layer if p.requires_grad] for layer in layers]
        owners = {True: itertools.cycle(range(self.size)), False: itertools.cycle(range(self.size))}
        self.owners = [next(owners[bool(parameters)]) for parameters in self.trained]
        for parameter, owner in self.parameter_owners():
            parameter.requires_grad_(owner == self.rank)

    def parameter_owners(self) -> Iterator[tuple[nn.Parameter, int]]:
        return ((p, owner) for layer, owner in zip(self.trained, self.owners, strict=True) for p in layer)

    # ------------------------------------------------------------------ activations

    def gather_batch(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """The batch of each process, given that of this one; some may have more tensors than others."""
        formats = self.gather_objects({name: (x.shape, x.dtype) for name, x in batch.items()})
        batches = [
            {name: torch.empty(shape, dtype=dtype, device=self.device) for name, (shape, dtype) in tensors.items()}
            for tensors in formats
        ]
        batches[self.rank] = batch
        for process, tensors in enumerate(batches):
            for x in tensors.values():
                dist.broadcast(x, process)
        return batches

    def gather_objects(self, value: Any) -> list[Any]:
        """A Python object of each process; does not wait for the device."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self.host_group)
        return values

    @contextmanager
    def to_owners(self, on_layer: OnLayer) -> Iterator[OnOutput]:
        """Yields a callback that takes the activations of this process's rows, layer by layer; calls `on_layer` in the
        owner of each layer, for the last layers at the end of the context."""
        channels = {True: Channel(self), False: Channel(self)}

        def collect(index: int, activations: LayerActivations) -> None:
            channel = channels[bool(self.trained[index])]
            channel.add(index, activations)
            if len(channel.waiting) == self.size:
                channel.exchange(on_layer)

        yield collect
        for channel in channels.values():
            if channel.waiting:
                channel.exchange(on_layer)

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

    def over_all_layers(self, norm: Tensor) -> Tensor:
        """The norm of the gradients of all layers, from that of this process's layers."""
        squared = norm.to(self.device, torch.float64).square()
        dist.all_reduce(squared)
        return squared.sqrt().to(norm.dtype)

    @property
    def device(self) -> torch.device:
        return next(p.device for p, _ in self.parameter_owners())

    def use_whole_states(self, optimizer: Optimizer) -> None:
        """Lets `state_dict`, which all processes must call, return the states of all layers in the first process, and
        `load_state_dict` take them: checkpoints are those of training in one process."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def gather(_: Optimizer, saved: dict) -> None:
            states = saved["state"].items()
            formats = self.gather_objects({k: {name: (x.shape, x.dtype) for name, x in s.items()} for k, s in states})
            for owner, of_owner in enumerate(formats[1:], 1):
                for key, names in of_owner.items():
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


@dataclass
class Message:
    """The activations of one layer of this process's rows."""

    index: int
    header: list[Format | str | None]
    """Of each argument, of the output and of `head_outputs`: its format, `LAST`, `OWN` or None."""
    content: Tensor
    """The bytes of all tensors with a format: a copy, as the teacher may change them."""
    template: Any
    """The activations without these tensors."""


class Channel:
    """Sends the activations of a layer to each process. Arguments that are the same tensor as in the last layer that it
    got (masks, positions) are not sent again."""

    def __init__(self, parallel: LayerParallel):
        self.rank, self.size, self.gather_objects = parallel.rank, parallel.size, parallel.gather_objects
        self.waiting: list[Message] = []
        """The message to each process in turn."""
        self.sent: dict[tuple[int, int], Tensor] = {}
        """What a process, the first number, got last at a place in the header, the second."""
        self.received: dict[tuple[int, int], Tensor] = {}
        """What a process sent last."""

    def add(self, index: int, activations: LayerActivations) -> None:
        process, header, content = len(self.waiting), list[Format | str | None](), list[Tensor]()
        nested = (activations.args, activations.kwargs, activations.output, activations.head_outputs)
        changing = {id(x) for x in (*activations.tensors, activations.head_outputs)}

        def take(x: Any) -> Any:
            key = process, len(header)
            if not isinstance(x, Tensor) or x.dim() < 2:
                header.append(None if x is None else OWN)
                return x
            if self.sent.get(key) is x:
                header.append(LAST)
                return None
            if id(x) not in changing:
                self.sent[key] = x
            header.append(Format(x.nbytes, x.dtype, x.shape, kept=id(x) not in changing))
            content.append(x.reshape(-1).view(torch.uint8))
            return None

        template = map_nested(take, nested)
        self.waiting.append(Message(index, header, torch.cat(content), template))

    def exchange(self, on_layer: OnLayer) -> None:
        """Sends the waiting messages; calls `on_layer` with what this process got."""
        sent, self.waiting = self.waiting, []
        headers = self.gather_objects([message.header for message in sent])
        own = sent[self.rank] if self.rank < len(sent) else None
        to_here = [] if own is None else [header[self.rank] for header in headers]
        sizes = [sum(x.nbytes for x in header if isinstance(x, Format)) for header in to_here] or [0] * self.size
        content = torch.cat([message.content for message in sent])
        out_sizes = [len(message.content) for message in sent] + [0] * (self.size - len(sent))
        for message in sent:
            del message.content
        received = content.new_empty(sum(sizes))
        dist.all_to_all_single(received, content, sizes, out_sizes)
        del content
        if own is not None:
            parts = zip(range(self.size), to_here, received.split(sizes), strict=True)
            on_layer(own.index, (self.read(own, *part) for part in parts))

    def read(self, own: Message, process: int, header: list[Format | str | None], content: Tensor) -> LayerActivations:
        """The activations for the rows of a process. own: the message of this process about the same layer."""
        places, offset = itertools.count(), 0

        def restore(x: Any) -> Any:
            nonlocal offset
            place = next(places)
            entry = header[place]
            if not isinstance(entry, Format):
                return {None: None, OWN: x, LAST: self.received.get((process, place))}[entry]
            part = content[offset : offset + entry.nbytes]
            offset += entry.nbytes
            tensor = part.clone().view(entry.dtype).view(entry.shape)  # a view of another dtype must be aligned
            if entry.kept:
                self.received[process, place] = tensor
            return tensor

        return LayerActivations(*map_nested(restore, own.template))


def map_nested(function: Callable[[Any], Any], value: Any) -> Any:
    """`function` of everything in nested tuples and dicts, in order."""
    if isinstance(value, tuple):
        return tuple(map_nested(function, x) for x in value)
    if isinstance(value, dict):
        return {name: map_nested(function, x) for name, x in value.items()}
    return function(value)
