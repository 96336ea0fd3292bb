"""The fused loss against the loss on logits, and the heads that are read off models."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertLMHeadModel

import subquad
from subquad.distill import fused_loss as fused
from subquad.distill.distillation_loss import LossOptions, distillation_loss
from subquad.distill.fused_loss import fused_distillation_loss
from subquad.distill.lm_head import Head, read_head

N, D, TEACHER_D, V = 23, 12, 10, 41
HEADS = {
    "bare": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.4},
    "softcap": {"softcap": 3.0},
    "everything": {"bias": True, "scale": 1.7, "softcap": 2.0},
}


class Case:
    """Hidden states, labels of which a fifth is ignored, and two heads."""

    def __init__(self, kind="everything", dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        options = dict(HEADS[kind])
        biased = options.pop("bias", False)
        self.hidden, self.teacher_hidden = random(N, D).requires_grad_(), random(N, TEACHER_D)
        bias = random(V).requires_grad_() if biased else None
        self.head = Head(random(V, D).requires_grad_(), bias, **options)
        self.teacher_head = Head(random(V, TEACHER_D), random(V) if biased else None, **options)
        self.labels = torch.randint(V, (N,), generator=g)
        self.labels[::5] = -100

    @property
    def inputs(self):
        return [x for x in (self.hidden, self.head.weight, self.head.bias) if x is not None and x.requires_grad]

    def fused(self, chunk=7, **options):
        return fused_distillation_loss(
            self.hidden, self.teacher_hidden, self.labels, self.head, self.teacher_head, LossOptions(**options), chunk
        )

    def plain(self, **options):
        student, teacher = self.head.logits(self.hidden), self.teacher_head.logits(self.teacher_hidden)
        return on_logits(student, teacher, self.labels, **options)


def on_logits(student, teacher, labels, **options):
    """`distillation_loss` of logits `[N, V]` and labels that are already shifted."""
    student, teacher = (torch.cat([x, x[:1]]).unsqueeze(0) for x in (student, teacher))
    return distillation_loss(student, teacher, torch.cat([labels[:1], labels]).unsqueeze(0), LossOptions(**options))


def assert_equal(found, expected, inputs, tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for a, b in zip(*(torch.autograd.grad(x[0], inputs) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 0.7), (0.0, 1.0)], ids=["ce1-kl1", "ce.3-kl.7", "ce0-kl1"])
@pytest.mark.parametrize("temperature", [1.0, 2.0], ids=["tau1", "tau2"])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["f32", "f64"])
def test_fused_loss_equals_distillation_loss(kind, divergence, temperature, weights, dtype, tolerance, monkeypatch):
    case = Case(kind, dtype)
    monkeypatch.setattr(fused, "PIECE_BYTES", 3 * V * case.hidden.itemsize)
    options = {"divergence": divergence, "beta": 0.3, "temperature": temperature}
    options |= dict(zip(("ce_weight", "kl_weight"), weights, strict=True))
    assert_equal(case.fused(**options), case.plain(**options), case.inputs, tolerance)


@pytest.mark.parametrize("chunk", [1, 6, 18, 23, 512])
def test_chunk_size_has_no_effect(chunk):
    case = Case()
    assert_equal(case.fused(chunk), case.plain(), case.inputs, 1e-5)


def test_tied_head_gets_both_gradients():
    case = Case()
    tokens = torch.randint(V, (N,))

    def hidden():
        return torch.tanh(nn.functional.embedding(tokens, case.head.weight))

    inputs = [case.head.weight, case.head.bias]
    case.hidden = hidden()
    found = case.fused()
    case.hidden = hidden()
    assert_equal(found, case.plain(), inputs, 1e-5)


def test_loss_is_zero_if_all_labels_are_ignored():
    case = Case()
    case.labels[:] = -100
    loss, ce, kl = case.fused()
    assert (loss.item(), ce.item(), kl.item()) == (0, 0, 0)
    assert all(not g.any() for g in torch.autograd.grad(loss, case.inputs))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_gradients_only_where_required(frozen):
    case = Case()
    (case.hidden if frozen == "hidden" else getattr(case.head, frozen)).requires_grad_(False)
    case.teacher_hidden.requires_grad_()
    case.teacher_head.weight.requires_grad_()
    assert len(case.inputs) == 2
    assert_equal(case.fused(), case.plain(), case.inputs, 1e-5)
    case.fused()[0].backward()
    assert case.teacher_hidden.grad is None
    assert case.teacher_head.weight.grad is None


def test_no_grad():
    case = Case()
    with torch.no_grad():
        found = case.fused()
    assert not any(x.requires_grad for x in found)
    loss, ce, kl = case.fused()
    assert loss.requires_grad
    assert not ce.requires_grad
    assert not kl.requires_grad
    torch.testing.assert_close(found, (loss.detach(), ce, kl))


def test_no_teacher_with_kl_weight_0():
    case = Case()
    expected = case.plain(kl_weight=0.0)
    inputs = case.hidden, None, case.labels, case.head, None
    found = fused_distillation_loss(*inputs, LossOptions(kl_weight=0.0), chunk=7)
    assert found[2].item() == 0
    assert_equal(found[:2], expected[:2], case.inputs, 1e-5)
    with pytest.raises(ValueError, match="teacher_hidden"):
        fused_distillation_loss(*inputs, LossOptions())


def test_another_vocabulary_is_refused():
    case = Case()
    case.teacher_head = Head(torch.randn(V + 3, TEACHER_D))
    with pytest.raises(ValueError, match=rf"vocabulary: got {V} .* {V + 3}"):
        case.fused()


def test_gradients_accumulate():
    case = Case()
    (case.fused()[0] / 4).backward()
    (case.fused(divergence="reverse")[0] / 4).backward()
    expected = torch.autograd.grad((case.plain()[0] + case.plain(divergence="reverse")[0]) / 4, case.inputs)
    for x, g in zip(case.inputs, expected, strict=True):
        torch.testing.assert_close(x.grad, g, rtol=1e-5, atol=1e-5)


def test_second_backward_is_refused():
    case = Case()
    loss = case.fused()[0]
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, case.hidden, create_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="retain_graph"):
        loss.backward()


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_bfloat16(autocast):
    """Errors against float64 are no larger than those of `distillation_loss` in bfloat16."""
    exact = Case(dtype=torch.float64)
    case = Case(dtype=torch.float32 if autocast else torch.bfloat16)
    reference = torch.autograd.grad(exact.plain()[0], exact.inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, plain = case.fused(), case.plain()
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0].double(), exact.plain()[0], rtol=0.02, atol=0)
    gradients = [torch.autograd.grad(x[0], case.inputs) for x in (found, plain)]
    for x, ours, theirs, true in zip(case.inputs, *gradients, reference, strict=True):
        assert ours.dtype == x.dtype
        error, allowed = (float((g.double() - true).norm() / true.norm()) for g in (ours, theirs))
        assert error <= max(1.1 * allowed, 0.01)


# ---------------------------------------------------------------------- heads of models

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
GPT = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
ARCHITECTURES: dict[str, tuple[dict, tuple[bool, float, float | None]]] = {
    "llama": (SMALL, (False, 1.0, None)),
    "gemma2": ({**SMALL, "final_logit_softcapping": 4.0}, (False, 1.0, 4.0)),
    "gemma3_text": (SMALL, (False, 1.0, None)),
    "cohere": (SMALL, (False, 0.0625, None)),
    "granite": ({**SMALL, "logits_scaling": 8.0}, (False, 0.125, None)),
    "phi": (SMALL, (True, 1.0, None)),
    "gptj": ({**GPT, "rotary_dim": 4}, (True, 1.0, None)),
    "gpt2": (GPT, (False, 1.0, None)),
    "opt": ({**SMALL, "ffn_dim": 40, "word_embed_proj_dim": 16}, (False, 1.0, None)),
}


def make_model(model_type, seed=0, **changes):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**ARCHITECTURES[model_type][0], **changes})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def head_form(head):
    return head.bias is not None, head.scale, head.softcap


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_head_of_an_architecture(model_type):
    teacher, student = make_model(model_type), subquad.linearize(make_model(model_type, seed=1), "linear_attention")
    heads = [read_head(teacher), read_head(student)]
    assert [head_form(head) for head in heads] == [ARCHITECTURES[model_type][1]] * 2
    assert heads[1].weight is student.get_output_embeddings().weight
    tokens = torch.randint(3, 61, (2, 16))
    labels = torch.randint(61, (2, 16)).flatten()
    learning = [p for p in student.parameters() if p.requires_grad]
    with torch.no_grad():
        logits = teacher(tokens).logits.flatten(0, 1)
        teacher_hidden = teacher.base_model(tokens).last_hidden_state.flatten(0, 1)
    expected = on_logits(student(tokens).logits.flatten(0, 1), logits, labels)
    hidden = student.last_hidden_state(tokens).flatten(0, 1)
    found = fused_distillation_loss(hidden, teacher_hidden, labels, heads[1], heads[0], LossOptions(), chunk=10)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(x[0], learning, allow_unused=True) for x in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_head_in_another_dtype(dtype):
    assert head_form(read_head(make_model("gemma2").to(dtype))) == ARCHITECTURES["gemma2"][1]


class OtherHead(nn.Linear):
    """A head that is not a `Head`."""

    def __init__(self, base, kind):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight, self.kind = base.weight, kind
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x):
        if self.kind == "scale":
            return 2 * super().forward(x)
        if self.kind == "softcap":
            return 30 * torch.tanh(super().forward(x) / 30)
        if self.kind == "learned scale":
            return self.factor * super().forward(x)
        return super().forward(nn.functional.dropout(x, 0.1, self.training))


@pytest.mark.parametrize("kind", ["scale", "softcap", "learned scale", "dropout"])
def test_head_of_another_form_is_not_read(kind):
    for model in (make_model("llama"), subquad.linearize(make_model("llama"), "linear_attention")):
        assert read_head(model) is not None
        model.set_output_embeddings(OtherHead(model.get_output_embeddings(), kind))
        assert read_head(model) is None


def test_head_with_further_layers_is_not_read():
    sizes = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}
    assert read_head(BertLMHeadModel(BertConfig(**sizes, is_decoder=True)).eval()) is None


def test_head_that_contradicts_the_configuration_is_not_read():
    model = make_model("gemma2")
    model.config.final_logit_softcapping = 4.0
    forward = model.forward
    model.forward = lambda *args, **kwargs: _halved(forward(*args, **kwargs))
    assert read_head(model) is None


def _halved(output):
    output.logits = output.logits / 2
    return output


def test_low_rank_update_of_the_head_is_not_read():
    """Low-rank updates of projections have no effect on the head; those of the head do, even while they are zero."""
    peft = pytest.importorskip("peft")
    for targets, read in ((["q_proj"], True), (["lm_head"], False)):
        model = make_model("llama", tie_word_embeddings=False)
        model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets), model)
        assert (read_head(model) is not None) == read


def test_read_head_restores_the_model():
    model = subquad.linearize(make_model("gpt2", resid_pdrop=0.1), "gla")
    model.base.transformer.h[0].train()
    model.get_output_embeddings().weight.requires_grad_(False)

    def state():
        modes = [m.training for m in model.modules()]
        return modes, [p.requires_grad for p in model.parameters()], torch.get_rng_state().tolist()

    before = state()
    assert read_head(model) is not None
    assert state() == before
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


# ---------------------------------------------------------------------- memory


@pytest.mark.slow
@pytest.mark.sample
def test_fused_loss_needs_a_quarter_of_the_memory():
    """SmolLM2-135M's head on 4,096 tokens, each loss in its own process."""

    def peak(way):
        command = [sys.executable, "-m", "benchmarks.loss", "--peak", way]
        root = Path(__file__).parents[2]
        return int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout)

    assert peak("fused") <= peak("straightforward") / 4
