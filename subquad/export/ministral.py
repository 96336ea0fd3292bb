"""Converts a student that keeps attention in all layers, with windows, to Ministral (`MinistralForCausalLM`).

Ministral has Llama's layers, some or all with one sliding window. No server sees sinks, the first tokens, beside a
window. vLLM looks up the class `LlamaForCausalLM`, which reads the same configuration; mlx-lm reads it as a `llama` if
some layer sees all tokens.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from subquad.export.converter import Converter
from subquad.mixers import AttentionSpec
from subquad.modeling.export_target import MINISTRAL, ExportError
from subquad.modeling.layers import AttentionLayer
from subquad.modeling.modeling_subquad import SubquadForCausalLM

SLIDING, FULL = "sliding_attention", "full_attention"


class MinistralConverter(Converter):
    target = MINISTRAL
    class_names = ("MinistralConfig", "MinistralForCausalLM")
    windows: list[int | None]
    """Of each layer."""

    def check(self, student: SubquadForCausalLM) -> None:
        super().check(student)
        self.windows = [layer_window(i, layer) for i, layer in enumerate(student.mixer_layers)]
        if len(self.sizes) > 1:
            sizes = ", ".join(map(str, self.sizes))
            raise ExportError(f"its layers have windows of {sizes} tokens, expected one size")

    @property
    def sizes(self) -> list[int]:
        return sorted({window for window in self.windows if window is not None})

    def config(
        self, common: dict[str, Any], spec: AttentionSpec | None, conv_width: int, attention_layers: list[int]
    ) -> dict[str, Any]:
        if common["rope_parameters"]["partial_rotary_factor"] != 1:
            raise ExportError("its attention rotates some of the channels of a head, expected all")
        return {
            **common,
            "sliding_window": (self.sizes or [common["max_position_embeddings"]])[0],  # transformers needs a number
            "layer_types": [FULL if window is None else SLIDING for window in self.windows],
        }

    def save(self, model: PreTrainedModel, directory: Path) -> None:
        model.save_pretrained(directory)
        change_config(directory, architectures=["LlamaForCausalLM"])


class MLXConverter(MinistralConverter):
    """For mlx-lm, whose `llama` takes some layers with a window, but not all."""

    def config(self, *args: Any) -> dict[str, Any]:
        if None not in self.windows:
            raise ExportError("all its layers have windows; MLX expects a layer that sees all tokens")
        return super().config(*args)

    def save(self, model: PreTrainedModel, directory: Path) -> None:
        super().save(model, directory)
        rope = dict(model.config.rope_parameters)  # type: ignore[arg-type]
        old = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if rope["rope_type"] != "default" else None}
        change_config(directory, model_type="llama", **old)


def layer_window(index: int, layer: Any) -> int | None:
    """Tokens that each head of the layer sees, the query included; None: all."""
    assert isinstance(layer, AttentionLayer)
    windows = {group.window for group in layer.head_groups}
    if len(windows) > 1:
        raise ExportError(f"layer {index}: its heads have different windows")
    return windows.pop()


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2), encoding="utf-8")
