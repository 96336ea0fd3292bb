"""Training of a stage: batches, processes, precision, parameter groups, LoRA, EMA, validation, non-finite losses."""

import contextlib
import json
import math
import types

import pytest
import torch
from safetensors.torch import load_file

import subquad
from subquad.config import HiddenStage, load_recipe
from subquad.distill import trainer, untied_head
from subquad.distill.end_to_end import EndToEndDistillation
from subquad.distill.hidden_alignment import HiddenAlignment
from subquad.distill.pipeline import distill
from subquad.distill.recipe_stages import STAGE_NAMES
from subquad.distill.training_arguments import rows_per_process
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.utils import UserError
from tests.helpers.recipes import save_tiny_teacher, tiny_recipe

pytestmark = pytest.mark.usefixtures("own_cache")
SIZES = {"tokens": 512, "lr": 1e-3, "batch_size": 4}


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("run"), stages={name: dict(SIZES) for name in STAGE_NAMES})


def only(stage, *more):
    """Overrides that remove all other stages, and further ones for this stage."""
    others = [name for name in STAGE_NAMES if name != stage]
    return [f"stages.{name}=null" for name in others] + [f"stages.{stage}.{text}" for text in more]


def train(recipe_path, output, *overrides):
    distill(load_recipe(recipe_path, overrides), output)
    return load_file(output / "model.safetensors")


def train_until_step_4(monkeypatch, *args):
    """`train`, interrupted after step 4."""
    end_of_step = trainer.MetricsCallback.on_step_end

    def stop(self, args, state, control, **kwargs):
        end_of_step(self, args, state, control, **kwargs)
        if state.global_step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.MetricsCallback, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            train(*args)


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_close(a, b, tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=1e-4, msg=name)


def changed(a, b):
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.fixture(scope="module")
def fresh(recipe_path, own_cache):
    """The weights of an untrained student."""
    teacher, _ = subquad.load_teacher(load_recipe(recipe_path).teacher)
    return subquad.linearize(teacher, "gla").state_dict()


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_micro_batches_have_no_effect(stage, recipe_path, tmp_path):
    expected = train(recipe_path, tmp_path / "whole", *only(stage))
    assert_close(expected, train(recipe_path, tmp_path / "micro", *only(stage, "micro_batch_size=1")), 2e-5)


def test_batch_size_must_be_a_multiple_of_the_processes():
    stage = hidden_stage(batch_size=4)
    assert rows_per_process(stage, 2) == (2, 2)
    with pytest.raises(UserError, match="batch_size: got 4"):
        rows_per_process(stage, 3)
    assert rows_per_process(hidden_stage(batch_size=8, micro_batch_size=2), 2) == (4, 2)


def hidden_stage(**values):
    return HiddenStage(tokens=1, lr=1.0, **values)


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_bfloat16_is_close_and_weights_stay_float32(stage, recipe_path, tmp_path):
    expected = train(recipe_path, tmp_path / "float32", *only(stage))
    found = train(recipe_path, tmp_path / "bfloat16", "precision=bfloat16", *only(stage))
    assert all(w.dtype == torch.float32 for w in found.values())
    assert changed(expected, found)
    last = metrics(tmp_path / "float32")[-1]["loss"], metrics(tmp_path / "bfloat16")[-1]["loss"]
    assert math.isclose(*last, rel_tol=0.05)


def test_param_groups_freeze_parts_and_set_their_lr(recipe_path, tmp_path, fresh):
    frozen = [f"param_groups.{name}.frozen=true" for name in ("backbone", "embeddings", "attention_projections")]
    trained = train(recipe_path, tmp_path / "out", *only("end_to_end", *frozen))
    names = changed(trained, {k: v for k, v in fresh.items() if k in trained})
    assert names
    assert all(".mixer." in name and not any(f".{p}_proj" in name for p in "qkvo") for name in names)
    slow = train(recipe_path, tmp_path / "slow", *only("end_to_end", "param_groups.attention_projections.lr=1e-9"))
    q = next(name for name in slow if name.endswith("mixer.q_proj.weight"))
    assert 0 < (slow[q] - fresh[q]).abs().max() < 1e-7
    everything = [f"param_groups.{name}.frozen=true" for name in ("mixer", "attention_projections")]
    with pytest.raises(UserError, match="param_groups"):
        train(recipe_path, tmp_path / "nothing", *only("hidden", *everything))


