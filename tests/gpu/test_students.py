"""Students on a CUDA device: the logits of the CPU, without synchronization of host and device."""

import contextlib
import copy

import pytest
import torch
from transformers import CompileConfig

import subquad
from subquad.export import export
from subquad.modeling.cache import CACHE_ARGUMENT
from tests.helpers.exports import saved_student
from tests.helpers.students import MIXERS, SCALE_IDS, make_student
from tests.helpers.teachers import tiny_teacher

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

HYBRID = {
    "default": {"mixer": "gla", "state_heads": "key_value"},
    "1": "attention",
    "2": {"mixer": "attention", "window": 4},
    "3": "xlstm",
}
NEAR_FAR = {
    "default": {"mixer": "gated_deltanet", "window": [4, 9], "sinks": 2, "state_heads": "key_value"},
    "1": {"mixer": "gla", "window": 5, "merge": "denominator", "qk_activation": "elu1"},
    "2": {"mixer": "xlstm", "window": 7, "merge": "add", "memory": "all"},
}
TOLERANCE = {"torch": 1e-4, "auto": 4e-2}
"""Of logits, relative to the largest: fla multiplies in TF32. Deltanet amplifies the rounding of gradients."""


def build(name):
    if name == "hybrid":
        teacher = tiny_teacher(num_hidden_layers=4, head_dim=16)
        return subquad.linearize(teacher, layer_types=HYBRID, scale_ids=SCALE_IDS)
    if name == "near_far":
        return make_student(tiny_teacher(num_hidden_layers=3, head_dim=16), layer_types=NEAR_FAR)
    return make_student(tiny_teacher(head_dim=16), name)


@pytest.fixture(scope="module", params=[*MIXERS, "hybrid", "near_far"])
def pair(request):
    """A student on the CPU and the same on the device."""
    return build(request.param), build(request.param).cuda()


@pytest.fixture(params=TOLERANCE)
def tolerance(request, monkeypatch):
    monkeypatch.setenv("SUBQUAD_BACKEND", request.param)
    return TOLERANCE[request.param]


def rows(count=3, length=40):
    return torch.randint(3, 61, (count, length), generator=torch.Generator().manual_seed(5))


def distance(found, expected):
    return float((found.cpu() - expected).abs().max() / expected.abs().max())


@contextlib.contextmanager
def no_synchronization():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_logits_are_those_of_the_cpu(pair, tolerance):
    on_cpu, on_gpu = pair
    ids = rows()
    assert distance(on_gpu(input_ids=ids.cuda()).logits, on_cpu(input_ids=ids).logits) < tolerance


@torch.no_grad()
def test_padding_and_packed_documents(pair, tolerance):
    on_cpu, on_gpu = pair
    ids, mask = rows(), torch.ones(3, 40, dtype=torch.long)
    mask[0, :7] = mask[1, -9:] = 0
    expected = on_cpu(input_ids=ids, attention_mask=mask).logits
    found = on_gpu(input_ids=ids.cuda(), attention_mask=mask.cuda()).logits.cpu()
    assert distance(found[mask.bool()], expected[mask.bool()]) < tolerance
    positions = torch.cat([torch.arange(17), torch.arange(23)])[None].expand(3, -1)
    expected = on_cpu(input_ids=ids, position_ids=positions).logits
    assert distance(on_gpu(input_ids=ids.cuda(), position_ids=positions.cuda()).logits, expected) < tolerance


@torch.no_grad()
def test_decoding_with_a_cache(pair, tolerance):
    on_cpu, on_gpu = pair
    ids = rows()
    expected = on_cpu(input_ids=ids).logits
    out = on_gpu(input_ids=ids[:, :30].cuda(), use_cache=True)
    found = [out.logits]
    for t in range(30, 40):
        out = on_gpu(input_ids=ids[:, t : t + 1].cuda(), use_cache=True, **{CACHE_ARGUMENT: out[CACHE_ARGUMENT]})
        found.append(out.logits)
    assert distance(torch.cat(found, dim=1), expected) < tolerance


