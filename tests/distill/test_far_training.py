"""Training that cannot bypass the memory: its own loss in stage 2, its columns in stage 1, and dropout of windows."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import subquad
from subquad.config import HiddenStage, MatrixStage, load_recipe
from subquad.distill import trainer
from subquad.distill.hidden_alignment import HiddenAlignment
from subquad.distill.matrix_mixing import MatrixMixing
from subquad.distill.pipeline import distill
from subquad.distill.window_dropout import drops_windows
from subquad.modeling.attention.activations import visit_activations
from subquad.modeling.attention.discovery import attention_modules, discover_attention
from subquad.modeling.attention.scores import AttentionProbabilities
from subquad.modeling.outside import far_target
from tests.helpers.architectures import ARCHITECTURES, cached_teacher
from tests.helpers.near_far import near_far_student, near_far_types, near_part, reference_output
from tests.helpers.processes import run_python
from tests.helpers.recipes import tiny_recipe
from tests.helpers.students import SCALE_IDS

LENGTHS = 9, 14


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def packed():
    """One row of two documents."""
    ids = torch.randint(3, 64, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]}


def loss_of(student, objective, batch):
    return student(objective=objective, **objective.forward_kwargs(batch)).loss


def hidden(teacher, ids, far_weight, **options):
    return HiddenAlignment(teacher, HiddenStage(tokens=1, lr=1.0, far_weight=far_weight, **options), ids)


def scores_of(attention, x, cos, sin):
    """Queries without rotary embedding `[B, H, T, K]`, with it, keys and values of all query heads, and scores."""
    raw = {n: getattr(attention, f"{n}_proj")(x).unflatten(-1, (-1, 8)).transpose(1, 2) for n in "qkv"}
    k, v = (raw[n].repeat_interleave(2, 1) for n in "kv")
    q, k = apply_rotary_pos_emb(raw["q"], k, cos, sin)
    scores = (q @ k.mT) / 8**0.5
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return raw["q"], q, k, v, scores.masked_fill(~causal, -torch.inf)


def reference_target(layer, attention, x, cos, sin):
    """Share and value of the target of one document, by definition."""
    raw, q, k, v, scores = scores_of(attention, x, cos, sin)
    full, lse = scores.softmax(-1) @ v, scores.logsumexp(-1)
    T, values, shares = x.shape[1], [], []
    for head in range(4):
        window, kv = layer.windows[head // 2], head // 2
        own = slice(head, head + 1)
        near, near_lse, *_ = near_part(raw[:, own], q[:, own], k[:, head], v[:, head], window, layer.sinks, cos, sin)
        mass = (1 - (near_lse[..., 0] - lse[:, head]).exp()).clamp(0, 1)  # moved sinks may weigh more than in place
        share = {"add": torch.ones_like(mass), "fixed": torch.full_like(mass, 0.5)}.get(layer.merge.kind, mass)
        left = (torch.arange(T) >= window + layer.sinks) | (layer.memory == "all")
        left = left & (kv in layer.memory_heads)
        kept = near[:, :, 0] * (1 if layer.merge.kind == "add" else 1 - share.unsqueeze(-1))
        values.append((full[:, head] - kept) * left[:, None])
        shares.append(share * left)
    return torch.stack(shares, 2), torch.stack(values, 2)


CASES = [
    {"window": 5},
    {"window": [3, 6], "sinks": 2, "state_heads": "key_value"},
    {"window": 4, "sinks": 1, "merge": "add", "memory_heads": [1]},
    {"window": 4, "merge": "fixed", "memory": "all", "output_norm": False},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_far_target_is_the_teachers_outside_part(teacher, packed, options):
    """It does not depend on the student's weights, nor on other documents of the row."""
    student = near_far_student(teacher, near_far_types("gla", **options))
    with torch.no_grad():
        for layer in student.mixer_layers:
            for p in layer.attention.parameters():
                p.mul_(1.5)
    infos, checked = discover_attention(teacher), []
    doc_ids = torch.tensor([1] * LENGTHS[0] + [2] * LENGTHS[1])[None, None, None]

    def check(index, activations):
        layer = student.mixer_layers[index]
        share, value = far_target(layer, infos[index], activations, doc_ids)
        cos, sin = activations.position_embeddings
        for start, end in ((0, LENGTHS[0]), (LENGTHS[0], sum(LENGTHS))):
            parts = (x[:, start:end].double() for x in (activations.hidden_states, cos, sin))
            expected = reference_target(layer, infos[index].module.double(), *parts)
            infos[index].module.float()
            for found, wanted in zip((share.squeeze(-1), value), expected, strict=True):
                torch.testing.assert_close(found[:, start:end], wanted.float(), atol=2e-5, rtol=1e-4)
                assert wanted.any()
        checked.append(index)

    visit_activations(teacher, attention_modules(infos), check, packed["input_ids"], packed["position_ids"])
    assert checked == [0, 1]
    assert infos[0].module.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral", "gemma2", "gpt2", "gpt_neox", "phi3", "gpt_oss"])
