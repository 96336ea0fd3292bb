"""Sharded training (FSDP2, `torch.distributed.fsdp.fully_shard`): parameters, gradients and optimizer states are spread
over the processes.

A copy of the student is trained. The student itself stays whole and gets its weights for checkpoints and at the end.
Stages 1 and 2 run layers outside the forward pass of the decoder layers: `gathered` makes the parameters of one whole,
`reduce_gradients` averages and shards its gradients."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.optim import Optimizer

from subquad.modeling.attention.activations import layer_path
from subquad.modeling.modeling_subquad import SubquadForCausalLM


def decoder_layer(student: SubquadForCausalLM, index: int) -> nn.Module:
    """The decoder layer around mixer layer `index`; it is sharded, gathered and freed as a whole."""
    return student.base.get_submodule(layer_path(student.config.attention_specs[index]["path"]))


def shard(student: SubquadForCausalLM, device: torch.device) -> None:
    """Shards `student` in place over all processes, layer by layer, and moves the shards to `device`. Embeddings, norms
    and head are one more unit, which is whole during a forward pass of the student."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for index in range(len(student.mixer_layers)):
        fully_shard(decoder_layer(student, index), mesh=mesh)
    fully_shard(student, mesh=mesh)


@torch.no_grad()
def gather_weights(sharded: SubquadForCausalLM, student: SubquadForCausalLM) -> None:
    """Copies the weights of the sharded copy to the student; all processes call it."""
    for source, target in parameter_pairs(sharded, student):
        target.copy_(source.full_tensor())


@torch.no_grad()
def scatter_weights(student: SubquadForCausalLM, sharded: SubquadForCausalLM) -> None:
    """Copies the weights of the student, equal in all processes, to the sharded copy."""
    for target, source in parameter_pairs(sharded, student):
        target.copy_(distribute_like(source, target))


def parameter_pairs(sharded: SubquadForCausalLM, student: SubquadForCausalLM) -> Iterator[tuple[DTensor, Tensor]]:
    for module in sharded.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass without a backward pass leaves the outermost unit whole
    for source, target in zip(sharded.parameters(), student.parameters(), strict=True):
        assert isinstance(source, DTensor)
        yield source, target


def distribute_like(whole: Tensor, like: DTensor) -> DTensor:
    """This process's part of a tensor that is equal in all processes, sharded as `like`."""
    # src_data_rank=None: without communication
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def gathered(student: SubquadForCausalLM, index: int) -> Iterator[bool]:
    """Inside this context the parameters of decoder layer `index` are whole: other objects than outside if it is
    sharded. Yields whether it is."""
    layer = decoder_layer(student, index)
    if not isinstance(layer, FSDPModule):
        yield False
        return
    layer.unshard()
    try:
        yield True
    finally:
        layer.reshard()


def reduce_gradients(gradients: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The mean over the processes of gradients of sharded parameters, sharded like these; others unchanged."""
    return [reduce_gradient(g, p) if isinstance(p, DTensor) else g for g, p in zip(gradients, parameters, strict=True)]


def reduce_gradient(gradient: Tensor, parameter: DTensor) -> DTensor:
    mesh = parameter.device_mesh
    # gloo has no reduction to a mean
    return DTensor.from_local(gradient / mesh.size(), mesh, [Partial("sum")]).redistribute(mesh, parameter.placements)


def own_part(x: Tensor) -> Tensor:
    """This process's part of a sharded tensor; other tensors as they are."""
    return x.to_local() if isinstance(x, DTensor) else x


def use_whole_states(optimizer: Optimizer) -> None:
    """Lets `state_dict`, which all processes must call, return whole tensors on the CPU, and `load_state_dict` take
    them: checkpoints are those of training without shards."""

    def gather(_: Optimizer, saved: dict) -> None:
        saved["state"] = {
            key: {name: x.full_tensor().cpu() if isinstance(x, DTensor) else x for name, x in state.items()}
            for key, state in saved["state"].items()
        }

    def scatter(optimizer: Optimizer, saved: dict) -> dict:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {
            key: {name: distribute_like(x, parameters[key]) if x.dim() else x for name, x in values.items()}
            for key, values in saved["state"].items()
        }
        return {**saved, "state": state}

    optimizer.register_state_dict_post_hook(gather)
    optimizer.register_load_state_dict_pre_hook(scatter)
