"""Runs of a recipe on a CUDA device: all stages, both precisions, resumption, and the loss of stage 3."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import masking_utils

from subquad.cli import main
from subquad.config import EndToEndStage, load_recipe
from subquad.distill import trainer
from subquad.distill.distillation_loss import distillation_loss
from subquad.distill.lm_head import Head
from subquad.distill.logging_callbacks import read_jsonl
from subquad.distill.pipeline import distill
from subquad.utils import UserError
from tests.helpers.recipes import tiny_recipe

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("own_cache"),
]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mixer", ["gla", "gated_deltanet", "xlstm", "mamba2"])
def test_all_stages(mixer, precision, tmp_path):
    student = {"mixer": mixer, "calibration_tokens": 128}
    path = tiny_recipe(tmp_path, student=student, precision=precision)
    result = distill(load_recipe(path), tmp_path / "out")
    assert result["perplexity"] < result["perplexity_at_init"]
    records = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert {record["stage"] for record in records} == {"matrix", "hidden", "end_to_end"}


def test_the_cpu_has_the_same_losses(tmp_path, monkeypatch):
    """The first loss of each stage, where rounding has not yet parted the two runs."""
    monkeypatch.setenv("SUBQUAD_BACKEND", "torch")
    path = tiny_recipe(tmp_path)
    on_gpu = distill(load_recipe(path), tmp_path / "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = distill(load_recipe(path), tmp_path / "cpu")
    assert on_gpu["perplexity_at_init"] == pytest.approx(on_cpu["perplexity_at_init"], rel=1e-3)
    assert on_gpu["perplexity"] == pytest.approx(on_cpu["perplexity"], rel=2e-2)


@pytest.mark.parametrize(
    "student", [{"mixer": "gla"}, {"mixer": "attention", "mixer_kwargs": {"window": 8}}], ids=lambda s: s["mixer"]
)
def test_steps_of_training_do_not_synchronize(student, tmp_path, monkeypatch):
    """From the second step of each stage on, in which kernels are compiled and tensors made that are kept;
    `transformers` reads the teacher's positions once a batch."""
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
    checked = []

    class WithoutWaiting(trainer.StageTrainer):
        def run(self, function, *args):
            torch.cuda.set_sync_debug_mode("error" if self.state.global_step else "default")
            try:
                return function(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                checked.append(self.objective.name)

        def get_batch_samples(self, *args):
            return self.run(super().get_batch_samples, *args)

        def training_step(self, *args):
            return self.run(super().training_step, *args)

        def clip_grad_norm_(self, *args):
            norm = self.run(super().clip_grad_norm_, *args)
            step = self.optimizer.step
            self.optimizer.step = lambda *args: self.run(step, *args)
            return norm

    monkeypatch.setattr("subquad.distill.pipeline.StageTrainer", WithoutWaiting)
    path = tiny_recipe(tmp_path, student=student)
    distill(load_recipe(path, ["data.document_masking=false"]), tmp_path / "out")
    assert set(checked) == {"matrix", "hidden", "end_to_end"}


@pytest.mark.parametrize("stage", ["matrix", "hidden", "end_to_end"])
def test_a_loss_that_is_not_finite_names_step_and_layer(stage, tmp_path):
    wild = {
        "tokens": 2048,
        "lr": 1e30,
        "batch_size": 4,
        "lr_scheduler": "constant",
        "warmup": 0.0,
        "max_grad_norm": 1e30,
    }
    path = tiny_recipe(tmp_path, stages={stage: wild})
    with pytest.raises(UserError, match=rf"stage {stage}, step [234]: .*layer"):
        distill(load_recipe(path), tmp_path / "out")


def test_a_resumed_run_has_the_same_weights(tmp_path, monkeypatch):
    path = tiny_recipe(tmp_path)
    distill(load_recipe(path), tmp_path / "whole")
    original, saves = trainer.StageTrainer._save_checkpoint, []

    def stop_after_second(self, *args, **kwargs):
        original(self, *args, **kwargs)
        saves.append(None)
        if len(saves) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.StageTrainer, "_save_checkpoint", stop_after_second)
        with pytest.raises(KeyboardInterrupt):
            distill(load_recipe(path), tmp_path / "resumed")
    distill(load_recipe(path), tmp_path / "resumed")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.allclose(whole[name], resumed[name], rtol=1e-3, atol=1e-4) for name in whole)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_loss_of_hidden_states_equals_that_of_logits(divergence):
    generator = torch.Generator().manual_seed(0)
    h, H = (torch.randn(70, 24, generator=generator).cuda() for _ in range(2))
    W, U = (torch.randn(97, 24, generator=generator).cuda() for _ in range(2))
    labels = torch.randint(97, (70,), generator=generator).cuda()
    labels[::9] = -100
    stage = EndToEndStage(tokens=1, lr=1.0, divergence=divergence)
    h.requires_grad_(), W.requires_grad_()
    fused = distillation_loss(h, H, labels, Head(W), Head(U), stage, chunk=32)[0]
    plain = distillation_loss(h @ W.T, H @ U.T, labels, None, None, stage)[0]
    assert float(fused) == pytest.approx(float(plain), rel=1e-4)
    expected = torch.autograd.grad(plain, (h, W))
    found = torch.autograd.grad(fused, (h, W))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_commands_on_a_run(tmp_path, capsys):
    path = tiny_recipe(tmp_path)
    output = tmp_path / "student"
    assert main(["distill", str(path), "--output", str(output)]) == 0
    assert json.loads((output / "result.json").read_text())["device"] == torch.cuda.get_device_name()
    text = str(tmp_path / "text.txt")
    assert main(["eval", str(output), "--suite", "language", "--corpus", text, "--limit", "4"]) == 0
    assert main(["generate", str(output), "The red fox"]) == 0
