"""Subquad turns pretrained Transformers into subquadratic language models.

    student = subquad.linearize(teacher, mixer="gla")

Importing the package registers its model class, so that `AutoModelForCausalLM.from_pretrained` loads students.
"""

from subquad.utils import quiet_imports

with quiet_imports():
    from subquad.modeling.linearize import linearize
    from subquad.modeling.modeling_subquad import SubquadConfig, SubquadForCausalLM
    from subquad.modeling.teachers import load_teacher

__version__ = "0.1.0"
__all__ = ["SubquadConfig", "SubquadForCausalLM", "linearize", "load_teacher"]
