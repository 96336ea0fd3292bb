"""Language modeling metrics against short references and known values."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import subquad
from subquad.evaluate import perplexity
from subquad.evaluate.efficiency import decode_speed
from subquad.evaluate.perplexity import (
    compare,
    language_results,
    prediction_sums,
    recovered_share,
    token_sums,
    unigram_loss,
)
from subquad.modeling.cache import cache_bytes
from tests.helpers.results import select_one


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3)).eval()


@pytest.fixture(scope="module")
def student(teacher):
    torch.manual_seed(0)
    return subquad.linearize(teacher, "gla")


def test_model_compared_with_itself(teacher):
    rows = [torch.randint(0, 50, (3, 20)), torch.randint(0, 50, (1, 20))]
    out = compare(teacher, teacher, rows)
    assert out["kl"] == pytest.approx(0, abs=1e-7)
    assert out["top1_agreement"] == 1
    assert out["perplexity"] == out["teacher_perplexity"]
    assert recovered_share(out["loss"], out["teacher_loss"], 10.0) == 1


def test_compare_equals_a_direct_computation(student, teacher):
    rows = [torch.randint(0, 50, (3, 20)), torch.randint(0, 50, (1, 20))]
    out = compare(student, teacher, rows)
    losses, kls, same = [], [], []
    with torch.no_grad():
        for batch in rows:
            for row in batch:
                q, p = (F.log_softmax(m(row[None]).logits[0].double(), -1) for m in (student, teacher))
                for t in range(19):
                    losses.append(-q[t, row[t + 1]].item())
                    kls.append((p[t].exp() * (p[t] - q[t])).sum().item())
                    same.append(q[t].argmax() == p[t].argmax())
    assert out["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    assert out["kl"] == pytest.approx(sum(kls) / len(kls), rel=1e-5)
    assert out["top1_agreement"] == pytest.approx(sum(map(float, same)) / len(same))
    assert out["kl"] > 0.01


@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_nan_logits_are_reported(student, teacher, broken):
    rows = [torch.randint(0, 50, (2, 20))]
    models = {"student": copy.deepcopy(student), "teacher": copy.deepcopy(teacher)}
    with torch.no_grad():
        models[broken].get_output_embeddings().weight[7] = math.nan
    out = compare(models["student"], models["teacher"], rows)
    assert {name for name, value in out.items() if math.isnan(value)} == {
        *("kl", "top1_agreement"),
        *(("loss", "perplexity") if broken == "student" else ("teacher_loss", "teacher_perplexity")),
    }
    results = language_results("text", token_sums(models["student"], models["teacher"], rows), unigram=10.0)
    for metric in ("kl", "top1_agreement", "top5_agreement", "recovered_share"):
        assert math.isnan(select_one(results, metric=metric).value), metric


def test_masked_vocabulary_adds_no_divergence():
    p, q = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2])
    expected = prediction_sums(q[:, :6], p[:, :6], labels)
    for logits in (p, q):
        logits[:, 6:] = -math.inf
    torch.testing.assert_close(prediction_sums(q, p, labels), expected)
    q[0, 3] = -math.inf  # a token that the teacher predicts
    assert prediction_sums(q, p, labels)[4] == math.inf


def test_kl_and_losses_match_torch_distributions(monkeypatch):
    monkeypatch.setattr(perplexity, "CPU_CHUNK_BYTES", 8 * 7 * 256)  # 256 tokens, so that there are three chunks
    p, q = torch.randn(2, 600, 7, generator=torch.Generator().manual_seed(0))
    target = torch.randint(7, (600,), generator=torch.Generator().manual_seed(1))
    P, Q = torch.distributions.Categorical(logits=p.double()), torch.distributions.Categorical(logits=q.double())
    _, loss, _, teacher_loss, kl, _, _ = prediction_sums(q, p, target).tolist()
    assert kl == pytest.approx(torch.distributions.kl_divergence(P, Q).sum().item())
    assert loss == pytest.approx(-Q.log_prob(target).sum().item())
    assert teacher_loss == pytest.approx(-P.log_prob(target).sum().item())


def test_language_results_of_teacher_and_untrained_student(student, teacher):
    rows = [torch.randint(0, 50, (6, 20), generator=torch.Generator().manual_seed(0))]
    itself, student = (language_results("text", token_sums(m, teacher, rows), unigram=10.0) for m in (teacher, student))
    for metric, expected in (("kl", 0), ("top1_agreement", 1), ("top5_agreement", 1), ("recovered_share", 1)):
        result = select_one(itself, metric=metric)
        assert result.value == result.low == result.high == expected, metric
        assert abs(select_one(student, metric=metric).value - expected) > 0.01, metric
    assert select_one(itself, metric="perplexity").n == 6 * 19
    result = select_one(student, metric="perplexity")
    assert result.low < result.value < result.high


def test_ignored_labels_and_documents(teacher):
    ids = torch.randint(0, 50, (2, 12))
    labels = ids.clone()
    labels[:, 5:8] = -100
    positions = torch.cat([torch.arange(6), torch.arange(6)]).expand(2, -1)
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    sums = token_sums(teacher, None, [batch])
    assert sums[:, 0].tolist() == [8, 8]
    # first document: tokens 1 to 4 are predicted; second: 8 to 11
    expected = []
    with torch.no_grad():
        for row in ids:
            for part, counted in ((row[:6], range(1, 5)), (row[6:], range(2, 6))):
                log_q = F.log_softmax(teacher(part[None]).logits[0].double(), -1)
                expected.append(-sum(log_q[t - 1, part[t]] for t in counted))
    assert sums[:, 1].sum().item() == pytest.approx(float(sum(expected)), rel=1e-5)


def test_bits_per_byte_count_the_predicted_text(nano):
    model, tokenizer = nano
    text = "def naïve(x):\n    return x\n"
    ids = torch.tensor([tokenizer(text).input_ids])
    sums = token_sums(model, None, [ids], tokenizer)
    first = len(tokenizer.decode(ids[0, :1]).encode())
    assert sums[0, 2] == len(text.encode()) - first
    bits = select_one(language_results("text", sums), metric="bits_per_byte").value
    loss = model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert bits == pytest.approx(loss / math.log(2) / (len(text.encode()) - first), rel=1e-5)


TEXT = "naïve 日本語 🙂🙃 na\n"
START = {"<unk>": 0, "<s>": 1}


def bytes_tokenizer():
    """As of GPT-2 and nano."""
    bpe = Tokenizer(models.BPE(vocab=START | {c: i for i, c in enumerate(ByteLevel.alphabet(), 2)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return bpe


def sentencepiece_tokenizer():
    """As of Llama 2: a space before the text, bytes for characters that are not in the vocabulary."""
    names = ["▁", *"naïve", "▁n", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = START | {name: i for i, name in enumerate(names, 2)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "n")], byte_fallback=True, unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return bpe


def characters_tokenizer():
    """Tokens are whole characters."""
    plain = Tokenizer(models.WordLevel(START | {c: i for i, c in enumerate(sorted(set(TEXT)), 2)}, unk_token="<unk>"))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return plain


@pytest.mark.parametrize("make", [bytes_tokenizer, sentencepiece_tokenizer, characters_tokenizer])
def test_rows_that_begin_and_end_within_characters_have_the_bytes_of_the_text(make):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(), bos_token="<s>", unk_token="<unk>")
    ids = torch.tensor([[1, *tokenizer(TEXT).input_ids]])
    assert 0 not in ids
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    for cut in range(2, ids.shape[1] - 1):
        rows = [ids[:, : cut + 1], ids[:, cut:]]
        assert token_sums(model, None, rows, tokenizer)[:, 2].sum() == len(TEXT.encode()), cut


def test_compare_restores_the_training_mode_and_refuses_no_batches(student, teacher):
    student = copy.deepcopy(student).train()
    compare(student, teacher, [torch.randint(0, 50, (1, 9))])
    assert student.training
    assert not teacher.training
    with pytest.raises(ValueError, match="batches"):
        compare(teacher, teacher, [])


def test_a_loss_whose_perplexity_exceeds_a_float(student, teacher):
    wrong = copy.deepcopy(student)
    with torch.no_grad():
        wrong.get_output_embeddings().weight.mul_(1e6)
    out = compare(wrong, teacher, [torch.randint(0, 50, (2, 20))])
    assert out["loss"] > 710
    assert out["perplexity"] == math.inf
    assert 1 < out["teacher_perplexity"] < math.inf


def test_unigram_loss_on_its_own_text_is_the_entropy():
    text = torch.tensor([[0, 1, 1, 2, 2, 2, 2, 2]] * 500)
    expected = -(math.log(1 / 8) * 0 + 2 / 7 * math.log(2 / 8) + 5 / 7 * math.log(5 / 8))
    assert unigram_loss([text], [text], 3) == pytest.approx(expected, abs=1e-2)
    # unseen tokens have a probability
    assert math.isfinite(unigram_loss([text], [torch.tensor([[0, 3]])], 4))


def test_state_bytes_of_a_mixer_are_constant(teacher):
    student = subquad.linearize(teacher, "gated_deltanet")
    sizes = [decode_speed(student, torch.randint(0, 50, (1, n)), tokens=4)["state_bytes"] for n in (5, 50)]
    heads, head_dim, width = 4, 8, 4
    per_layer = heads * head_dim * head_dim + 3 * (width - 1) * heads * head_dim
    assert sizes == [2 * per_layer * 4] * 2
    kept = [decode_speed(teacher, torch.randint(0, 50, (1, n)), tokens=4)["state_bytes"] for n in (5, 50)]
    assert kept == [2 * 2 * (n + 4) * 2 * 8 * 4 for n in (5, 50)]


def test_cache_bytes_of_a_teacher(teacher):
    cache = teacher(torch.randint(0, 50, (2, 7)), use_cache=True).past_key_values
    assert cache_bytes(cache) == 2 * 2 * 2 * 7 * 2 * 8 * 4
