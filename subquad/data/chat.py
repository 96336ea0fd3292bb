"""Conversations, and their rendering by a chat template with the assistant's turns marked."""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from subquad.utils import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
ASSISTANT = "assistant"
SENTINEL = "subquad-sentinel-7d1f"

Message = dict[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class Conversation:
    """Messages, each a dict with `role`, `content` and further keys that a template reads; `location` is the file and
    row, for errors."""

    messages: tuple[Message, ...]
    location: str

    @classmethod
    def from_messages(cls, value: Any, location: str) -> "Conversation":
        """A conversation from a table's cell. Raises UserError if it is not a list of messages."""
        if not isinstance(value, list):
            raise UserError(f"{location}: got {type(value).__name__}, expected a list of messages")
        return cls(tuple(_message(m, f"{location}: message {i}") for i, m in enumerate(value, start=1)), location)

    def __len__(self) -> int:
        """Characters of all messages."""
        return sum(len(message["content"]) for message in self.messages)

    def text(self) -> str:
        """The messages as JSON, independent of the location."""
        return json.dumps(self.messages, sort_keys=True)


def _message(value: Any, location: str) -> Message:
    if not isinstance(value, dict):
        raise UserError(f"{location}: got {type(value).__name__}, expected an object with 'role' and 'content'")
    # Tables have every key in every row, null where a message lacks it.
    message = {key: item for key, item in value.items() if item is not None}
    for key in ("role", "content"):
        if key not in message and not (key == "content" and "tool_calls" in message):
            raise UserError(f"{location}: got the keys {list(message)}, expected the key {key!r}")
        if not isinstance(message.setdefault(key, ""), str):
            raise UserError(f"{location}: {key}: got {type(message[key]).__name__}, expected text")
    return {key: replace_surrogates(item) if isinstance(item, str) else item for key, item in message.items()}


def replace_surrogates(text: str) -> str:
    """JSON can escape half a character, which no tokenizer accepts; it becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


class Template:
    """Renders conversations by a tokenizer's chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer

    def render(self, messages: Sequence[Message], location: str, **options: Any) -> Any:
        """The conversation as text, or whatever `apply_chat_template` returns with `options`.

        Raises:
            UserError: the template rejects the messages, for instance because roles do not alternate.
        """
        try:
            return self.tokenizer.apply_chat_template(list(messages), **{"tokenize": False, **options})
        except Exception as error:  # templates raise errors of any class
            raise UserError(f"{location}: the chat template rejects this conversation ({error})") from None

    @functools.cached_property
    def has_generation_tags(self) -> bool:
        """Whether the template marks the assistant's text by `{% generation %}`."""
        return GENERATION.search(self.tokenizer.get_chat_template()) is not None

    def tokenize_with_mask(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Token ids, and whether each is the assistant's, by a template with `{% generation %}`."""
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        out = self.render(conversation.messages, conversation.location, **options)
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
        after = self.render(messages[: i + 1], location)
        before = self.render(messages[: i or 1], location, add_generation_prompt=True)
        if i == 0:  # templates do not render an empty conversation: the prompt follows the first turn
            before = before.removeprefix(after)
            before = before if after.startswith(before) else ""
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
        before, found, after = self.render(replaced, conversation.location).partition(SENTINEL)
        start, end = len(before), len(text) - len(after)
        if not (found and start <= end and text.startswith(before) and text.endswith(after)):
            return None
        ending = next((token for token in self._special_tokens if after.startswith(token)), "")
        return (start, end + len(ending)) if ending and text[start:end].strip() in content else None

    @functools.cached_property
    def _special_tokens(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return [token.content for token in added if token.special and token.content]
