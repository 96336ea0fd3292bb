"""A cache of a prefix: copied, saved, loaded, and continued by several texts."""

import copy

import pytest
import torch

from subquad.modeling.cache import CACHE_ARGUMENT
from subquad.utils import UserError
from tests.helpers.architectures import build_teacher
from tests.helpers.students import KINDS, all_close, make_student

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 8}


@pytest.fixture(params=KINDS)
def student(request):
    return make_student(build_teacher("llama"), layer_types=KINDS[request.param]).eval()


@pytest.fixture
def ids():
    return torch.randint(3, 61, (2, 30), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def prefix_cache(student, ids, mask=None):
    cache = student.new_cache()
    student(ids, attention_mask=mask, past_key_values=cache)
    return cache


def round_trip(student, cache, path):
    student.save_cache(cache, path / "cache.safetensors")
    return student.load_cache(path / "cache.safetensors")


COPIES = {
    "snapshot": lambda student, cache, path: cache.snapshot(),
    "deepcopy": lambda student, cache, path: copy.deepcopy(cache),
    "file": round_trip,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_many_continuations_of_one_prefix(student, ids, how, padded, tmp_path):
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    given = {"attention_mask": mask} if padded else {}
    cache = prefix_cache(student, ids[:, :12], mask[:, :12] if padded else None)
    for seed in (1, 2):
        other = torch.randint(3, 61, (2, 18), generator=torch.Generator().manual_seed(seed))
        text = torch.cat((ids[:, :12], other), 1)
        copied = COPIES[how](student, cache, tmp_path)
        assert copied.nbytes() == cache.nbytes()
        found = [student(text[:, :20][:, 12:], **{k: m[:, :20] for k, m in given.items()}, past_key_values=copied)]
        found += [
            student(text[:, t : t + 1], **{k: m[:, : t + 1] for k, m in given.items()}, past_key_values=copied)
            for t in range(20, 30)
        ]
        expected = student(text, **given, use_cache=False).logits[:, 12:]
        assert all_close(torch.cat([output.logits for output in found], 1), expected, 1e-5)
        assert cache.get_seq_length() == 12


def test_a_chat_reads_each_turn_once(student, ids):
    """Three turns with one cache give the texts of running each conversation anew, and read only what is new."""
    lengths = []
    count = student.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    conversation, cache = ids[:1, :0], student.new_cache()
    for turn in range(3):
        conversation = torch.cat((conversation, ids[:1, 7 * turn : 7 * turn + 7]), 1)
        expected = student.generate(conversation, **GREEDY)
        lengths.clear()
        found = student.generate(conversation, **{CACHE_ARGUMENT: cache}, **GREEDY)
        assert torch.equal(found, expected), turn
        # 7 tokens of the turn, after the first also the last token that the student wrote; then one at a time
        assert lengths == [7 + (turn > 0), *[1] * 7], turn
        conversation = found
    count.remove()


def test_copies_record_nothing_and_share_nothing_that_changes(student, ids):
    cache = prefix_cache(student, ids)
    cache.activate_past_recording()
    copied = cache.snapshot()
    with torch.no_grad():
        student(ids[:, :3], past_key_values=cache)
    assert copied.get_seq_length() == 30
    if (
        not isinstance(student.config.layer_specs[0]["mixer"], str)
        or student.config.layer_specs[0]["mixer"] == "softmax"
    ):
        return
    cache.crop(-2)
    with torch.no_grad():
        student(ids[:, :3], past_key_values=copied)
    with pytest.raises(RuntimeError, match="expected at most 0"):
        copied.crop(-1)


def test_files_that_are_not_of_this_student(ids, tmp_path):
    student = make_student(build_teacher("llama"), layer_types=KINDS["pure"]).eval()
    path = tmp_path / "cache.safetensors"
    with pytest.raises(UserError, match="cache: no file"):
        student.load_cache(path)
    student.save_cache(prefix_cache(student, ids), path)
    other = make_student(build_teacher("llama"), layer_types=KINDS["window"]).eval()
    trained = make_student(build_teacher("llama"), layer_types=KINDS["pure"]).eval()
    with torch.no_grad():
        trained.mixer_layers[1].mixer.o_norm += 0.1
    for stranger in (other, trained, copy.deepcopy(student).to(torch.bfloat16)):
        with pytest.raises(UserError, match="of another student"):
            stranger.load_cache(path)
    assert copy.deepcopy(student).load_cache(path).get_seq_length() == 30
    whole = path.read_bytes()
    for damaged in (whole[:200], whole[: len(whole) // 2], b"", b"no cache at all"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="holds no cache"):
            student.load_cache(path)
    student.base.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="holds no cache"):
        student.load_cache(tmp_path / "model" / "model.safetensors")


def test_an_empty_cache_and_one_of_float16(tmp_path, ids):
    student = make_student(build_teacher("llama"), layer_types=KINDS["hybrid"]).eval()
    assert round_trip(student, student.new_cache(), tmp_path).get_seq_length() == 0
    half = student.to(torch.bfloat16)
    cache = prefix_cache(half, ids)
    loaded = round_trip(half, cache, tmp_path)
    with torch.no_grad():
        assert torch.equal(half(ids, past_key_values=cache).logits, half(ids, past_key_values=loaded).logits)


def test_a_loaded_cache_is_on_the_device_of_the_weights(student, ids, tmp_path):
    cache, path = prefix_cache(student, ids), tmp_path / "cache.safetensors"
    student.save_cache(cache, path)
    loaded = student.to("meta").load_cache(path)
    for layer in loaded.layers:
        held = layer.tensors() if hasattr(layer, "tensors") else [layer.keys, layer.values]
        assert {x.device.type for x in held} == {"meta"}
    assert loaded.nbytes() == cache.nbytes()
