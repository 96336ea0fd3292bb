"""Shared by the cases: tiny random teachers, students shaken from their start, a copy of nano as a directory."""

import os
import shutil
import sys
import warnings

sys.modules.setdefault("fla", None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch

torch.set_num_threads(1)
from pathlib import Path

import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

WORK = Path(__import__("tempfile").gettempdir()) / "subquad-cases"
OUT = WORK / "out"
OUT.mkdir(parents=True, exist_ok=True)
os.environ.setdefault("SUBQUAD_CACHE", str(WORK / "cache"))
TEXT = WORK / "text.txt"
TEXT.write_text("\n\n".join("It was the %d. morning, and nothing had changed in the house." % i for i in range(20000)))
import subquad

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
MIXERS = [
    "linear_attention",
    "retnet",
    "mamba2",
    "gla",
    "metala",
    "deltanet",
    "gated_deltanet",
    "xlstm",
    "kda",
    "hgrn2",
]


def tiny(family="llama", seed=0, **changes):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config)
    return model.eval()


def shaken(student, seed=1):
    """Every parameter off its neutral start, so that nothing is hidden by zeros."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in student.named_parameters():
            if ".mixer." in n:
                p.add_((torch.randn(p.shape, generator=g) * 0.1).to(p))
    return student


def student_of(mixer="gated_deltanet", family="llama", tied=False, layers=None, **changes):
    t = tiny(family, tie_word_embeddings=tied, **changes)
    s = subquad.linearize(t, layer_types=layers or {"default": mixer})
    return shaken(s).eval(), t


def nano_copy(name, generation=None, **config):
    import json

    home = OUT / name
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(Path(subquad.__file__).parent / "nano", home)
    if generation is not None:
        (home / "generation_config.json").write_text(json.dumps(generation))
    if config:
        c = json.loads((home / "config.json").read_text())
        c.update(config)
        (home / "config.json").write_text(json.dumps(c))
    return home


def fresh(name):
    p = OUT / name
    shutil.rmtree(p, ignore_errors=True)
    return p


def report(label, ok, detail=""):
    print(f"{'WORKS' if ok else 'FAILS'}  {label}  {detail}", flush=True)


def attempt(label, f):
    import traceback

    try:
        detail = f()
        report(label, True, "" if detail is None else detail)
        return True
    except Exception as e:
        tb = traceback.extract_tb(e.__traceback__)
        where = f"{tb[-1].filename.rsplit('/', 2)[-2]}/{tb[-1].filename.rsplit('/', 1)[-1]}:{tb[-1].lineno}"
        report(label, False, f"{type(e).__name__}: {str(e)[:600]} @ {where}")
        return False
