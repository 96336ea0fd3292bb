"""The parts of a student that learn in a stage: groups by role, low-rank updates, and a running average."""

import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from subquad.config import Lora, Stage
from subquad.modeling.layers import MixerLayer
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.utils import UserError

ROLES = ("mixer", "attention_projections", "backbone", "embeddings")


def roles(student: SubquadForCausalLM) -> dict[int, str]:
    """The role of each parameter, by its id: "embeddings" (with the head), "attention_projections" (those that the
    teacher's attention has too, and attention that is kept), "mixer" (all other parameters of the mixers) or
    "backbone" (MLPs and norms)."""
    found = {id(p): "backbone" for p in student.parameters()}
    for block in student.mixer_layers:
        found.update((id(p), "mixer") for p in block.parameters())
        found.update((id(p), "attention_projections") for p in block.projection_parameters())
    tables = [m for m in student.modules() if isinstance(m, nn.Embedding)]
    head = student.get_output_embeddings()
    for module in [*tables, *([] if head is None else [head])]:
        found.update((id(p), "embeddings") for p in module.parameters())
    for name, p in student.named_parameters():
        if "lora_" in name:
            found[id(p)] = "attention_projections"
    return found


def parameter_groups(
    student: SubquadForCausalLM, trained: Iterable[nn.Parameter], stage: Stage
) -> list[dict[str, Any]]:
    """Lets learn what a stage trains and its recipe does not freeze, and gives it in groups of one rate and one weight
    decay (none on vectors: biases, norms, gates)."""
    wanted, role_of = {id(p) for p in trained}, roles(student)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        group = getattr(stage.param_groups, role_of[id(parameter)])
        low_rank = "lora_" in name
        parameter.requires_grad_((id(parameter) in wanted or low_rank) and not group.frozen)
        if stage.lora is not None and role_of[id(parameter)] == "attention_projections" and not low_rank:
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        decay = stage.weight_decay if group.weight_decay is None else group.weight_decay
        rate = stage.lr if group.lr is None else group.lr
        groups.setdefault((rate, decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    if not groups:
        raise UserError("every part that this stage could teach is frozen; expected one that learns")
    return [{"params": ps, "lr": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()]


# ---------------------------------------------------------------------- low-rank updates


def add_lora(student: SubquadForCausalLM, lora: Lora, seed: int) -> None:
    """Puts a low-rank update beside every copied projection, in place, by PEFT."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError('lora needs PEFT: pip install "subquad[lora]"') from None
    names = [
        re.escape(f"{path}.{name}_proj")
        for path, block in student.named_modules()
        if isinstance(block, MixerLayer)
        for name in ("mixer." + key for key in block.mixer.projections())
    ]
    if not names:
        raise UserError("lora: no layer has a mixer with copied projections; leave lora out")
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, bias="none", target_modules="|".join(names)
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, student)


@torch.no_grad()
def merge_lora(student: SubquadForCausalLM) -> None:
    """Adds the updates to the weights and takes PEFT's layers out again."""
    for path, module in list(student.named_modules()):
        if hasattr(module, "merge") and hasattr(module, "base_layer"):
            module.merge()
            student.set_submodule(path, module.base_layer)
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        student.__dict__.pop(attribute, None)


# ---------------------------------------------------------------------- running average


class EMA:
    """A running average of what learns, in float32: a <- decay a + (1 - decay) w after each step."""

    def __init__(self, student: SubquadForCausalLM, decay: float):
        self.decay = decay
        self.values = {n: p.detach().float().clone() for n, p in student.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, student: SubquadForCausalLM) -> None:
        named = dict(student.named_parameters())
        for name, average in self.values.items():
            average.lerp_(named[name].float(), 1 - self.decay)

    @torch.no_grad()
    def put_into(self, student: SubquadForCausalLM) -> None:
        named = dict(student.named_parameters())
        for name, average in self.values.items():
            named[name].copy_(average)

    def state(self) -> dict[str, Tensor]:
        return self.values

    def load(self, state: dict[str, Tensor]) -> None:
        for name, average in self.values.items():
            average.copy_(state[name])
