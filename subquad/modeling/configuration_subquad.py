"""A student's configuration: the teacher's, where its attention stood, and what stands there now."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from subquad import mixers
from subquad.mixers import AttentionSpec
from subquad.modeling.layer_types import layer_spec
from subquad.utils import UserError

DELEGATED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "initializer_range",
)


class SubquadConfig(PreTrainedConfig):
    """A student's configuration.

    base_config: the teacher's own, unchanged (a dict with its `model_type`, or a configuration object).
    layers: the plan, one entry a layer: `{"mixer": name, **options}`.
    attention: where attention stood, one entry a layer: `{"path": name of the module, **HeadLayout}`.
    positions: length of the base model's table of learned positions; None where it has none.
    """

    model_type = "subquad"

    def __init__(
        self,
        base_config: dict[str, Any] | PreTrainedConfig | None = None,
        layer_specs: list[dict[str, Any]] | None = None,
        attention_specs: list[dict[str, Any]] | None = None,
        max_learned_positions: int | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ):
        self.base_config = make_base_config(base_config) if isinstance(base_config, dict) else base_config
        self.layer_specs = copied("layer_specs", layer_specs)
        self.attention_specs = copied("attention_specs", attention_specs)
        self.max_learned_positions = max_learned_positions
        self.use_cache = use_cache
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
            if getattr(self.base_config, name, None) is not None:
                kwargs.setdefault(name, getattr(self.base_config, name))
        super().__init__(**kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in DELEGATED and self.__dict__.get("base_config") is not None:
            try:
                return getattr(self.__dict__["base_config"].get_text_config(), name)
            except RuntimeError as error:  # Gemma 4: a size that layers do not share
                raise AttributeError(f"{type(self).__name__} has no one {name}: {error}") from error
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def to_dict(self) -> dict[str, Any]:
        out = super().to_dict()
        if isinstance(self.base_config, PreTrainedConfig):
            out["base_config"] = self.base_config.to_dict()
        return out

    @property
    def keeps_attention(self) -> list[bool]:
        return [layer["mixer"] not in mixers.OPTIONS for layer in self.layer_specs]

    def check(self) -> None:
        """UserError where no student can be built from it: what is missing or unknown, and in which entry."""
        if not isinstance(self.base_config, PreTrainedConfig):
            raise UserError("base_config: missing; expected the configuration of the teacher")
        if len(self.layer_specs) != len(self.attention_specs):
            raise UserError(f"the plan names {len(self.layer_specs)} layers; the model has {len(self.attention_specs)}")
        wanted = {f.name: f.default is MISSING for f in fields(AttentionSpec)} | {"path": True}
        for index, (layer, place) in enumerate(zip(self.layer_specs, self.attention_specs, strict=True)):
            layer_spec(layer, f"layer_specs: {index}")
            missing = [name for name, needed in wanted.items() if needed and name not in place]
            unknown = [name for name in place if name not in wanted]
            if missing or unknown:
                wrong = f"missing {', '.join(missing)}" if missing else f"unknown {', '.join(unknown)}"
                raise UserError(f"attention_specs: layer {index}: {wrong}; expected {', '.join(wanted)}")


def make_base_config(values: dict[str, Any]) -> PreTrainedConfig:
    kind = values.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UserError(f"base_config: unknown model_type {kind!r} in transformers {transformers.__version__}")
    return AutoConfig.for_model(**values)


def copied(name: str, entries: Any) -> list[dict[str, Any]]:
    if not isinstance(entries or [], list | tuple) or not all(isinstance(entry, Mapping) for entry in entries or []):
        raise UserError(f"{name}: got {entries!r}, expected a list of mappings, one a layer")
    return [dict(entry) for entry in entries or []]
