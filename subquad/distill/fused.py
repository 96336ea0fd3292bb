"""Placeholder while this is written: the plain path is used."""

from typing import NamedTuple

from torch import Tensor


class Head(NamedTuple):
    weight: Tensor


def read_head(model):
    return None


def fused_distillation_loss(*a, **k):
    raise NotImplementedError
