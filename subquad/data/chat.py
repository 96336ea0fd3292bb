"""Conversations: what one is, and how a teacher's chat template writes it down, with the assistant's share marked.

Free of torch: the processes that tokenise import it.
"""

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from subquad.utils import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
ASSISTANT = "assistant"
SENTINEL = "what-nobody-says-7d1f"

Span = tuple[int, int]


@dataclass(frozen=True)
class Conversation:
    """Messages, each a dict with `role`, `content` and whatever else a template reads; `where` is for errors."""

    messages: tuple[dict[str, Any], ...]
    where: str

    @classmethod
    def create(cls, value: Any, where: str) -> "Conversation":
        """A conversation from the cell of a table; UserError says where and what is no conversation in it."""
        if not isinstance(value, list):
            raise UserError(f"{where}: no conversation; expected a list of messages, found {type(value).__name__}")
        messages = []
        for number, message in enumerate(value, start=1):
            if not isinstance(message, dict):
                found = type(message).__name__
                raise UserError(
                    f"{where}: message {number}: expected an object with 'role' and 'content', found {found}"
                )
            # Tables have every key in every row.
            given = {key: item for key, item in message.items() if item is not None}
            for key in ("role", "content"):
                if key not in given and not (key == "content" and "tool_calls" in given):
                    found = ", ".join(map(repr, given)) or "nothing"
                    raise UserError(f"{where}: message {number}: no {key!r}; found {found}")
                if not isinstance(given.setdefault(key, ""), str):
                    raise UserError(f"{where}: message {number}: {key!r} is {type(given[key]).__name__}, expected text")
            messages.append({k: _whole_characters(v) if isinstance(v, str) else v for k, v in given.items()})
        return cls(tuple(messages), where)

    def __len__(self) -> int:
        return sum(len(message["content"]) for message in self.messages)

    @property
    def has_assistant(self) -> bool:
        return any(message["role"] == ASSISTANT for message in self.messages)

    def text(self) -> str:
        """The same for the same messages, whatever file they stand in."""
        return json.dumps(self.messages, sort_keys=True)


def _whole_characters(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def check_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """UserError where a tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise UserError(
            "a corpus of conversations needs a teacher with a chat template, and this tokenizer has none; "
            "expected an instruct model, or a corpus of text"
        )


class Template:
    """A tokenizer's chat template: conversations to text."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer

    def render(self, conversation: Conversation) -> str:
        return self._render(conversation.messages, conversation.where)

    @functools.cached_property
    def marks_assistant(self) -> bool:
        """Whether the template says itself, by `{% generation %}`, what the assistant writes."""
        return GENERATION.search(self.tokenizer.get_chat_template()) is not None

    def marked(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Tokens and whether each is the assistant's, by a template that marks them."""
        with _refusals_named(conversation.where):
            out: Any = self.tokenizer.apply_chat_template(
                list(conversation.messages), return_dict=True, return_assistant_tokens_mask=True
            )
        return out["input_ids"], [bool(mark) for mark in out["assistant_masks"]]

    def assistant_spans(self, conversation: Conversation, text: str) -> list[Span]:
        """Where in `text`, the rendered conversation, the assistant writes, each turn with the token that ends it.

        Raises:
            UserError: a template in which they cannot be told.
        """
        spans = []
        for i, message in enumerate(conversation.messages):
            if message["role"] != ASSISTANT:
                continue
            span = self._by_prefixes(conversation, i, text) or self._by_exchange(conversation, i, text)
            if span is None:
                raise UserError(
                    f"{conversation.where}: the chat template can't be split into turns: message {i + 1} is written "
                    "otherwise in the whole conversation; expected a template with {% generation %}, or "
                    "assistant_only_loss: false"
                )
            spans.append(span)
        return spans

    def _by_prefixes(self, conversation: Conversation, i: int, text: str) -> Span | None:
        """What the conversation up to turn i has more than the one before it with the prompt for an answer; None where
        the whole does not begin with both."""
        messages, where = conversation.messages, conversation.where
        after = self._render(messages[: i + 1], where)
        if i:
            before = self._render(messages[:i], where, prompt=True)
        else:  # no template writes nothing at all
            prompt = self._render(messages[:1], where, prompt=True).removeprefix(after)
            before = prompt if after.startswith(prompt) else ""
        if not (text.startswith(after) and after.startswith(before)):
            return None
        # Not the blank space that only sets the next turn off from the token that ends this one.
        stripped = after[len(before) :].rstrip()
        closed = any(stripped.endswith(token) for token in self._special)
        return len(before), len(before) + len(stripped) if closed else len(after)

    def _by_exchange(self, conversation: Conversation, i: int, text: str) -> Span | None:
        """What changes where turn i says something else, with the token that ends it: for templates that leave out
        of earlier turns what the last one keeps, its reasoning; None where more changes than that."""
        messages, content = conversation.messages, conversation.messages[i]["content"]
        exchanged = (*messages[:i], {**messages[i], "content": SENTINEL}, *messages[i + 1 :])
        before, found, after = self._render(exchanged, conversation.where).partition(SENTINEL)
        start, end = len(before), len(text) - len(after)
        if not (found and start <= end and text.startswith(before) and text.endswith(after)):
            return None
        ending = next((token for token in self._special if after.startswith(token)), "")
        return (start, end + len(ending)) if ending and text[start:end].strip() in content else None

    @functools.cached_property
    def _special(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return [token.content for token in added if token.special and token.content]

    def _render(self, messages: tuple[dict[str, Any], ...], where: str, prompt: bool = False) -> str:
        with _refusals_named(where):
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        return str(text)


@contextlib.contextmanager
def _refusals_named(where: str) -> Iterator[None]:
    """Templates refuse, in whatever way they like, conversations in which roles do not alternate and the like."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{where}: the chat template refuses this conversation ({error})") from None