def test_gradients_are_those_of_the_cpu(pair, tolerance):
    gradients = []
    for model, ids in zip(pair, (rows(), rows().cuda()), strict=True):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    on_cpu, on_gpu = gradients
    assert on_cpu.keys() == on_gpu.keys()
    largest = max(float(g.abs().max()) for g in on_cpu.values())
    worst = max((float((on_gpu[n].cpu() - g).abs().max()) / largest, n) for n, g in on_cpu.items())
    assert worst[0] < max(tolerance, 2e-3), worst


@torch.no_grad()
def test_bfloat16_is_as_exact_as_on_the_cpu(pair):
    on_cpu, ids = pair[0], rows()
    expected = on_cpu(input_ids=ids).logits
    rounded = copy.deepcopy(on_cpu).to(torch.bfloat16)
    cpu_error = (rounded(input_ids=ids).logits.float() - expected).abs().mean()
    found = rounded.cuda()(input_ids=ids.cuda()).logits.float().cpu()
    assert (found - expected).abs().mean() < 2 * cpu_error


@torch.no_grad()
def test_generation_of_unequal_prompts(pair, monkeypatch):
    monkeypatch.setenv("SUBQUAD_BACKEND", "torch")
    on_cpu, on_gpu = pair
    ids, mask = rows(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = on_cpu.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(on_gpu.generate(input_ids=ids.cuda(), attention_mask=mask.cuda(), **options).cpu(), expected)


def test_forward_backward_and_decoding_do_not_synchronize(pair):
    _, on_gpu = pair
    ids = rows().cuda()
    with torch.no_grad():  # compiles kernels
        out = on_gpu(input_ids=ids, use_cache=True)
        on_gpu(input_ids=ids[:, :1], use_cache=True, **{CACHE_ARGUMENT: out[CACHE_ARGUMENT]})
    on_gpu(input_ids=ids).logits.sum().backward()
    with no_synchronization():
        on_gpu(input_ids=ids).logits.sum().backward()
        with torch.no_grad():
            out = on_gpu(input_ids=ids, use_cache=True)
            on_gpu(input_ids=ids[:, :1], use_cache=True, **{CACHE_ARGUMENT: out[CACHE_ARGUMENT]})
    on_gpu.zero_grad()


@pytest.mark.parametrize("mixer", ["gated_deltanet", "mamba2", "xlstm"])
def test_the_decode_step_is_a_cuda_graph(mixer):
    """Generation of two lengths; states that are read after later steps are those of their own step."""
    student, ids = make_student(tiny_teacher(head_dim=16), mixer).cuda(), rows(2, 12).cuda()
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    config = CompileConfig(mode="reduce-overhead", fullgraph=True)
    for tokens in (8, 16):
        expected = student.generate(input_ids=ids, max_new_tokens=tokens, **options)
        found = student.generate(input_ids=ids, max_new_tokens=tokens, compile_config=config, **options)
        assert found.tolist() == expected.tolist()
    step, cache = student.get_compiled_call(config), student.new_cache()
    with torch.no_grad():
        step(ids, cache=cache)
        step(ids[:, :1], cache=cache)
        snapshot = cache.snapshot()
        kept = [x.clone() for layer in snapshot.layers for x in layer.states]
        step(ids[:, 1:2], cache=cache)
        assert all(map(torch.equal, kept, (x for layer in snapshot.layers for x in layer.states)))
        with no_synchronization():
            step(ids[:, 2:3], cache=cache)


@pytest.mark.parametrize("mixer", ["gla", "gated_deltanet"])
def test_calibration_with_tokens_of_the_cpu(mixer):
    ids = rows(2, 64)
    students = [
        subquad.linearize(tiny_teacher(head_dim=16).to(device), mixer, calibration_ids=ids)
        for device in ("cpu", "cuda")
    ]
    with torch.no_grad():
        expected, found = (student(input_ids=rows().to(student.device)).logits for student in students)
    assert distance(found, expected) < 5e-2


@pytest.mark.parametrize("target", ["qwen3_5", "granite_hybrid"])
def test_export_of_a_student_of_the_cpu(target, tmp_path):
    """Its check runs the new model, whose kernels are Triton's where fla is installed."""
    layers = {"default": "gated_deltanet" if target == "qwen3_5" else "mamba2"}
    export(saved_student(tmp_path, layers, target), tmp_path / "served", target)
    assert (tmp_path / "served" / "model.safetensors").exists()
