"""Where and in which dtype a model runs, by name."""

import os
import re
from typing import NamedTuple

import torch

from subquad.utils import UserError

DTYPES = ("float32", "bfloat16", "float16")


class Placement(NamedTuple):
    """How a model is loaded.

    device: "auto" (the GPU of this process, or the CPU where there is none), "cpu", "cuda" or "cuda:N". dtype: of the
    weights, one of `DTYPES`, or "auto": as saved. attn_implementation: that of `transformers`, such as "sdpa",
    "flash_attention_2" or "eager"; None: the default.
    """

    device: str = "auto"
    dtype: str = "float32"
    attn_implementation: str | None = None

    @property
    def torch_device(self) -> torch.device:
        return find_device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype | str:
        return self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)


def find_device(name: str = "auto") -> torch.device:
    """The device of this name. Of several processes on one machine (`torchrun`), each has a GPU of its own.

    Raises:
        UserError: another name, or no such GPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    match = re.fullmatch(r"auto|cuda(?::(\d+))?", name)
    if match is None:
        raise UserError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N")
    if not count:
        raise UserError(f"device: got {name!r}, but torch {torch.__version__} finds no GPU; expected auto or cpu")
    index = int(os.environ.get("LOCAL_RANK", 0)) if match[1] is None else int(match[1])
    if index >= count:
        which = "process" if match[1] is None else "GPU"
        raise UserError(f"device: {which} {index} needs more than the {count} GPUs that torch finds")
    return torch.device("cuda", index)
