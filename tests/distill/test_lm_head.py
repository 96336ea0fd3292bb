"""The heads that are read off models."""

import pytest
import torch
import torch.nn as nn
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertLMHeadModel

import subquad
from subquad.config import EndToEndStage
from subquad.distill.distillation_loss import distillation_loss
from subquad.distill.lm_head import read_head

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
    learning, stage = [p for p in student.parameters() if p.requires_grad], EndToEndStage(tokens=1, lr=1.0)
    with torch.no_grad():
        logits = teacher(tokens).logits.flatten(0, 1)
        teacher_hidden = teacher.base_model(tokens).last_hidden_state.flatten(0, 1)
    expected = distillation_loss(student(tokens).logits.flatten(0, 1), logits, labels, None, None, stage)
    hidden = student.base_model(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)
    found = distillation_loss(hidden, teacher_hidden, labels, heads[1], heads[0], stage, chunk=10)
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
