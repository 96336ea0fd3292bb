"""trl's trainers on a student: three steps, and the first loss by hand, each text alone and without padding."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from subquad import linearize
from tests.helpers.students import SCALE_IDS, logits, randomize_gates, reloaded
from tests.helpers.teachers import SIZES, byte_tokenizer, random_teacher, tiny_teacher

trl = pytest.importorskip("trl", exc_type=ImportError)
pytest.importorskip("peft", exc_type=ImportError)
from datasets import Dataset  # noqa: E402

LAYER_TYPES = {
    "pure": {"default": "gated_deltanet"},
    "window": {"default": {"mixer": "attention", "window": [5, 9], "sinks": 2}},
    "hybrid": {"default": "gla", "1": "attention"},
}
TEXTS = [{"text": f"def f{i}(x): return x" + " + 1" * (i % 5)} for i in range(12)]
PAIRS = [{"prompt": f"say {i}", "chosen": "yes " * (1 + i % 3), "rejected": "no"} for i in range(12)]
CHATS = [
    {"messages": [{"role": "user", "content": f"say {i} " * (1 + i % 3)}, {"role": "assistant", "content": "yes " * i}]}
    for i in range(1, 13)
]
PROMPTS = [{"prompt": f"say {i} " * (1 + i % 3)} for i in range(12)]
COMMON = {
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "seed": 0,
}


@pytest.fixture(params=["teacher", *LAYER_TYPES])
def model(request):
    teacher = tiny_teacher(vocab_size=256, max_position_embeddings=256)
    if request.param == "teacher":
        return teacher
    return randomize_gates(linearize(teacher, layer_types=LAYER_TYPES[request.param], scale_ids=SCALE_IDS))


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def first_batch(trainer):
    """Trains, and returns the first batch and the logged losses."""
    kept = []
    compute = trainer.compute_loss

    def keep(model, inputs, *args, **kwargs):
        if not kept:
            given = {**inputs, "num_items": kwargs.get("num_items_in_batch")}
            kept.append({name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in given.items()})
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = keep
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    return kept[0], losses


def documents(batch):
    """The texts of a batch and their labels: rows without padding, or the documents of packed rows."""
    ids, labels = batch["input_ids"], batch["labels"]
    if "position_ids" in batch:
        starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
        return [(ids[:, a:b], labels[:, a:b]) for a, b in itertools.pairwise(starts)]
    real = batch["attention_mask"].bool()
    return [(ids[i : i + 1, real[i]], labels[i : i + 1, real[i]]) for i in range(len(ids))]


def mean_loss(model, batch):
    total = count = 0.0
    for ids, labels in documents(batch):
        targets = labels[0, 1:]
        total += float(F.cross_entropy(logits(model, ids)[0, :-1], targets, ignore_index=-100, reduction="sum"))
        count += int((targets != -100).sum())
    return total / count


@pytest.mark.parametrize(
    "options",
    [
        {"packing": False},
        {"packing": True, "packing_strategy": "bfd", "max_length": 64},
        {"padding_free": True, "max_length": None},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ],
    ids=["plain", "packed", "padding_free", "accumulation"],
)
def test_sft(model, tokenizer, tmp_path, options):
    before, given = copy.deepcopy(model).eval(), {"per_device_train_batch_size": 4, **COMMON, **options}
    args = trl.SFTConfig(output_dir=str(tmp_path), loss_type="nll", **given)
    data = Dataset.from_list(TEXTS)
    trainer = trl.SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
    batch, losses = first_batch(trainer)
    if "gradient_accumulation_steps" not in options:
        assert losses[0] == pytest.approx(mean_loss(before, batch), rel=1e-3)
    assert losses[-1] < losses[0]


def test_sft_with_lora_from_a_directory(model, tokenizer, tmp_path):
    from peft import LoraConfig

    before = copy.deepcopy(model).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    args = trl.SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, loss_type="nll", **COMMON)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    data = Dataset.from_list(TEXTS)
    trainer = trl.SFTTrainer(str(tmp_path / "model"), args=args, train_dataset=data, peft_config=lora)
    batch, losses = first_batch(trainer)
    assert losses[0] == pytest.approx(mean_loss(before, batch), rel=1e-3)


SCALED_LOGITS = {"gemma2": {"final_logit_softcapping": 2.0, "head_dim": 16}, "granite": {"logits_scaling": 8.0}}


def scaled_pair(model_type):
    """A teacher whose logits are scaled or capped, and its student."""
    teacher = random_teacher(model_type, **{**SIZES, "vocab_size": 256, **SCALED_LOGITS[model_type]})
    return teacher, randomize_gates(linearize(copy.deepcopy(teacher), "gla", scale_ids=SCALE_IDS))


@pytest.mark.parametrize("model_type", SCALED_LOGITS)
def test_sft_with_scaled_logits(tokenizer, tmp_path, model_type):
    _, model = scaled_pair(model_type)
    before = copy.deepcopy(model).eval()
    args = trl.SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, **COMMON)
    data = Dataset.from_list(TEXTS)
    batch, losses = first_batch(trl.SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer))
    assert losses[0] == pytest.approx(mean_loss(before, batch), rel=1e-3)


def log_likelihood(model, ids, mask, completion):
    """Of the completion's tokens, each row alone: a sum."""
    total = []
    for row, real, own in zip(ids, mask.bool(), completion.bool(), strict=True):
        tokens, chosen = row[real][None], own[real][1:]
        log_p = logits(model, tokens)[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
        total.append(log_p[chosen].sum())
    return torch.stack(total)


def test_dpo(model, tokenizer, tmp_path):
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)
    before = copy.deepcopy(model).eval()
    args = trl.DPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, beta=0.3, **COMMON)
    trainer = trl.DPOTrainer(
        model, reference, args=args, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer
    )
    batch, losses = first_batch(trainer)
    given = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    ratio = log_likelihood(before, *given) - log_likelihood(reference.eval(), *given)
    chosen, rejected = ratio.chunk(2)
    assert losses[0] == pytest.approx(float(-F.logsigmoid(0.3 * (chosen - rejected)).mean()), rel=1e-3)


