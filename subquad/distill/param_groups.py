"""Which parameters of a student a stage trains: groups by role, LoRA, and an exponential moving average."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn

from subquad.config import Lora, Stage
from subquad.modeling.layers import MixerLayer
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.modeling.near_far import NearFarLayer
from subquad.utils import UserError, needs_extra


def parameter_roles(student: SubquadForCausalLM) -> dict[int, str]:
    """The role of each parameter, by its `id`; the roles are the keys of `param_groups` in a recipe.

    "embeddings": embeddings and a head that is tied to them. "head": a head that is not. "attention_projections": the
    projections that the teacher's attention has too with their low-rank updates, and attention that is kept. "mixer":
    all other parameters of the mixers. "backbone": MLPs and norms.
    """
    role_of = {id(p): "backbone" for p in student.parameters()}
    for layer in student.mixer_layers:
        role_of.update((id(p), "mixer") for p in layer.parameters())
        role_of.update((id(p), "attention_projections") for p in layer.projection_parameters())
    head = student.get_output_embeddings()
    for module in student.modules():
        if isinstance(module, nn.Embedding):
            role_of.update((id(p), "embeddings") for p in module.parameters())
    for p in () if head is None else head.parameters():
        role_of[id(p)] = "embeddings" if role_of[id(p)] == "embeddings" else "head"
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
        role = role_of[id(parameter)]
        group, is_low_rank = getattr(stage.param_groups, role) or stage.param_groups.embeddings, "lora_" in name
        is_replaced = stage.lora is not None and role == "attention_projections" and not is_low_rank
        is_trained = id(parameter) in trained_ids and not is_replaced
        parameter.requires_grad_(is_trained and not group.frozen)
        if parameter.requires_grad:
            decay = stage.weight_decay if group.weight_decay is None else group.weight_decay
            rate = stage.lr if group.lr is None else group.lr
            groups.setdefault((rate, decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    if not groups:
        raise UserError("param_groups: all groups that this stage trains are frozen; expected at least one that is not")
    return [{"params": ps, "lr": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()]


def add_lora(student: SubquadForCausalLM, lora: Lora, seed: int) -> Any:
    """Adds a low-rank update to every copied projection, also of attention beside a memory, in place; PEFT's model,
    whose `merge_and_unload` adds the updates to the weights.

    Raises:
        UserError: PEFT is not installed, or no layer has copied projections.
    """
    with needs_extra("lora", "lora"):
        from peft import LoraConfig, LoraModel
    names = [
        f"{path}.mixer.{name}_proj"
        for path, layer in student.named_modules()
        if isinstance(layer, MixerLayer)
        for name in layer.mixer.projections()
    ]
    for path, layer in student.named_modules():
        if isinstance(layer, NearFarLayer):
            linear = (name for name, module in layer.attention.named_modules() if isinstance(module, nn.Linear))
            names += [f"{path}.attention.{name}" for name in linear]
    if not names:
        raise UserError("lora: no layer has a mixer with copied projections; remove lora from the stage")
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=names)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return LoraModel(student, config, "default")


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Keeps an exponential moving average of the parameters in the optimizer's state, with which it is saved:
    a <- decay a + (1 - decay) w after every step."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    initial = {p: p.detach().clone() for p in parameters}

    @torch.no_grad()
    def update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for p, state in optimizer.state.items():
            state.setdefault("average", initial.pop(p, None)).lerp_(p, 1 - decay)

    optimizer.register_step_post_hook(update)


@torch.no_grad()
def load_average(optimizer: torch.optim.Optimizer) -> None:
    """Gives the parameters the values of their averages."""
    for p, state in optimizer.state.items():
        p.copy_(state["average"])
