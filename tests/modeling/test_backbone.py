"""Entries below the head (`base_model`, `get_decoder()`, the teacher's own names) give what the head gets."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.helpers.architectures import build_teacher
from tests.helpers.students import all_close, make_student

LAYER_TYPES = {
    "pure": {"default": "gated_deltanet"},
    "hybrid": {"default": "gla", "1": "attention"},
    "window": {"default": {"mixer": "attention", "window": [3, 5], "sinks": 2}},
    "near_far": {"default": {"mixer": "mamba2", "window": 5, "sinks": 2}},
}
CASES = [(name, kind, "sdpa") for name in ("llama", "opt") for kind in ("pure", "hybrid")]
CASES += [("llama", kind, "eager") for kind in LAYER_TYPES] + [
    ("gpt2", "hybrid", "eager"),
    ("gemma3_text", "pure", "sdpa"),
]
ENTRIES = {
    "base_model": lambda model: model.base_model,
    "get_decoder": lambda model: model.get_decoder(),
    "own name": lambda model: getattr(model.base, model.base.base_model_prefix),
}


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def student(request):
    name, kind, implementation = request.param
    teacher = build_teacher(name)
    teacher.set_attn_implementation(implementation)
    return make_student(teacher, layer_types=LAYER_TYPES[kind]).eval()


@pytest.fixture
def ids():
    return torch.randint(3, 61, (2, 13), generator=torch.Generator().manual_seed(5))


def descriptions(ids):
    """Arguments that describe the tokens, by name."""
    masks = {name: torch.ones_like(ids) for name in ("left", "right", "middle")}
    masks["left"][0, :5] = masks["right"][0, 8:] = masks["middle"][0, 4:7] = 0
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4]] * 2)
    return {"plain": {}, **{n: {"attention_mask": m} for n, m in masks.items()}, "packed": {"position_ids": packed}}


@torch.no_grad()
def head_input(model, **given):
    """What the head gets when the whole model runs."""
    found = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        model(**given)
    finally:
        hook.remove()
    return found[0]


@pytest.mark.parametrize("entry", ENTRIES)
@torch.no_grad()
def test_hidden_states_are_those_that_the_head_gets(student, ids, entry):
    embeddings = student.get_input_embeddings()(ids)
    for name, given in descriptions(ids).items():
        expected = head_input(student, input_ids=ids, use_cache=False, **given)
        real = given.get("attention_mask", torch.ones_like(ids)).bool()
        backbone = ENTRIES[entry](student)
        found = backbone(input_ids=ids, use_cache=False, **given).last_hidden_state
        assert all_close(found[real], expected[real], 1e-5), name
        found = backbone(inputs_embeds=embeddings, use_cache=False, **given)[0]
        assert all_close(found[real], expected[real], 1e-5), f"{name}, embeddings"


@torch.no_grad()
def test_backbone_makes_and_continues_a_cache(student, ids):
    mask = descriptions(ids)["left"]["attention_mask"]
    expected = head_input(student, input_ids=ids, attention_mask=mask, use_cache=False)
    first = student.base_model(input_ids=ids[:, :9], attention_mask=mask[:, :9], use_cache=True)
    assert type(first.past_key_values) is type(student.new_cache())
    more = student.base_model(input_ids=ids[:, 9:], attention_mask=mask, past_key_values=first.past_key_values)
    assert all_close(more.last_hidden_state, expected[:, 9:], 1e-5)
    assert more.past_key_values.get_seq_length() == ids.shape[1]


@torch.no_grad()
def test_copies_have_their_own_backbone(student, ids):
    copied = copy.deepcopy(student)
    with torch.no_grad():
        copied.get_input_embeddings().weight.mul_(2)
    expected = head_input(copied, input_ids=ids, use_cache=False)
    assert all_close(copied.base_model(input_ids=ids, use_cache=False).last_hidden_state, expected, 1e-5)
    made = copied.base_model(input_ids=ids, use_cache=True).past_key_values
    assert made.get_seq_length() == ids.shape[1]


def test_mask_of_transformers_is_refused(student, ids):
    mask = torch.zeros(2, 1, 13, 13)
    with pytest.raises(ValueError, match="got 4 dimensions"):
        student.base_model(input_ids=ids, attention_mask=mask)


def test_accumulated_gradients_are_those_of_the_batch(student, tmp_path):
    """Rows of unequal length, one or four a micro-batch, under a plain `Trainer`."""
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 61, (n,), generator=generator)} for n in (60, 4, 6, 5)]

    def collate(rows):
        given = [row["input_ids"] for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(given, batch_first=True)
        real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in given], batch_first=True)
        return {"input_ids": ids, "attention_mask": real, "labels": ids.masked_fill(real == 0, -100)}

    def step(micro_batch):
        model = copy.deepcopy(student)
        args = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=4 // micro_batch,
            max_steps=1,
            learning_rate=1e-30,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            max_grad_norm=0,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=collate)
        gradients = {}
        zero_grad = model.zero_grad

        def keep(*args, **kwargs):
            gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            zero_grad(*args, **kwargs)

        model.zero_grad = keep
        trainer.train()
        return gradients, next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)

    (whole, whole_loss), (parts, parts_loss) = step(4), step(1)
    difference = sum(float((whole[name] - parts[name]).square().sum()) for name in whole) ** 0.5
    size = sum(float(gradient.square().sum()) for gradient in whole.values()) ** 0.5
    assert size > 0
    assert difference < 1e-5 * size
    assert abs(whole_loss - parts_loss) < 1e-3
