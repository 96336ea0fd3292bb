"""A quantized checkpoint (torchao int8, as saved by transformers) as the teacher on the command line."""

from common import *
from torchao.quantization import Int8WeightOnlyConfig
from transformers import TorchAoConfig

from subquad.cli import main

nano = Path(subquad.__file__).parent / "nano"
h = fresh("c11b-teacher")
AutoModelForCausalLM.from_pretrained(
    nano, dtype=torch.float32, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
).save_pretrained(h)
AutoTokenizer.from_pretrained(nano).save_pretrained(h)


def lin():
    rc = main(["linearize", str(h), "--mixer", "gla", "--output", str(fresh("c11b-student"))])
    assert rc == 0, f"exit {rc}"


attempt("subquad linearize QUANTIZED", lin)


def soft():
    rc = main(["linearize", str(h), "--mixer", "softmax", "--output", str(fresh("c11b-soft"))])
    assert rc == 0, f"exit {rc}"
    m = AutoModelForCausalLM.from_pretrained(OUT / "c11b-soft")
    return f"{ {type(p.data).__name__ for p in m.parameters()} }"


attempt("subquad linearize QUANTIZED --mixer softmax", soft)
attempt("subquad generate QUANTIZED", lambda: (lambda rc: None)(main(["generate", str(h), "def f(", "--tokens", "4"])))
