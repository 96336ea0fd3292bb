"""Start-up: what `import subquad` and the commands without models load, and transformers' Auto classes after it."""

import tomllib
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import subquad
from tests.helpers.processes import run_python
from tests.helpers.recipes import save_tiny_teacher

LOAD = "AutoModelForCausalLM.from_pretrained(student)"


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    directory = tmp_path_factory.mktemp("startup")
    teacher, tokenizer = subquad.load_teacher(save_tiny_teacher(directory / "teacher"))
    subquad.linearize(teacher, mixer="gla").save_pretrained(directory / "student")
    tokenizer.save_pretrained(directory / "student")
    return directory / "student"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text("teacher: nano\ndata: python-stdlib\nstudent: gla\nstages: {hidden: {tokens: 100, lr: 1e-3}}\n")
    return path


def run(program: str, *argv: object) -> str:
    return run_python("-c", program, *argv).strip()


def test_import_loads_neither_torch_nor_transformers():
    program = "import subquad, sys; print({'torch', 'transformers', 'pydantic', 'yaml'} & set(sys.modules))"
    assert run(program) == "set()"
    # imported where text is read
    program = "import subquad.data, sys; print({'datasets', 'pyarrow', 'pandas'} & set(sys.modules))"
    assert run(program) == "set()"


def test_plugin_of_vllm_loads_neither_torch_nor_its_model():
    """Each process of vLLM loads it, whether it serves a student or not."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    program = """
import importlib.util, pkgutil, sys, types
registry = types.SimpleNamespace(register_model=lambda *names: print(*names))
sys.modules["vllm"] = types.SimpleNamespace(ModelRegistry=registry)
pkgutil.resolve_name(sys.argv[1])()
print({"torch", "transformers", "subquad.serving.vllm_model"} & set(sys.modules))
print(importlib.util.find_spec("subquad.serving.vllm_model") is not None)
"""
    out = run(program, project["entry-points"]["vllm.general_plugins"]["subquad"])
    assert out.splitlines() == ["SubquadForCausalLM subquad.serving.vllm_model:SubquadForCausalLM", "set()", "True"]


IMPORTS = [
    "import subquad; from transformers import AutoModelForCausalLM",
    "from transformers import AutoModelForCausalLM; import subquad",
]
MORE_IMPORTS = [
    "import subquad, transformers; AutoModelForCausalLM = transformers.AutoModelForCausalLM",
    "import transformers, subquad; AutoModelForCausalLM = transformers.AutoModelForCausalLM",
    "import transformers.models.auto; import subquad; from transformers import AutoModelForCausalLM",
    "from transformers import AutoConfig; import subquad; from transformers import AutoModelForCausalLM",
    "import subquad; from transformers import AutoTokenizer, AutoConfig, pipeline, AutoModelForCausalLM",
    "import subquad; from transformers.models.auto.modeling_auto import AutoModelForCausalLM",
    "import subquad; from transformers import Trainer, AutoModelForCausalLM",
    "import subquad.modeling.configuration_subquad; from transformers import AutoModelForCausalLM",
    "from subquad import SubquadConfig; from transformers import AutoModelForCausalLM",
    "import subquad.cli; from transformers import AutoModelForCausalLM",
    "import subquad, importlib; importlib.reload(subquad); from transformers import AutoModelForCausalLM",
    "import subquad; from transformers import AutoModelForCausalLM; import importlib; importlib.reload(subquad)",
    "import subquad; [sys.modules.pop(name) for name in list(sys.modules) if name.startswith('subquad')]; "
    "import subquad; from transformers import AutoModelForCausalLM",
    "import subquad, importlib.util; importlib.util.find_spec('transformers.models.auto.configuration_auto'); "
    "from transformers import AutoModelForCausalLM",
]


@pytest.mark.parametrize("imports", IMPORTS + [pytest.param(each, marks=pytest.mark.slow) for each in MORE_IMPORTS])
def test_auto_model_loads_students(student, imports):
    program = f"import sys\nstudent = sys.argv[1]\n{imports}\nprint(type({LOAD}).__name__)"
    assert run(program, student) == "SubquadForCausalLM"


def test_auto_classes_in_one_process(student):
    program = """