@pytest.mark.parametrize("trainer_name", ["GRPO", "RLOO"])
def test_policy_gradients(model, tokenizer, tmp_path, trainer_name):
    config, trainer_type = getattr(trl, f"{trainer_name}Config"), getattr(trl, f"{trainer_name}Trainer")
    args = config(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=8,
        beta=0.1,
        **COMMON,
    )

    def reward(completions, **_):
        return [float(len(set(text))) for text in completions]

    model = reloaded(model, tmp_path / "model")  # the trainer asks for the name of its directory
    before, data = copy.deepcopy(model).eval(), Dataset.from_list(PROMPTS)
    trainer = trainer_type(model, reward, args=args, train_dataset=data, processing_class=tokenizer)
    calls, compute = [], trainer._get_per_token_logps_and_entropies

    def keep(model, ids, mask, count, *args, **kwargs):
        found = compute(model, ids, mask, count, *args, **kwargs)
        calls.append((ids, mask, count, found[0].detach().clone()))
        return found

    trainer._get_per_token_logps_and_entropies = keep
    _, losses = first_batch(trainer)
    ids, mask, count, found = calls[0]
    completion = mask.clone()
    completion[:, :-count] = 0
    expected = log_likelihood(before, ids, mask, completion)
    assert torch.allclose((found * completion[:, -count:]).sum(1), expected, atol=1e-3)
    assert all(torch.isfinite(torch.tensor(losses)))


def divergence(student, teacher, ids, mask, completion, beta):
    """beta KL(teacher, m) + (1 - beta) KL(student, m), m = beta teacher + (1 - beta) student; for beta 1 the reverse
    KL(student, teacher). Of the completion's tokens, each row alone: a sum."""
    total = 0.0
    for row, real, own in zip(ids, mask.bool(), completion.bool(), strict=True):
        tokens, chosen = row[real][None], own[real][1:]
        p, q = (logits(model, tokens)[0, :-1][chosen].double().softmax(-1) for model in (student, teacher))
        if beta == 1:
            total += float((p * (p / q).log()).sum())
        else:
            m = beta * q + (1 - beta) * p
            total += float((beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()).sum())
    return total


@pytest.mark.parametrize("lmbda", [0.0, 1.0], ids=["text of the data", "text of the student"])
def test_gkd(model, tokenizer, tmp_path, lmbda):
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    before, teacher = copy.deepcopy(model).eval(), tiny_teacher(seed=1, vocab_size=256, max_position_embeddings=256)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    args = GKDConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        lmbda=lmbda,
        beta=0.3,
        max_new_tokens=8,
        max_length=128,
        **COMMON,
    )
    trainer = GKDTrainer(model, teacher, args=args, train_dataset=Dataset.from_list(CHATS), processing_class=tokenizer)
    batch, losses = first_batch(trainer)
    completion = batch["labels"] != -100
    expected = divergence(before, teacher, batch["input_ids"], batch["attention_mask"], completion, 0.3)
    assert losses[0] == pytest.approx(expected / float(batch["num_items"]), rel=1e-3)


def check_distillation(model, teacher, tokenizer, tmp_path, beta):
    """The first loss of trl's `DistillationTrainer`, on text of the student."""
    args = trl.DistillationConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_completion_length=8, beta=beta, **COMMON
    )
    model = reloaded(model, tmp_path / "model")  # the trainer asks for the name of its directory
    before, data = copy.deepcopy(model).eval(), Dataset.from_list(PROMPTS)
    batch, losses = first_batch(
        trl.DistillationTrainer(model, teacher, args=args, train_dataset=data, processing_class=tokenizer)
    )
    ids, mask = (torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    completion = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], 1)
    expected = divergence(before, teacher, ids, mask, completion, beta) / int(completion.sum())
    assert losses[0] == pytest.approx(expected, rel=1e-3)


def test_distillation(model, tokenizer, tmp_path):
    teacher = tiny_teacher(seed=1, vocab_size=256, max_position_embeddings=256)
    check_distillation(model, teacher, tokenizer, tmp_path, beta=0.3)


@pytest.mark.parametrize("model_type", SCALED_LOGITS)
def test_distillation_with_scaled_logits(tokenizer, tmp_path, model_type):
    teacher, model = scaled_pair(model_type)
    check_distillation(model, teacher, tokenizer, tmp_path, beta=1.0)
