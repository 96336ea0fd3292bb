"""Conversations: the chat template, which tokens are in the loss, and errors."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from subquad.config import Data, MixtureSource, load_recipe
from subquad.data import check_data, documents, token_rows
from subquad.data.chat import Conversation
from subquad.data.encoding import LOSS_IGNORED, TOKEN_MASK, Encoder
from subquad.utils import UserError
from tests.helpers.token_rows import in_file_order

TURN = "{{ '<|im_start|>' + m['role'] + '\n' }}"
LOOP = "{% for m in messages %}BODY{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = LOOP.replace("BODY", TURN + "{{ m['content'] + '<|im_end|>\n' }}") + PROMPT
MARKED = LOOP.replace(
    "BODY",
    TURN + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
) + PROMPT  # fmt: skip
PLAIN = LOOP.replace("BODY", "{{ m['role'] + ': ' + m['content'] | trim + '\n\n' }}") + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
FORGETFUL = LOOP.replace("BODY", "{{ m['role'] }}: {{ m['content'] if loop.last else m['content'][:1] }}|")
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user must begin') }}{% endif %}" + CHATML

TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello <b>"},
    {"role": "user", "content": "and?\n"},
    {"role": "assistant", "content": " bye\n"},
]


@pytest.fixture
def chat_tokenizer(make_tokenizer):
    def make(template: str | None):
        tokenizer = make_tokenizer(
            eos_token="<|im_end|>", bos_token="<|im_start|>", additional_special_tokens=["<|endoftext|>"]
        )
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def chat_data(tmp_path):
    """Data of conversations, with the same ones for validation."""

    def write(*conversations, name: str = "a.jsonl", **settings) -> Data:
        path = tmp_path / name
        path.write_text("\n".join(json.dumps({"messages": c}) for c in conversations))
        return Data(**{"source": str(path), "validation": str(path), "seq_len": 8, "chat": True, **settings})

    return write


def texts_of(tokenizer, *conversations, assistant_only_loss=True) -> tuple[str, str]:
    """The text of all tokens, and of those in the loss."""
    found = Encoder(tokenizer, assistant_only_loss).encode(
        [Conversation.from_messages(c, "here") for c in conversations]
    )
    counted = found[(found & LOSS_IGNORED) == 0]
    return tokenizer.decode((found & TOKEN_MASK).tolist()), tokenizer.decode((counted & TOKEN_MASK).tolist())


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["split", "marked"])
def test_assistant_turns_are_in_the_loss_with_their_end_tokens(chat_tokenizer, template):
    tokenizer = chat_tokenizer(template)
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert texts_of(tokenizer, TALK) == (text, "hello <b><|im_end|> bye\n<|im_end|>")
    assert texts_of(tokenizer, TALK, assistant_only_loss=False) == (text, text)
    assert (
        texts_of(tokenizer, TALK, TALK[1:3], TALK[1:2])
        == (  # the third has no assistant
            text + tokenizer.apply_chat_template(TALK[1:3], tokenize=False),
            "hello <b><|im_end|> bye\n<|im_end|>hello <b><|im_end|>",
        )
    )
    assert texts_of(tokenizer, TALK[2:3])[1] == "hello <b><|im_end|>"


def test_template_without_an_end_token(chat_tokenizer):
    text, counted = texts_of(chat_tokenizer(PLAIN), TALK)
    assert text == "system: be kind\n\nuser: hi\n\nassistant: hello <b>\n\nuser: and?\n\nassistant: bye\n\n"
    assert counted == "hello <b>\n\nbye\n\n"


def test_template_without_recoverable_spans_raises(chat_tokenizer):
    with pytest.raises(UserError, match=r"^here: message 3: .*assistant_only_loss: false"):
        texts_of(chat_tokenizer(FORGETFUL), TALK)
    assert texts_of(chat_tokenizer(FORGETFUL), TALK, assistant_only_loss=False)[0].startswith("system: b|user: h|")


def test_template_that_drops_the_reasoning_of_earlier_turns(chat_tokenizer):
    content = (
        "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n\n</think>' + m['content'] }}"
        "{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}"
    )
    tokenizer = chat_tokenizer(LOOP.replace("BODY", TURN + content + "{{ '<|im_end|>\n' }}") + PROMPT)
    talk = [*TALK[:2], {"role": "assistant", "content": "<think>hm</think>hello"}, *TALK[3:]]
    text, counted = texts_of(tokenizer, talk)
    assert "hm" not in text
    assert counted == "hello<|im_end|><think>\n\n</think> bye\n<|im_end|>"


def test_template_errors_name_the_location(chat_tokenizer):
    for assistant_only_loss in (False, True):
        with pytest.raises(UserError, match=r"^here: the chat template .*\(the user must begin\)$"):
            texts_of(chat_tokenizer(STRICT), TALK, assistant_only_loss=assistant_only_loss)


def test_tokens_across_the_boundary_of_a_turn(make_tokenizer):
    # A token that begins in the prompt and ends in the answer is in the loss, as in transformers.
    tokenizer = make_tokenizer(eos_token="</s>")
    tokenizer.add_tokens([": h"])
    tokenizer.chat_template = PLAIN
    assert texts_of(tokenizer, TALK[1:3])[1] == ": hello <b>\n\n"


# ---------------------------------------------------------------------- rows


def test_rows_of_conversations(chat_data, chat_tokenizer):
    tokenizer = chat_tokenizer(CHATML)
    data = chat_data(TALK, TALK[1:3], seq_len=16, assistant_only_loss=True)
    rows = token_rows(data, tokenizer, "train")
    found = in_file_order(rows)
    ids, positions, labels = (found[key].tolist() for key in ("input_ids", "position_ids", "labels"))
    whole = [tokenizer.apply_chat_template(c, tokenize=False) for c in (TALK, TALK[1:3])]
    assert tokenizer.decode(ids) == "".join(whole)[: len(tokenizer.decode(ids))]
    second = len(tokenizer(whole[0], add_special_tokens=False)["input_ids"])
    expected = [i % 16 for i in range(len(ids))]
    for i in range(second, min(len(ids), (second // 16 + 1) * 16)):
        expected[i] = i - second
    assert positions == expected
    assert tokenizer.decode([label for label in labels if label != -100]).startswith("hello <b><|im_end|> bye\n")
    assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))


def test_labels_of_whole_conversations(chat_data, chat_tokenizer):
    tokenizer = chat_tokenizer(CHATML)
    for document_masking in (True, False):
        rows = token_rows(chat_data(*[TALK[1:3]] * 20, document_masking=document_masking), tokenizer, "train")
        for row in rows:
            starts = row["input_ids"] == tokenizer.bos_token_id
            assert ("position_ids" in row) == document_masking
            first = starts & (row.get("position_ids", torch.ones(8)) == 0)
            assert torch.equal(row["labels"] == -100, first & torch.tensor(document_masking) & starts)


def test_template_and_loss_are_in_the_cache_key(chat_data, chat_tokenizer, cache):
    data = chat_data(TALK)
    token_rows(data, chat_tokenizer(CHATML), "train")
    token_rows(data, chat_tokenizer(CHATML), "validation")
    assert len(cache()) == 1
    token_rows(data, chat_tokenizer(PLAIN), "train")
    token_rows(data.model_copy(update={"assistant_only_loss": True}), chat_tokenizer(CHATML), "train")
    assert len(cache()) == 3


def test_mixture_of_text_and_conversations(chat_data, chat_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("plain text " * 20)
    chat = chat_data(*[TALK] * 4)
    mixture = {str(tmp_path / "a.txt"): MixtureSource(), chat.source: MixtureSource()}
    rows = token_rows(chat.model_copy(update={"source": mixture}), chat_tokenizer(CHATML), "train")
    assert all(set(row) == {"input_ids", "position_ids", "labels"} for row in rows)


def test_split_keeps_conversations_whole(chat_data):
    some = chat_data(*[[{"role": "user", "content": f"talk {i} " * (i % 7 + 1)}] for i in range(30)]).source
    train, valid = (list(documents(some, split, column="messages", chat=True)) for split in ("train", "validation"))
    assert train + valid == list(documents(some, "all", column="messages", chat=True))
    assert 1 <= len(valid) <= 3
    many = chat_data(*[[{"role": "user", "content": f"talk {i}"}] for i in range(1000)]).source
    train, valid = (list(documents(many, split, column="messages", chat=True)) for split in ("train", "validation"))
    assert len(train) + len(valid) == 1000
    assert 20 < len(valid) < 90
    two = chat_data(TALK, TALK[:2]).source
    counts = [len(list(documents(two, split, column="messages", chat=True))) for split in ("train", "validation")]
    assert counts == [1, 1]


# ---------------------------------------------------------------------- in a recipe


def test_column_messages_implies_chat_and_vice_versa():
    assert Data(source="x", column="messages").chat
    assert Data(source="x", chat=True).column == "messages"
    assert (Data(source="x").chat, Data(source="x").column) == (False, "text")
    named = Data(source="x", chat=True, column="talk")
    assert (named.chat, named.column) == (True, "talk")
    assert not Data(source="x", column="messages", chat=False).chat


def test_chat_keys_of_a_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("teacher: nano\ndata: {source: a.txt}\nstages: {hidden: {tokens: 1000, lr: 1e-3}}\n")
    recipe = load_recipe(path, ["data.chat=true", "data.assistant_only_loss=true"])
    assert recipe.data.column == "messages"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe
    path.write_text("teacher: nano\ndata: {source: a.txt}\nstages: {hidden: {tokens: 1000, lr: 1e-3}}\n")
    for change, expected in [
        ("data.assistant_only_loss=true", "data.assistant_only_loss: got true without chat"),
        ("data.assistant_only_loss=user", "data.assistant_only_loss: got 'user', expected true or false"),
        ("data.document_masking=apart", "data.document_masking: got 'apart', expected true or false"),
        ("data.chat=yes", "data.chat: got 'yes', expected true or false"),
        ("data.colum=x", "unknown key 'data.colum'; did you mean 'data.column'?"),
    ]:
        with pytest.raises(UserError) as caught:
            load_recipe(path, [change])
        assert expected in str(caught.value)


def test_tokenizer_without_a_template_raises(chat_data, chat_tokenizer):
    with pytest.raises(UserError, match=r"^data.chat: .*chat template"):
        token_rows(chat_data(TALK), chat_tokenizer(None), "train")


def test_chat_of_a_text_file_raises(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"^data.chat: .*a.txt', expected .jsonl or .parquet"):
        check_data(Data(source=str(tmp_path / "a.txt"), chat=True))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"message": []}, "a.jsonl:2: got the keys ['message'], expected an object with the key 'messages'"),
        ({"messages": "hi"}, "a.jsonl:2: got str, expected a list of messages"),
        ({"messages": None}, "a.jsonl:2: got NoneType, expected a list of messages"),
        ({"messages": ["hi"]}, "message 1: got str, expected an object with 'role' and 'content'"),
        (
            {"messages": [TALK[0], {"content": "x"}]},
            "a.jsonl:2: message 2: got the keys ['content'], expected the key 'role'",
        ),
        ({"messages": [{"role": "user"}]}, "a.jsonl:2: message 1: got the keys ['role'], expected the key 'content'"),
        (
            {"messages": [{"role": None, "content": "x"}]},
            "message 1: got the keys ['content'], expected the key 'role'",
        ),
        ({"messages": [{"role": 1, "content": "x"}]}, "message 1: role: got int, expected text"),
        ({"messages": [{"role": "user", "content": [1]}]}, "message 1: content: got list, expected text"),
    ],
)
def test_invalid_records_name_file_and_line(tmp_path, record, expected):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n" + json.dumps(record))
    with pytest.raises(UserError) as caught:
        list(documents(str(path), "all", column="messages", chat=True))
    assert expected in str(caught.value)


def test_check_data_finds_an_invalid_first_record(tmp_path):
    Path(tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user"}]}')
    with pytest.raises(UserError, match=r"a.jsonl:1: message 1: .*'content'"):
        check_data(Data(source=str(tmp_path / "a.jsonl"), chat=True))
    pyarrow.parquet.write_table(pyarrow.table({"messages": [[{"role": "user"}]]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: row 1: message 1: .*'content'"):
        check_data(Data(source=str(tmp_path / "a.parquet"), column="messages"))


def test_tool_calls_need_no_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert Conversation.from_messages([call], "x").messages == ({**call, "content": ""},)
