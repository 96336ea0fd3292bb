"""Which parameters of a student a stage trains: groups by role, LoRA, and an exponential moving average."""

import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from subquad.config import Lora, Stage
from subquad.modeling.layers import MixerLayer
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.utils import UserError, needs_extra

ROLES = ("mixer", "attention_projections", "backbone", "embeddings")
"""The keys of `param_groups` in a recipe."""


def parameter_roles(student: SubquadForCausalLM) -> dict[int, str]:
    """The role of each parameter, by its `id`.

    "embeddings": embeddings and the head. "attention_projections": the projections that the teacher's attention has
    too, and attention that is kept. "mixer": all other parameters of the mixers. "backbone": MLPs and norms.
    """
    role_of = {id(p): "backbone" for p in student.parameters()}
    for layer in student.mixer_layers:
        role_of.update((id(p), "mixer") for p in layer.parameters())
        role_of.update((id(p), "attention_projections") for p in layer.projection_parameters())
    embeddings = [m for m in student.modules() if isinstance(m, nn.Embedding)]
    head = student.get_output_embeddings()
    for module in [*embeddings, *([] if head is None else [head])]:
        role_of.update((id(p), "embeddings") for p in module.parameters())
    for name, p in student.named_parameters():
        if "lora_" in name:
            role_of[id(p)] = "attention_projections"
    return role_of


def parameter_groups(
    student: SubquadForCausalLM, trained: Iterable[nn.Parameter], stage: Stage
) -> list[dict[str, Any]]:
    """The optimizer's parameter groups: those of `trained` that the recipe does not freeze, by learning rate and weight
    decay. Vectors (biases, norms, gates) have no weight decay. Sets `requires_grad` accordingly.

    Raises:
        UserError: everything that the stage trains is frozen.
    """
    trained_ids, role_of = {id(p) for p in trained}, parameter_roles(student)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        group = getattr(stage.param_groups, role_of[id(parameter)])
        low_rank = "lora_" in name
        parameter.requires_grad_((id(parameter) in trained_ids or low_rank) and not group.frozen)
        if stage.lora is not None and role_of[id(parameter)] == "attention_projections" and not low_rank:
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        decay = stage.weight_decay if group.weight_decay is None else group.weight_decay
        rate = stage.lr if group.lr is None else group.lr
        groups.setdefault((rate, decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    if not groups:
        raise UserError("param_groups: all groups that this stage trains are frozen; expected at least one that is not")
    return [{"params": ps, "lr": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()]


# ---------------------------------------------------------------------- LoRA


def add_lora(student: SubquadForCausalLM, lora: Lora, seed: int) -> None:
    """Adds a low-rank update to every copied projection, in place, with PEFT.

    Raises:
        UserError: PEFT is not installed, or no layer has copied projections.
    """
    with needs_extra("lora", "lora"):
        from peft import LoraConfig, inject_adapter_in_model
    names = [
        re.escape(f"{path}.mixer.{name}_proj")
        for path, layer in student.named_modules()
        if isinstance(layer, MixerLayer)
        for name in layer.mixer.projections()
    ]
    if not names:
        raise UserError("lora: no layer has a mixer with copied projections; remove lora from the stage")
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, bias="none", target_modules="|".join(names)
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, student)


@torch.no_grad()
def merge_lora(student: SubquadForCausalLM) -> None:
    """Adds the updates to the weights and removes PEFT's layers."""
    for path, module in list(student.named_modules()):
        if hasattr(module, "merge") and hasattr(module, "base_layer"):
            module.merge()
            student.set_submodule(path, module.base_layer)
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        student.__dict__.pop(attribute, None)


# ---------------------------------------------------------------------- exponential moving average


class EMA:
    """Exponential moving average of the trained parameters, in float32: a <- decay a + (1 - decay) w."""

    def __init__(self, student: SubquadForCausalLM, decay: float):
        self.decay = decay
        self.averages = {n: p.detach().float().clone() for n, p in student.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, student: SubquadForCausalLM) -> None:
        parameters = dict(student.named_parameters())
        for name, average in self.averages.items():
            average.lerp_(parameters[name].float(), 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, student: SubquadForCausalLM) -> None:
        parameters = dict(student.named_parameters())
        for name, average in self.averages.items():
            parameters[name].copy_(average)

    def state_dict(self) -> dict[str, Tensor]:
        return self.averages

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, average in self.averages.items():
            average.copy_(state[name])
