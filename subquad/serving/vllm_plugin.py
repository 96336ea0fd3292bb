"""The entry point by which vLLM finds students (group `vllm.general_plugins`): each of its processes calls `register`.

Imports neither torch nor vLLM.
"""

import subquad as subquad  # registers "subquad" with the Auto classes of transformers

MODEL = "subquad.serving.vllm_model:SubquadForCausalLM"


def register() -> None:
    """Tells vLLM the class that runs students; it is imported when a student is loaded."""
    from vllm import ModelRegistry

    ModelRegistry.register_model("SubquadForCausalLM", MODEL)
