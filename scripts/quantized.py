"""Measures the perplexity, and with --recall the recall, of a student and of its teacher with quantized weights.

    python -m scripts.quantized STUDENT TEACHER --text text.txt --output results/export/quantized.csv

STUDENT was made with `export_target: qwen3_5`; TEACHER is a Llama. GGUF's types are those of `subquad export --type`.
Each matrix is quantized as in the file and computed in float32, so the errors are those of the weights alone. int8 and
int4 are torchao's, weights only, of all linear layers but gates and the head. Norms, decays, gates and states are in
float32. Recall is the share of right answers in the tasks `RECALL` (docs/analysis.md), and their log-likelihood, in
contexts of 512 tokens of the end of the text.
"""

import argparse
import copy
import csv
import statistics
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import nn
from transformers import PreTrainedModel

from subquad import load_teacher
from subquad.analysis.recall import recall_results
from subquad.export import convert
from subquad.export.gguf import TYPES, quantized
from subquad.modeling.modeling_subquad import SubquadForCausalLM

ARCHITECTURES = {"qwen3_5_text": gguf.MODEL_ARCH.QWEN35, "llama": gguf.MODEL_ARCH.LLAMA}
RECALL = ("needle_word", "assoc_text")
ITEMS, LENGTH = 4, 512
GATES = ("in_proj_a", "in_proj_b")


@torch.no_grad()
def as_gguf(model: PreTrainedModel, weight_type: str) -> tuple[PreTrainedModel, int]:
    """A copy with the weights of a GGUF file, and their bytes."""
    model, size = copy.deepcopy(model), 0
    config: Any = model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key != "lm_head.weight" or not config.tie_word_embeddings:
            name = names.get_name(key.replace("dt_bias", "dt_proj.bias"), (".weight", ".bias"))
            values, dtype = quantized(name, tensor.float().numpy(), TYPES[weight_type][0])
            tensor.copy_(torch.from_numpy(gguf.quants.dequantize(values, dtype).reshape(tensor.shape)))
            size += values.nbytes
    return model, size


def with_torchao(model: PreTrainedModel, bits: int) -> tuple[PreTrainedModel, int]:
    """A copy with integer weights in linear layers: int8 with a scale per row, int4 with one per 32 numbers."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model = copy.deepcopy(model)
    config = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, PerGroup(32))

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not name.endswith((*GATES, "lm_head"))

    sizes = {name: m.weight.numel() for name, m in model.named_modules() if chosen(m, name)}
    quantize_(model, config, filter_fn=chosen)
    others = sum(p.numel() for p in model.parameters()) - sum(sizes.values())
    scales = sum(
        m.weight.shape[0] if bits == 8 else m.weight.numel() // 32 for n, m in model.named_modules() if n in sizes
    )
    return model, round(sum(sizes.values()) * bits / 8 + 4 * (others + scales))


@torch.no_grad()
def perplexity(model: PreTrainedModel, rows: torch.Tensor) -> float:
    losses = [model(input_ids=row[None], labels=row[None], use_cache=False).loss for row in rows]
    return float(torch.stack(losses).mean().exp())


def recall(model: PreTrainedModel, tokenizer: Any, haystack: torch.Tensor) -> list[str]:
    found = recall_results(model, tokenizer, haystack, RECALL, (LENGTH,), items=ITEMS)
    overall = [result for result in found if result.depth is None]
    means = {m: statistics.fmean(r.value for r in overall if r.metric == m) for m in ("acc", "loglikelihood")}
    return [f"{means['acc']:.0%}", f"{means['loglikelihood']:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16, help="of 512 tokens")
    parser.add_argument("--recall", action="store_true", help="measure it too; the text must be long")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    teacher, tokenizer = load_teacher(args.teacher)
    student, _ = load_teacher(args.student)
    assert isinstance(student, SubquadForCausalLM)
    text = args.text.read_text(encoding="utf-8")
    haystack = tokenizer(text[-(2**18) :], return_tensors="pt").input_ids[0]
    ids = tokenizer(text[: args.rows * 512 * 8], return_tensors="pt").input_ids[0]
    rows = ids[: args.rows * 512].unflatten(0, (args.rows, 512))
    with args.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = ["MB", "perplexity", *(["recall", "log-likelihood of recall"] if args.recall else [])]
        writer.writerow(["weights", *(f"{model}, {name}" for model in ("student", "teacher") for name in columns)])
        models = [convert(student.float(), "qwen3_5"), teacher.float()]
        for name in (*TYPES, "int8", "int4"):
            cells = [name]
            for model in models:
                changed, size = with_torchao(model, int(name[3:])) if name.startswith("int") else as_gguf(model, name)
                cells += [f"{size / 1e6:.0f}", f"{perplexity(changed, rows):.2f}"]
                cells += recall(changed, tokenizer, haystack) if args.recall else []
            writer.writerow(cells)
            print(*cells, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
