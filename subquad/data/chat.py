"""Conversations, and their rendering by a chat template with the assistant's turns marked.

Imports no torch, because the tokenizing processes import this module.
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
SENTINEL = "subquad-sentinel-7d1f"

Span = tuple[int, int]


@dataclass(frozen=True)
class Conversation:
    """Messages, each a dict with `role`, `content` and further keys that a template reads; `location` is the file and
    row, for errors."""

    messages: tuple[dict[str, Any], ...]
    location: str

    @classmethod
    def from_messages(cls, value: Any, location: str) -> "Conversation":
        """A conversation from a table's cell. Raises UserError if it is not a list of messages."""
        if not isinstance(value, list):
            raise UserError(f"{location}: got {type(value).__name__}, expected a list of messages")
        messages = []
        for number, message in enumerate(value, start=1):
            if not isinstance(message, dict):
                got = type(message).__name__
                raise UserError(
                    f"{location}: message {number}: got {got}, expected an object with 'role' and 'content'"
                )
            # Tables have every key in every row, null where a message lacks it.
            present = {key: item for key, item in message.items() if item is not None}
            for key in ("role", "content"):
                if key not in present and not (key == "content" and "tool_calls" in present):
                    raise UserError(
                        f"{location}: message {number}: got the keys {list(present)}, expected the key {key!r}"
                    )
                if not isinstance(present.setdefault(key, ""), str):
                    got = type(present[key]).__name__
                    raise UserError(f"{location}: message {number}: {key}: got {got}, expected text")
            messages.append({k: replace_surrogates(v) if isinstance(v, str) else v for k, v in present.items()})
        return cls(tuple(messages), location)

    def __len__(self) -> int:
        """Characters of all messages."""
        return sum(len(message["content"]) for message in self.messages)

    @property
    def has_assistant(self) -> bool:
        return any(message["role"] == ASSISTANT for message in self.messages)

    def text(self) -> str:
        """The messages as JSON, independent of the location."""
        return json.dumps(self.messages, sort_keys=True)


def replace_surrogates(text: str) -> str:
    """JSON can escape half a character, which no tokenizer accepts; it becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def check_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises UserError if the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise UserError(
            "data.chat: got true for a teacher without a chat template, expected an instruct model as the teacher, or "
            "plain text as data"
        )


class Template:
    """Renders conversations by a tokenizer's chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer

    def render(self, conversation: Conversation) -> str:
        return self._render(conversation.messages, conversation.location)

    @functools.cached_property
    def has_generation_tags(self) -> bool:
        """Whether the template marks the assistant's text by `{% generation %}`."""
        return GENERATION.search(self.tokenizer.get_chat_template()) is not None

    def tokenize_with_mask(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Token ids, and whether each is the assistant's, by a template with `{% generation %}`."""
        with _template_errors_as_user_error(conversation.location):
            out: Any = self.tokenizer.apply_chat_template(
                list(conversation.messages), return_dict=True, return_assistant_tokens_mask=True
            )
        return out["input_ids"], [bool(mark) for mark in out["assistant_masks"]]

    def assistant_spans(self, conversation: Conversation, text: str) -> list[Span]:
        """Character spans of the assistant's turns in the rendered conversation `text`, end-of-turn tokens included.

        Raises:
            UserError: the spans cannot be found, because the template renders a turn differently within a conversation.
        """
        spans = []
        for i, message in enumerate(conversation.messages):
            if message["role"] != ASSISTANT:
                continue
            span = self._span_by_prefix(conversation, i, text) or self._span_by_replacement(conversation, i, text)
            if span is None:
                raise UserError(
                    f"{conversation.location}: message {i + 1}: its span in the rendered conversation cannot be found; "
                    "expected a chat template with {% generation %}, or data.assistant_only_loss: false"
                )
            spans.append(span)
        return spans

    def _span_by_prefix(self, conversation: Conversation, i: int, text: str) -> Span | None:
        """The text that turn i adds to the preceding turns and the generation prompt; None if the rendered conversation
        does not begin with both."""
        messages, location = conversation.messages, conversation.location
        after = self._render(messages[: i + 1], location)
        if i:
            before = self._render(messages[:i], location, prompt=True)
        else:  # templates do not render an empty conversation
            prompt = self._render(messages[:1], location, prompt=True).removeprefix(after)
            before = prompt if after.startswith(prompt) else ""
        if not (text.startswith(after) and after.startswith(before)):
            return None
        # Exclude white space between the end-of-turn token and the next turn.
        stripped = after[len(before) :].rstrip()
        has_end_token = any(stripped.endswith(token) for token in self._special_tokens)
        return len(before), len(before) + len(stripped) if has_end_token else len(after)

    def _span_by_replacement(self, conversation: Conversation, i: int, text: str) -> Span | None:
        """The text that changes if the content of turn i is replaced, and its end-of-turn token; None if more changes.

        For templates that drop the reasoning of all turns but the last.
        """
        messages, content = conversation.messages, conversation.messages[i]["content"]
        replaced = (*messages[:i], {**messages[i], "content": SENTINEL}, *messages[i + 1 :])
        before, found, after = self._render(replaced, conversation.location).partition(SENTINEL)
        start, end = len(before), len(text) - len(after)
        if not (found and start <= end and text.startswith(before) and text.endswith(after)):
            return None
        ending = next((token for token in self._special_tokens if after.startswith(token)), "")
        return (start, end + len(ending)) if ending and text[start:end].strip() in content else None

    @functools.cached_property
    def _special_tokens(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return [token.content for token in added if token.special and token.content]

    def _render(self, messages: tuple[dict[str, Any], ...], location: str, prompt: bool = False) -> str:
        with _template_errors_as_user_error(location):
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        return str(text)


@contextlib.contextmanager
def _template_errors_as_user_error(location: str) -> Iterator[None]:
    """Templates raise errors of any class, for instance if roles do not alternate."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{location}: the chat template rejects this conversation ({error})") from None