import sys, subquad
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline
student = sys.argv[1]
config = AutoConfig.from_pretrained(student)
tokenizer = AutoTokenizer.from_pretrained(student)
print(config.model_type, type(config) is subquad.SubquadConfig, len(tokenizer("The red fox").input_ids))
print(type(AutoModelForCausalLM.from_config(config)) is subquad.SubquadForCausalLM)
print(pipeline("text-generation", model=student)("The red", max_new_tokens=3)[0]["generated_text"][:7])
print([type(finder).__module__ for finder in sys.meta_path if "subquad" in type(finder).__module__])
import inspect, transformers.models.auto.configuration_auto as table
print(table.__spec__.loader is table.__loader__, "class AutoConfig" in inspect.getsource(table))
"""
    tokens = len(AutoTokenizer.from_pretrained(student)("The red fox").input_ids)
    lines = [f"subquad True {tokens}", "True", "The red", "[]", "True True"]
    assert run(program, student).splitlines() == lines


@pytest.mark.slow
def test_imports_in_two_threads(student):
    program = f"""
import sys, threading
student = sys.argv[1]
barrier = threading.Barrier(2)
def load(name):
    barrier.wait()
    __import__(name)
names = "subquad.modeling.modeling_subquad", "transformers.pipelines"
threads = [threading.Thread(target=load, args=[name]) for name in names]
[thread.start() for thread in threads], [thread.join() for thread in threads]
from transformers import AutoModelForCausalLM
print(type({LOAD}).__name__)
"""
    assert run(program, student) == "SubquadForCausalLM"


@pytest.mark.slow
def test_config_and_model_in_a_spawned_process(student, tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text("""
import multiprocessing, sys
import subquad

def rebuild(config, queue):
    from transformers import AutoModelForCausalLM
    queue.put(type(AutoModelForCausalLM.from_config(config)).__name__)

if __name__ == "__main__":
    from transformers import AutoConfig
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=rebuild, args=[AutoConfig.from_pretrained(sys.argv[1]), queue])
    process.start()
    print(queue.get(timeout=60))
    process.join()
""")
    assert run_python(script, student) == "SubquadForCausalLM\n"


def test_public_names():
    program = """
import subquad
print(sorted(name for name in dir(subquad) if name in subquad.__all__) == sorted(subquad.__all__))
print([name for name in subquad.__all__ if getattr(subquad, name).__name__.rpartition(".")[2] != name])
print(hasattr(subquad, "nothing"), subquad.ops.chunk.__name__)
"""
    assert run(program).splitlines() == ["True", "[]", "False chunk"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["distill", "--help"],
        ["mixers"],
        ["recipe", "RECIPE"],
        ["recipe", "--schema"],
        ["distill", "RECIPE", "-o", "never", "--set", "sed=1"],
        ["distill", "RECIPE", "-o", "never", "--set", "seed=x"],
        ["distill", "RECIPE", "-o", "never", "--set", "student.mixer=glaa"],
        ["distill", "RECIPE", "-o", "never", "--set", "student.mixer_kwargs.half_live=3"],
        ["distill", "RECIPE", "-o", "never", "--set", "student.layer_types={default: glaa}"],
        ["distill", "RECIPE", "-o", "never", "--set", "student.export_target=qwen3_5"],
        ["study", "RECIPE", "-o", "never", "--set", "student.mixer=[gla, glaa]"],
        ["linearize", "nano", "--mixer", "glaa", "-o", "never"],
    ],
    ids=lambda argv: " ".join(argv[:1] + argv[-1:]),
)
def test_light_commands_load_no_torch(argv, recipe):
    program = "import sys; from subquad.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    program += "print('loaded', {'torch', 'transformers', 'numpy'} & set(sys.modules))"
    out = run(program, *(recipe if word == "RECIPE" else word for word in argv))
    assert out.splitlines()[-1] == "loaded set()"


def test_help_loads_the_standard_library_alone():
    program = "import sys; before = set(sys.modules); from subquad.cli import main\ntry: main(['--help'])\n"
    program += "except SystemExit: pass\nnew = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
    program += "print('others', new - sys.stdlib_module_names - {'subquad'})"
    assert run(program).splitlines()[-1] == "others set()"