@pytest.fixture(scope="module")
def tied_teacher(tmp_path_factory):
    return save_tiny_teacher(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.mark.parametrize("frozen", ["head", "embeddings"])
def test_head_is_untied_for_a_stage(frozen, tied_teacher, recipe_path, tmp_path):
    """With a frozen head only the rows of tokens in the text change, with frozen embeddings none. Then it is tied."""
    groups = {"head": {"frozen": frozen == "head"}, "embeddings": {"frozen": frozen == "embeddings"}}
    options = ["untie_head=true", f"param_groups={json.dumps(groups)}"]
    trained = train(recipe_path, tmp_path / "out", f"teacher={tied_teacher}", *only("end_to_end", *options))
    assert "base.lm_head.weight" not in trained
    initial = load_file(tied_teacher / "model.safetensors")["model.embed_tokens.weight"]
    rows = (trained["base.model.embed_tokens.weight"] != initial).any(1)
    assert not rows.any() if frozen == "embeddings" else 0 < rows.sum() < len(rows) / 2
    student = SubquadForCausalLM.from_pretrained(tmp_path / "out")
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


def test_untied_head_is_trained_and_resumed(tied_teacher, recipe_path, tmp_path, monkeypatch):
    ends, tie = [], untied_head.UntiedHead.tie

    def record(self):
        ends.append([module.weight.detach().clone() for module in (self.embeddings, self.head)])
        tie(self)

    monkeypatch.setattr(untied_head.UntiedHead, "tie", record)
    overrides = [f"teacher={tied_teacher}", *only("end_to_end", "untie_head=true")]
    whole = train(recipe_path, tmp_path / "whole", *overrides)
    train_until_step_4(monkeypatch, recipe_path, tmp_path / "cut", *overrides)
    assert not changed(whole, train(recipe_path, tmp_path / "cut", *overrides))
    (embeddings, head), again = ends
    assert (embeddings != head).any(1).all()
    assert torch.equal(embeddings, whole["base.model.embed_tokens.weight"])
    assert torch.equal(embeddings, again[0])
    assert torch.equal(head, again[1])
    assert changed(whole, train(recipe_path, tmp_path / "tied", *overrides[:1], *only("end_to_end")))


def test_untie_head_has_no_effect_where_the_head_is_not_tied(recipe_path, tmp_path):
    plain = train(recipe_path, tmp_path / "plain", *only("end_to_end"))
    assert not changed(plain, train(recipe_path, tmp_path / "untied", *only("end_to_end", "untie_head=true")))


def test_lora_is_merged(recipe_path, tmp_path, fresh):
    trained = train(recipe_path, tmp_path / "out", *only("hidden", "lora={rank: 2, alpha: 4}"))
    assert trained.keys() <= fresh.keys()
    for name in trained:
        update = trained[name] - fresh[name]
        if any(name.endswith(f"{p}_proj.weight") for p in "qkvo"):
            assert 0 < torch.linalg.matrix_rank(update.double(), atol=1e-6) <= 2, name


def test_ema_replaces_the_weights_and_is_resumed(recipe_path, tmp_path, monkeypatch):
    plain = train(recipe_path, tmp_path / "plain", *only("hidden"))
    averaged = train(recipe_path, tmp_path / "averaged", *only("hidden", "ema_decay=0.5"))
    assert changed(plain, averaged)
    train_until_step_4(monkeypatch, recipe_path, tmp_path / "cut", *only("hidden", "ema_decay=0.5"))
    again = train(recipe_path, tmp_path / "cut", *only("hidden", "ema_decay=0.5"))
    assert not changed(averaged, again)


def test_best_model_is_loaded_at_the_end(recipe_path, tmp_path):
    """At a rate that ruins the student, the last weights are not the best."""
    wild = ["lr=0.3", "lr_scheduler=constant", "warmup=0.0", "max_grad_norm=1e6"]
    sets = ["evaluation.eval_steps=1", "checkpoint.save_steps=1", "checkpoint.save_total_limit=9"]
    best = train(
        recipe_path, tmp_path / "best", *only("hidden", *wild), *sets, "evaluation.load_best_model_at_end=true"
    )
    last = train(recipe_path, tmp_path / "last", *only("hidden", *wild), *sets)
    losses = {m["step"]: m["validation_loss"] for m in metrics(tmp_path / "last") if "validation_loss" in m}
    assert len(losses) == 4
    assert min(losses, key=losses.get) != 4
    assert changed(best, last)
    assert (tmp_path / "best" / "loss.svg").read_text().startswith("<?xml")
    card = (tmp_path / "best" / "README.md").read_text()
    assert "Training tokens by stage: hidden " in card
    assert "Nothing is trained" not in card


def check_late(monkeypatch):
    """Losses and gradients are checked as on a device that the host does not wait for."""
    create = trainer.StageTrainer.create_optimizer

    def create_optimizer(self, *args):
        optimizer = create(self, *args)
        self.late_checks = self.late_checks or trainer.LateChecks(optimizer)
        return optimizer

    monkeypatch.setattr(trainer.StageTrainer, "create_optimizer", create_optimizer)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_non_finite_loss_stops_the_run_and_names_the_layer(stage, late, recipe_path, tmp_path, monkeypatch):
    if late:
        check_late(monkeypatch)
    wild = ["lr=1e30", "lr_scheduler=constant", "warmup=0.0", "max_grad_norm=1e30"]
    with pytest.raises(UserError, match=rf"stage {stage}, step [234]: ") as caught:
        train(recipe_path, tmp_path / "out", *only(stage, *wild), "checkpoint.save_steps=1")
    assert "layer" in str(caught.value)
    assert (tmp_path / "out" / "checkpoints" / stage / "checkpoint-1" / "model.safetensors").exists()


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_late_checks_keep_the_weights_from_before_the_step_that_is_not_finite(part, recipe_path, tmp_path, monkeypatch):
    """NaN in step 3, read in step 4, as losses are logged in every second step."""
    check_late(monkeypatch)
    trainers, weights, layer_loss = [], {}, HiddenAlignment.layer_loss

    class BadInStep3(trainer.StageTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

        def training_step(self, *args, **kwargs):
            step = self.state.global_step
            weights.setdefault(step, {n: p.detach().clone() for n, p in self.student.named_parameters()})
            return super().training_step(*args, **kwargs)

    def bad_in_step_3(self, student, index, *args):
        loss = layer_loss(self, student, index, *args)
        if trainers[0].state.global_step != 2 or index != 1:
            return loss
        zero = torch.zeros((), requires_grad=True)
        root = (student.mixer_layers[index].mixer.o_proj.weight.sum() * zero).clamp_min(0).sqrt()  # 0, and 0 / 0 behind
        return loss * torch.nan if part == "loss" else loss + root

    monkeypatch.setattr(HiddenAlignment, "layer_loss", bad_in_step_3)
    monkeypatch.setattr("subquad.distill.pipeline.StageTrainer", BadInStep3)
    place = "starting at layer 1" if part == "loss" else r"in \S*layers.1\S*o_proj.weight;"
    with pytest.raises(UserError, match=rf"stage hidden, step 3: .*{place}"):
        train(recipe_path, tmp_path / "out", *only("hidden", "tokens=5120"), "checkpoint.save_steps=100")
    assert list(weights) == [0, 1, 2, 3]
    assert all(torch.equal(p, weights[2][n]) for n, p in trainers[0].student.named_parameters())
    assert any((weights[1][n] != weights[2][n]).any() for n in weights[2])


@pytest.mark.parametrize(
    ("ignored", "ce", "expected"),
    [(0, 2.0, 2.0), (0, math.nan, math.nan), (8, math.nan, 0.0)],
    ids=["finite", "diverged", "no labels"],
)
def test_validation_cross_entropy_hides_no_nan(ignored, ce, expected):
    """A batch without labels, whose mean is NaN, adds nothing; a student with NaN logits does."""
    ids = torch.zeros(1, 8, dtype=torch.long)
    labels = ids.clone()
    labels[:, :ignored] = -100
    stub = types.SimpleNamespace(
        _prepare_inputs=lambda batch: batch,
        objective_loss=lambda model, batch: torch.tensor(0.0),
        objective=types.SimpleNamespace(training_batch=lambda batch: batch),
        autocast=contextlib.nullcontext,
        validation_ce=torch.zeros(2, dtype=torch.float64),
    )
    outputs = types.SimpleNamespace(loss=torch.tensor(ce))
    trainer.StageTrainer.prediction_step(stub, lambda **_: outputs, {"input_ids": ids, "labels": labels}, True)
    total, count = stub.validation_ce.tolist()
    assert count == (0 if ignored else 7)
    assert total == pytest.approx(expected * max(count, 1), nan_ok=True)


def test_a_student_with_nan_logits_is_no_result(recipe_path, tmp_path, monkeypatch):
    def diverged(*_args):
        return {"loss": math.nan}

    monkeypatch.setattr("subquad.distill.pipeline.compare", diverged)
    with pytest.raises(UserError, match="loss on validation text is nan"):
        train(recipe_path, tmp_path / "out", *only("hidden"))
    assert not (tmp_path / "out" / "result.json").exists()


def test_target_decoder_layer_trains_whole_layers(recipe_path, tmp_path, fresh):
    trained = train(recipe_path, tmp_path / "out", *only("hidden", "target=decoder_layer"))
    names = changed(trained, {k: v for k, v in fresh.items() if k in trained})
    assert any("mlp" in name for name in names)
    assert not any("embed" in name for name in names)
    records = metrics(tmp_path / "out")
    assert records[-1]["loss"] < records[0]["loss"]


@pytest.mark.parametrize(
    "option", ["divergence=reverse", "divergence=jsd", "data=teacher_generated", "gradient_checkpointing=true"]
)
def test_options_of_stage_3(option, recipe_path, tmp_path):
    trained = train(recipe_path, tmp_path / "out", *only("end_to_end", option, "ce_weight=0"))
    plain = train(recipe_path, tmp_path / "plain", *only("end_to_end", "ce_weight=0"))
    assert bool(changed(trained, plain)) == (option != "gradient_checkpointing=true")
    if option == "data=teacher_generated":
        again = train(recipe_path, tmp_path / "again", *only("end_to_end", option, "ce_weight=0"))
        assert not changed(trained, again)


def test_micro_batches_are_weighted_by_the_text_that_the_teacher_generates(recipe_path, tmp_path, monkeypatch):
    counts, weights = [], []

    def training_batch(self, batch):
        end = 4 + 3 * len(counts)
        counts.append(end - 1)
        labels = batch["input_ids"].clone()
        labels[:, end:] = -100
        return {"input_ids": batch["input_ids"], "labels": labels}

    compute_loss = trainer.StageTrainer.compute_loss

    def spy(self, *args, **kwargs):
        weights.append(self.loss_weights[0])
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(EndToEndDistillation, "training_batch", training_batch)
    monkeypatch.setattr(trainer.StageTrainer, "compute_loss", spy)
    changes = ["data=teacher_generated", "micro_batch_size=1", "tokens=128"]
    train(recipe_path, tmp_path / "out", *only("end_to_end", *changes))
    assert len(weights) == len(counts) == 4
    assert weights == pytest.approx([4 * count / sum(counts) for count in counts])


def test_wsd_learning_rates(recipe_path, tmp_path):
    train(
        recipe_path, tmp_path / "out", *only("hidden", "lr_scheduler=wsd", "warmup=0.25", "decay=0.25", "tokens=1024")
    )
    rates = [m["lr"] for m in metrics(tmp_path / "out")]
    assert len(rates) == 8
    assert rates[0] < rates[2] == rates[3] == rates[4] == 1e-3
    assert rates[-1] < 1e-3


def test_budgeted_student_is_trained(recipe_path, tmp_path):
    result = distill(load_recipe(recipe_path, ["student={budget: 8}"]), tmp_path / "out")
    student = subquad.load_teacher(tmp_path / "out")[0]
    windows = [window for layer in student.mixer_layers for window in layer.windows]
    assert sum(window + 3 for window in windows) <= 12 * len(windows)
    assert len(set(windows)) > 1
    assert result["mixer"] == "budget-8"


def test_hybrid_of_layer_types_is_trained(recipe_path, tmp_path):
    result = distill(load_recipe(recipe_path, ["student.layer_types={default: gla, '1': attention}"]), tmp_path / "out")
    assert result["mixer"] == "hybrid"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [layer["mixer"] for layer in config["layer_specs"]] == ["gla", "attention"]
