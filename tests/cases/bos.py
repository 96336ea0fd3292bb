"""A teacher whose tokenizer puts a beginning-of-text token in front of every text (Gemma, Llama): what does a student
read in training, and what at generation and in lm-eval?"""

from common import *
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from subquad.config import Data
from subquad.data import token_rows

words = sorted(pre_tokenizers.ByteLevel.alphabet())


def tok(kind):
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, **{w: i + 3 for i, w in enumerate(words)}}
    b = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    b.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    b.decoder = decoders.ByteLevel()
    b.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=b, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


t = tok("gemma")
rows = token_rows(Data(source=str(TEXT), seq_len=128), t, "train", limit=65536)
all_ids = torch.stack([rows[i]["input_ids"] for i in range(len(rows))])
n = [int((all_ids == k).sum()) for k in (1, 2)]
report(
    "training rows hold the tokenizer's own beginning of text",
    n[1] > 0,
    f"of {all_ids.numel()} tokens: <eos> {n[0]}, <bos> {n[1]}",
)
print("      tokenizer('hi') =", t("hi").input_ids, "; this is what `subquad generate` and lm-eval feed")
print(
    "      rows of a document begin with:",
    sorted(
        {
            int(r["input_ids"][int(i)])
            for r in (rows[j] for j in range(20))
            for i in (r["position_ids"] == 0).nonzero().flatten()
            if int(i)
        }
    )
    or "(no document starts inside the first rows)",
)


def evaluation():
    from lm_eval.models.huggingface import HFLM

    m = tiny("gemma", vocab_size=len(t), head_dim=8)
    s = subquad.linearize(m, "gla")
    out = {}
    for name, model in (("teacher", m), ("student", s)):
        lm = HFLM(pretrained=model, tokenizer=tok("gemma"), batch_size=1, max_length=64)
        out[name] = lm.tok_encode("hi"), lm.add_bos_token
    from importlib.metadata import version

    assert out["teacher"][0] == out["student"][0], out
    return f"lm-eval {version('lm_eval')}: {out}"


attempt("lm-eval gives teacher (gemma) and student the same tokens", evaluation)
