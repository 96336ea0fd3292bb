"""Peak memory of a forward pass grows linearly with the length of the text, measured in new processes.

By default the C library keeps freed blocks of some megabytes, which alone changes the peaks of such small students by
half from run to run. MALLOC_MMAP_THRESHOLD_ makes it return them.
"""

import pytest

from tests.helpers.processes import run_python
from tests.helpers.students import MIXERS

SHORT, LONG = 32_768, 65_536

PEAK = """
import sys
sys.modules["fla"] = None
import torch
from transformers import AutoConfig, AutoModelForCausalLM
import subquad
from benchmarks.common import peak_rss

torch.set_num_threads(1)
family, mixer, how, T = *sys.argv[1:4], int(sys.argv[4])
sizes = dict(vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
sizes |= dict(num_key_value_heads=2, head_dim=16, pad_token_id=0, max_position_embeddings=T)
windows = {} if family == "llama" else {"sliding_window": 512}
config = AutoConfig.for_model(family, **sizes, **windows)
with torch.no_grad():
    teacher = AutoModelForCausalLM.from_config(config).eval()
    name, _, near = mixer.partition("+")
    spec = {"mixer": name, **({"window": [96, 512], "sinks": 4} if near else {})}
    student = subquad.linearize(teacher, layer_types={"default": spec}, scale_ids=torch.arange(3, 15)[None])
    ids = torch.randint(3, 61, (1, T))
    mask = torch.ones_like(ids)
    mask[:, : T // 4] = how != "padded"
    given = dict(use_cache=how == "cached", logits_to_keep=1, attention_mask=mask if how == "padded" else None)
    student(input_ids=ids[:, :512], **(given | {"attention_mask": None}))  # memory that only the first call allocates
    before = peak_rss()
    out = student(input_ids=ids, **given)
    assert out.logits.isfinite().all()
print(peak_rss() - before)
"""


def peak(family: str, mixer: str, how: str, T: int) -> int:
    """Bytes by which a forward pass of one row of T tokens raises the peak memory of a process."""
    environment = {"MALLOC_MMAP_THRESHOLD_": "131072"}
    return int(run_python("-c", PEAK, family, mixer, how, T, environment=environment).split()[-1])


CASES = [
    (family, mixer, how)
    for family, how in (("llama", "uncached"), ("llama", "padded"), ("mistral", "cached"))
    for mixer in MIXERS
]
WINDOWS = [
    pytest.param("gemma2", "gla", "padded", marks=pytest.mark.sample),
    ("gemma3_text", "xlstm", "uncached"),
    ("mistral", "gated_deltanet", "padded"),
    pytest.param("llama", "attention+window", "cached", marks=pytest.mark.sample),
    ("llama", "attention+window", "padded"),
    ("gpt_oss", "attention+window", "uncached"),
    ("llama", "gla+window", "uncached"),
    pytest.param("llama", "gla+window", "cached", marks=pytest.mark.sample),
    ("llama", "gated_deltanet+window", "padded"),
    ("gpt_oss", "xlstm+window", "cached"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mixer", "how"), [*CASES, *WINDOWS])
def test_peak_memory_is_linear_in_length(family, mixer, how):
    short, long = peak(family, mixer, how, SHORT), peak(family, mixer, how, LONG)
    at = ", ".join(f"{n / 2**20:.0f} MiB at {T:,}" for n, T in ((short, SHORT), (long, LONG)))
    print(f"{family} {mixer} {how}: {at}: {long / short:.2f}")
    assert long <= 2.2 * short
    assert short > 16 * 2**20  # a smaller peak would be noise
