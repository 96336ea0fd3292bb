"""`SubquadConfig`: the teacher's configuration, what its attention is, and what replaces it in each layer."""

import importlib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, ClassVar

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from subquad import mixers
from subquad.mixers import AttentionSpec
from subquad.modeling.layer_types import check_layer_type
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
    # how logits are computed from the head; `trl` reads them
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scaling",
    "output_multiplier",
)
"""Attributes that are read from `base_config`."""
REQUIRES = "the Python package subquad; `import subquad` before loading"
"""In config.json, for readers who meet the error of transformers about an unknown model type."""


class SubquadConfig(PreTrainedConfig):
    """A student's configuration.

    Args:
        base_config: the teacher's configuration, unchanged: a configuration object, or a dict with its `model_type`.
        layer_specs: the mixer or attention of each layer, `{"mixer": name, **options}`.
        attention_specs: the attention of the teacher in each layer, `{"path": name of its module, **AttentionSpec}`.
        max_learned_positions: length of the base model's table of learned positions; None where it has none.
        use_cache: whether `forward` makes a cache by default.
    """

    model_type = "subquad"
    auto_map: ClassVar[dict[str, str]] = {}
    """Of models with code in their directory; a student has none. `trl` reads it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "SubquadConfig":
        # Registers the model class, also where a configuration is unpickled. Importing transformers imports this module
        # (see `_auto_registration`) before that of the model can be imported.
        importlib.import_module("subquad.modeling.modeling_subquad")
        return super().__new__(cls)

    def __init__(
        self,
        base_config: dict[str, Any] | PreTrainedConfig | None = None,
        layer_specs: list[dict[str, Any]] | None = None,
        attention_specs: list[dict[str, Any]] | None = None,
        max_learned_positions: int | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ):
        if isinstance(base_config, dict):
            model_type = base_config.get("model_type")
            if model_type not in CONFIG_MAPPING:
                raise UserError(
                    f"base_config: unknown model_type {model_type!r} in transformers {transformers.__version__}"
                )
            base_config = AutoConfig.for_model(**base_config)
        self.base_config = base_config
        self.layer_specs = copy_specs("layer_specs", layer_specs)
        self.attention_specs = copy_specs("attention_specs", attention_specs)
        self.max_learned_positions = max_learned_positions
        self.use_cache = use_cache
        kwargs["requires"] = REQUIRES
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
            if getattr(self.base_config, name, None) is not None:
                kwargs.setdefault(name, getattr(self.base_config, name))
        super().__init__(**kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in DELEGATED and self.__dict__.get("base_config") is not None:
            try:
                return getattr(self.__dict__["base_config"].get_text_config(), name)
            except RuntimeError as error:  # Gemma 4: a size that differs between layers
                raise AttributeError(f"{type(self).__name__} has no {name} for all layers: {error}") from error
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def layers_with_attention(self) -> list[bool]:
        """For each layer, whether it is attention and no mixer."""
        return [spec["mixer"] in mixers.KEPT_ATTENTION for spec in self.layer_specs]

    def check(self) -> None:
        """Raises UserError if no student can be built from it: what is missing or unknown, and in which layer."""
        if not isinstance(self.base_config, PreTrainedConfig):
            raise UserError("base_config: missing; expected the configuration of the teacher")
        if len(self.layer_specs) != len(self.attention_specs):
            got, expected = len(self.layer_specs), len(self.attention_specs)
            raise UserError(f"layer_specs: got {got} layers, expected {expected}, as many as attention_specs")
        required = {f.name: f.default is MISSING for f in fields(AttentionSpec)} | {"path": True}
        for index, layer_spec in enumerate(self.layer_specs):
            check_layer_type(layer_spec, f"layer_specs: {index}")
            spec = self.attention_specs[index]
            problems = [f"missing {name}" for name in required if required[name] and name not in spec]
            problems += [f"unknown {name}" for name in spec if name not in required]
            if problems:
                raise UserError(f"attention_specs: {index}: {', '.join(problems)}; expected {', '.join(required)}")


def copy_specs(key: str, specs: Any) -> list[dict[str, Any]]:
    specs = [] if specs is None else specs
    if not isinstance(specs, list | tuple) or not all(isinstance(spec, Mapping) for spec in specs):
        raise UserError(f"{key}: got {specs!r}, expected a list of mappings, one per layer")
    return [dict(spec) for spec in specs]


AutoConfig.register("subquad", SubquadConfig)