def test_far_target_without_sinks_is_a_sum_over_the_tokens_outside(model_type):
    """m* o_far* by the attention probabilities, with soft caps, learned sinks and the teacher's own windows."""
    if model_type not in ARCHITECTURES:
        pytest.skip(f"no {model_type}")
    teacher = cached_teacher(model_type)
    student = subquad.linearize(teacher, "gla", window=4, scale_ids=SCALE_IDS)
    infos, checked, tokens = discover_attention(teacher), [], torch.arange(17)

    def check(index, activations):
        info, kwargs = infos[index], {n: x for n, x in activations.kwargs.items() if n != "attention_mask"}
        value = far_target(student.mixer_layers[index], info, activations, None).value
        P = AttentionProbabilities(info.module, info.spec.window, 0, activations.args, kwargs)
        v = P.values()
        outside = P() * (tokens[:, None] - tokens >= 4)
        expected = outside @ v.repeat_interleave(info.spec.num_heads // v.shape[1], 1)
        torch.testing.assert_close(value, expected.transpose(1, 2), atol=2e-5, rtol=1e-4)
        checked.append(index)

    ids = torch.randint(3, 61, (2, 17), generator=torch.Generator().manual_seed(1))
    visit_activations(teacher, attention_modules(infos), check, ids)
    assert len(checked) == len(infos)


def test_far_weight_adds_the_distance_of_the_memory(teacher, packed):
    """Against a layer whose memory alone is computed: m = m* in place of its own share, the near part zero."""
    ids = packed["input_ids"]
    student = near_far_student(teacher, near_far_types("gla", 5))
    plain, weighted = hidden(teacher, ids, 0.0), hidden(teacher, ids, 0.7)
    infos, expected = discover_attention(teacher), []

    def check(index, activations):
        layer = student.mixer_layers[index]
        share, value = far_target(layer, infos[index], activations, None)
        x, (cos, sin) = activations.hidden_states, activations.position_embeddings
        with torch.no_grad():
            outputs = []
            for bias in (-1e4, 1e4):  # near alone, far alone
                kept = layer.merge.m_proj.bias.clone()
                layer.merge.m_proj.bias.fill_(bias)
                layer.attention.o_proj, projection = torch.nn.Identity(), layer.attention.o_proj
                outputs.append(reference_output(layer, x, cos, sin).unflatten(-1, (4, 8)))
                layer.merge.m_proj.bias.copy_(kept)
                layer.attention.o_proj = projection
        far = torch.where(share > 0, outputs[1], 0.0)
        error = infos[index].module.o_proj((share * far - value).flatten(-2))
        expected.append(error.square().sum(-1).mean() / weighted.target_norms[index])

    visit_activations(teacher, attention_modules(infos), check, ids)
    inputs = plain.forward_kwargs({"input_ids": ids})
    with torch.no_grad():
        before = student(objective=plain, **inputs).layer_losses
        after = student(objective=weighted, **inputs).layer_losses
    torch.testing.assert_close(after, before + 0.7 * torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_a_memory_without_a_share_learns_by_its_own_loss(teacher, packed):
    """With m = 0 the outputs give the memory no gradient."""
    student = near_far_student(teacher, near_far_types("gla", 5)).requires_grad_(True)
    with torch.no_grad():
        for layer in student.mixer_layers:
            layer.merge.m_proj.bias.fill_(-1e4)
    grads = {}
    for far_weight in (0.0, 1.0):
        student.zero_grad()
        loss_of(student, hidden(teacher, packed["input_ids"], far_weight), packed).backward()
        grads[far_weight] = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    memory = [name for name in grads[1.0] if ".mixer." in name]
    assert memory
    assert not any(grads[0.0][name].any() for name in memory)
    assert all(grads[1.0][name].any() for name in memory)
    unchanged = [name for name in grads[1.0] if ".merge." in name or ".o_proj." in name]
    assert all(torch.equal(grads[0.0][name], grads[1.0][name]) for name in unchanged)


def test_a_memory_comes_nearer_to_its_target_by_its_own_loss(teacher):
    """After as many steps, and its layer is not much worse."""
    ids = torch.randint(3, 64, (4, 40), generator=torch.Generator().manual_seed(3))
    batch, found = {"input_ids": ids}, {}
    for far_weight in (0.0, 1.0):
        student = subquad.linearize(teacher, "gla", window=5, scale_ids=ids).requires_grad_(True)
        objective = hidden(teacher, ids, far_weight)
        optimizer = torch.optim.Adam(objective.trained_parameters(student), lr=3e-3)
        for _ in range(20):
            optimizer.zero_grad()
            loss_of(student, objective, batch).backward()
            optimizer.step()
        with torch.no_grad():
            outputs, both = (loss_of(student, hidden(teacher, ids, w), batch).item() for w in (0.0, 1.0))
        found[far_weight] = outputs, both - outputs
    assert found[1.0][1] < 0.8 * found[0.0][1]
    assert found[1.0][0] < 1.1 * found[0.0][0]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_far_loss_of_packed_documents_matches_separate_rows(teacher, packed, options):
    student = near_far_student(teacher, near_far_types("gated_deltanet", **options))
    ids = packed["input_ids"]
    for objective in (hidden(teacher, ids, 1.0), MatrixMixing(teacher, MatrixStage(tokens=1, lr=1.0))):
        with torch.no_grad():
            found = loss_of(student, objective, packed)
            alone = [loss_of(student, objective, {"input_ids": part}) for part in ids.split(LENGTHS, 1)]
        expected = sum(n * loss for n, loss in zip(LENGTHS, alone, strict=True)) / sum(LENGTHS)
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-6)


def test_layers_without_a_memory_have_no_second_loss(teacher, packed):
    types = {"0": "gla", "1": {"mixer": "gla", "window": "full"}}
    student = subquad.linearize(teacher, layer_types=types, scale_ids=packed["input_ids"])
    with torch.no_grad():
        losses = [loss_of(student, hidden(teacher, packed["input_ids"], w), packed) for w in (0.0, 5.0)]
    assert losses[0] == losses[1]


# ---------------------------------------------------------------------- stage 1


@pytest.mark.parametrize("options", [*CASES[:3], {"window": 4, "sinks": 1, "memory": "all"}], ids=str)
@pytest.mark.parametrize("row_chunk_size", [1024, 7])
def test_stage_1_compares_the_columns_outside(teacher, packed, options, row_chunk_size):
    """Far part times share against the teacher's probabilities, in the columns that have left the window."""
    student = near_far_student(teacher, near_far_types("gla", **options))
    objective = MatrixMixing(teacher, MatrixStage(tokens=1, lr=1.0, row_chunk_size=row_chunk_size))
    infos, ids, expected = discover_attention(teacher), packed["input_ids"], []

    def check(index, activations):
        layer = student.mixer_layers[index]
        kwargs = {"hidden_states": activations.hidden_states, "position_embeddings": activations.position_embeddings}
        matrix = layer.matrix_rows(**kwargs)
        *_, scores = scores_of(infos[index].module, activations.hidden_states, *activations.position_embeddings)
        total, (i, j) = 0.0, (torch.arange(ids.shape[1])[:, None], torch.arange(ids.shape[1]))
        with torch.no_grad():
            share = 1.0 if layer.merge.kind == "add" else matrix.share()
            M, P = share * matrix.far(), scores.softmax(-1)
        for head in range(4):
            outside = (i - j >= layer.windows[head // 2]) & (j >= layer.sinks) & (head // 2 in layer.memory_heads)
            total += ((M[:, head] - P[:, head]) * outside).square().sum()
        expected.append(total / (4 * ids.shape[1]))

    visit_activations(teacher, attention_modules(infos), check, ids)
    found = student(objective=objective, **objective.forward_kwargs({"input_ids": ids})).layer_losses
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------------- dropout of windows


def test_windows_are_dropped_with_the_scheduled_probability():
    steps = 4000
    dropped = torch.tensor([drops_windows([0.9, 0.5], 3, "hidden", step, steps) for step in range(steps)]).float()
    for part, expected in zip(dropped.split(steps // 4), (0.85, 0.75, 0.65, 0.55), strict=True):
        assert part.mean().item() == pytest.approx(expected, abs=0.05)
    other = torch.tensor([drops_windows([0.9, 0.5], 4, "hidden", step, steps) for step in range(steps)]).float()
    assert 0.2 < (dropped != other).float().mean() < 0.6
    assert drops_windows([1.0, 1.0], 0, "hidden", 0, 1)
    assert not drops_windows([0.0, 0.0], 0, "hidden", 0, 1)


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory):
    stages = {name: {"tokens": 512, "lr": 1e-3, "batch_size": 4} for name in ("hidden", "end_to_end")}
    student = {"mixer": "gla", "calibration_tokens": None, "mixer_kwargs": {"window": 4, "sinks": 1}}
    return tiny_recipe(tmp_path_factory.mktemp("run"), stages=stages, student=student)


def train(recipe_path, output, *overrides):
    distill(load_recipe(recipe_path, overrides), output)
    return load_file(output / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.usefixtures("own_cache")
def test_dropout_is_resumed_and_spares_validation(recipe_path, tmp_path, monkeypatch):
    stages, schedule = ["hidden", "end_to_end"], [0.9, 0.3]
    settings = ["checkpoint.save_steps=1", "evaluation.eval_steps=1"]
    chosen = [*settings, *(f"stages.{stage}.window_dropout={schedule}" for stage in stages)]
    seen: dict[str, list] = {"compute_loss": [], "prediction_step": []}
    for name, calls in seen.items():
        original = getattr(trainer.StageTrainer, name)

        def spy(self, *args, _original=original, _calls=calls, **kwargs):
            _calls.append({layer.merge.far_only for layer in self.student.mixer_layers})
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(trainer.StageTrainer, name, spy)
    whole = train(recipe_path, tmp_path / "whole", *chosen)
    steps = [drops_windows(schedule, 0, stage, step, 4) for stage in stages for step in range(4)]
    assert seen["compute_loss"] == [{dropped} for dropped in steps]
    assert 0 < sum(steps[:4]) < 4
    assert 0 < sum(steps[4:]) < 4
    assert seen["prediction_step"]
    assert all(dropped == {False} for dropped in seen["prediction_step"])
    assert not same(whole, train(recipe_path, tmp_path / "plain", *settings))
    end_of_step = trainer.MetricsCallback.on_step_end

    def stop(self, args, state, control, **kwargs):
        end_of_step(self, args, state, control, **kwargs)
        if (self.stage, state.global_step) == ("end_to_end", 2):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.MetricsCallback, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            train(recipe_path, tmp_path / "cut", *chosen)
    assert same(whole, train(recipe_path, tmp_path / "cut", *chosen))


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_two_processes_drop_windows_in_the_same_steps(recipe_path, tmp_path):
    changes = ["stages.hidden=null", "stages.end_to_end.window_dropout=[0.9, 0.3]"]
    one = train(recipe_path, tmp_path / "one", *changes)
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29573", "-m", "subquad.cli"]
    command += ["distill", recipe_path, "--output", tmp_path / "two"]
    for change in changes:
        command += ["--set", change]
    run_python(*command, environment={"OMP_NUM_THREADS": "1"}, timeout=300)
    two = load_file(tmp_path / "two" / "model.safetensors")
    assert two.keys() == one.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-5, rtol=1e-4, msg=name)
