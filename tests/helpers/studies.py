"""Writes the files of a study with synthetic numbers, without training. Reports are drawn from it in tests."""

import json
import math
import random
from pathlib import Path

import torch
from safetensors.torch import load_file

from subquad.analysis.mixing_matrices import normalized_abs_rows, pack_pairs
from subquad.config import Recipe
from subquad.distill.recipe_stages import STAGE_NAMES
from subquad.study.results import write_results
from subquad.study.runs import Run, find_runs

BASE_KL = {
    "linear_attention": 1.2,
    "retnet": 1.0,
    "mamba2": 0.6,
    "gla": 0.55,
    "metala": 0.7,
    "deltanet": 0.75,
    "gated_deltanet": 0.4,
    "xlstm": 0.45,
    "softmax": 2.0,
}
TEACHER_LOSS, UNIGRAM_LOSS = 3.1, 6.9
STAGE_SETS = (("matrix", "hidden", "end_to_end"), ("hidden", "end_to_end"), ("end_to_end",))
LAYERS, HEADS = 6, 4
SHORT = ["stages.matrix.tokens=128", "stages.hidden.tokens=192", "stages.end_to_end.tokens=128"]
HIDDEN_ONLY = ["stages.matrix=null", "stages.end_to_end=null", "stages.hidden.tokens=128"]
TWO_LAST_STAGES = "stages.end_to_end=[{tokens: 128, lr: 1e-3, batch_size: 2}, {tokens: 192, lr: 1e-3, batch_size: 2}]"


def study_command(recipe: Path, output: Path, *overrides: str) -> list[str]:
    """The arguments of `subquad study`."""
    return ["study", str(recipe), "-o", str(output), *(part for text in overrides for part in ("--set", text))]


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(directory / "model.safetensors") for directory in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def synthetic_recipes(
    mixers=tuple(BASE_KL), stage_sets=STAGE_SETS, copy_qkv=(True, False), seeds=(0, 1, 2)
) -> list[Recipe]:
    stage = {"tokens": 16384, "lr": 1e-3}
    return [
        Recipe.model_validate(
            {
                "teacher": "nano",
                "data": {"source": "python-stdlib"},
                "student": {"mixer": mixer, "copy_qkv": copied and mixer != "softmax"},
                "stages": dict.fromkeys(stages, stage),
                "seed": seed,
            }
        )
        for mixer in mixers
        for stages in stage_sets
        for copied in (copy_qkv if mixer != "softmax" else copy_qkv[:1])
        for seed in seeds
    ]


def write_finished_run(run: Run) -> None:
    """Writes the files of a finished run, without weights."""
    mixer, stages = run.recipe.student.mixer, [s for s in STAGE_NAMES if getattr(run.recipe.stages, s)]
    generator = random.Random(f"{mixer} {stages} {run.recipe.student.copy_qkv} {run.recipe.seed}")
    kl = BASE_KL[mixer] * (1 + 0.35 * (3 - len(stages))) * (1 if run.recipe.student.copy_qkv else 1.6)
    kl *= 1 + generator.gauss(0, 0.03)
    loss = TEACHER_LOSS + kl
    result = {
        "mixer": mixer,
        "copy_qkv": run.recipe.student.copy_qkv,
        "seed": run.recipe.seed,
        "parameters": 3_600_000,
        "tokens": 16384 * len(stages),
        "perplexity": math.exp(loss),
        "teacher_perplexity": math.exp(TEACHER_LOSS),
        "unigram_perplexity": math.exp(UNIGRAM_LOSS),
        "perplexity_at_init": math.exp(loss + 0.6),
        "kl_at_init": kl + 0.6,
        "kl": kl,
        "top1_agreement": math.exp(-kl),
        "recovered_share": (UNIGRAM_LOSS - loss) / (UNIGRAM_LOSS - TEACHER_LOSS),
        "seconds": 60 * generator.uniform(0.8, 1.2),
        "decode_tokens_per_second": 200 * generator.uniform(0.7, 1.3) / (1 + BASE_KL[mixer]),
        "state_bytes": 150_000,
        "teacher_decode_tokens_per_second": 90.0,
        "teacher_state_bytes": 1_800_000,
        "sample": {"prompt": "def main(", "student": "argv=None):\n    `x` < 1", "teacher": "argv):\n    pass"},
    }
    run.directory.mkdir(parents=True, exist_ok=True)
    (run.directory / "recipe.yaml").write_text(run.recipe.to_yaml())
    layers = [{"mixer": "attention" if mixer == "softmax" else mixer}] * LAYERS
    (run.directory / "config.json").write_text(json.dumps({"layer_specs": layers}))
    head = {"versions": {"subquad": "0.1.0", "torch": "2"}, "commit": "0" * 40, "device": "cpu, 1 threads"}
    (run.directory / "result.json").write_text(json.dumps({"digest": run.recipe.digest(), **head, "result": result}))
    with (run.directory / "metrics.jsonl").open("w") as file:
        for stage in stages:
            for step in range(1, 33):
                training_loss = (1 + kl) * (0.4 + 0.6 * math.exp(-step / 10)) * (1 + generator.gauss(0, 0.02))
                line = {
                    "stage": stage,
                    "step": step,
                    "tokens": step * 512,
                    "loss": training_loss,
                    "tokens_per_second": 800.0,
                }
                file.write(json.dumps(line) + "\n")


def write_study(
    output: Path, recipes: list[Recipe], failed_index: int | None = None, evaluated: bool = True
) -> list[Run]:
    """Writes one run for each recipe below `output`, finished except for the one at `failed_index`."""
    runs = find_runs(recipes, output)
    for index, run in enumerate(runs):
        if index == failed_index:
            run.fail("UserError", "stage hidden, step 3: the loss is <not> finite", "Traceback\n  where & why")
        else:
            write_finished_run(run)
    if evaluated:
        write_evaluation(output, [run for run in runs if run.state == "finished"])
    write_results(output, runs)
    return runs


def write_evaluation(output: Path, runs: list[Run]) -> None:
    """Writes an evaluation of `runs`, a window and the teacher."""
    results = []
    for name, kl, is_student in [
        *((r.name, BASE_KL[r.recipe.student.mixer], True) for r in runs),
        ("nano, window 45 + 4 sinks", 0.15, False),
        ("nano", 0.0, False),
    ]:
        common = {"model": name, "teacher": "nano", "n": 100}
        for length in (512, 1024, 2048, 4096):
            cost = 0.004 + (0 if is_student else 2e-6 * length)
            cells = {
                "seconds_per_token": cost,
                "prefill_seconds": length * 1e-4 * (1 if is_student else 1 + length / 4096),
                "cache_bytes": 150_000 if is_student else 1728 * length,
                "peak_bytes": 1e6 + 2000.0 * length,
            }
            results += [{**common, "task": "cost", "metric": m, "value": v, "length": length} for m, v in cells.items()]
            perplexity = math.exp(3.2 + kl - 0.05 * math.log(length))
            results.append(
                {**common, "task": "text", "metric": "perplexity", "value": perplexity, "stderr": 0.1, "length": length}
            )
            for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
                acc = max(0.0, 1 - kl * length / 4096 * (1.2 - depth))
                results.append(
                    {**common, "task": "needle", "metric": "acc", "value": acc, "length": length, "depth": depth}
                )
        for layer in range(LAYERS if is_student else 0):
            for head in range(HEADS):
                value = 1 / (1 + kl + 0.1 * layer + 0.05 * head)
                position = {"layer": layer, "head": head, "task": "matrices"}
                results.append({**common, **position, "metric": "topk_mass_overlap", "value": value})
            results.append(
                {**common, "task": "states", "metric": "cka", "layer": layer, "value": 1 - 0.05 * kl * layer}
            )
    (output / "evaluation" / "matrices").mkdir(parents=True)
    for run in runs:
        student, teacher = (torch.rand(12, 12).tril() for _ in range(2))
        matrices = {
            "heads": pack_pairs(
                {(layer, 0): (normalized_abs_rows(student), normalized_abs_rows(teacher)) for layer in (0, LAYERS - 1)}
            )
        }
        (output / "evaluation" / "matrices" / f"{run.name}.json").write_text(json.dumps(matrices))
    (output / "evaluation" / "results.json").write_text(json.dumps({"versions": {}, "results": results}))
