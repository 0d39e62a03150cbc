"""What a row holds as text, made one string: strings, lists of strings, conversations, several columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Chat = list[dict[str, Any]]
"""A conversation: messages with at least "role" and "content", as chat templates take them."""

_SHARED_ROLES = {"human": "user", "gpt": "assistant"}
"""What ShareGPT's files call a role ("from"), and what chat templates call it; the other names are the same."""


def text_of(value: Any) -> str | None:
    """The text in a row's ``value``; None: it is null.

    Of a list, however nested, the strings that are not null, joined by a line's end. Of a conversation the messages,
    each as "role: content".

    Raises:
        TypeError: it holds something else.
    """
    if value is None or isinstance(value, str):
        return value
    chat = chat_of(value)
    if chat is not None:
        return "\n".join(f"{message['role']}: {_content(message)}" for message in chat)
    if isinstance(value, list):
        texts = [text for text in _strings(value) if text is not None]
        return "\n".join(texts) if texts or not value else None
    raise TypeError(f"{type(value).__name__} is no text")


def join_texts(texts: Sequence[str | None]) -> str | None:
    """The texts of several columns, joined by a line's end; null and empty ones are left out. None: all are null."""
    if len(texts) == 1:
        return texts[0]
    there = [text for text in texts if text is not None]
    return "\n".join(filter(None, there)) if there else None


def chat_of(value: Any) -> Chat | None:
    """The conversation in a row's ``value``; None: it is none.

    It is a list of {"role", "content"} or of {"from", "value"}, or such lists side by side in one struct. What is null
    in a message is left out: Arrow gives each of them the keys of all.
    """
    if isinstance(value, Mapping):
        value = _side_by_side(value)
    if not isinstance(value, list) or not value:
        return None
    chat = [_message(message) for message in value]
    return None if None in chat else [message for message in chat if message is not None]


def _side_by_side(value: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """A struct of lists as a list of structs."""
    lists = [item for item in value.values() if isinstance(item, list)]
    if len(lists) != len(value) or len({len(item) for item in lists}) != 1:
        return None
    return [dict(zip(value, items, strict=True)) for items in zip(*lists, strict=True)]


def _message(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, Mapping):
        return None
    there = {key: item for key, item in value.items() if item is not None}
    if isinstance(there.get("role"), str) and "content" in value:
        return {**there, "content": there.get("content", "")}
    if isinstance(there.get("from"), str) and "value" in value:
        sender = there.pop("from")
        return {"role": _SHARED_ROLES.get(sender, sender), "content": there.pop("value", ""), **there}
    return None


def _content(message: Mapping[str, Any]) -> str:
    """The text of a message, whose content may be a list of parts."""
    content = message["content"]
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        return "\n".join(part["text"] for part in content if isinstance(part.get("text"), str))
    raise TypeError(f"{type(content).__name__} is no text")


def _strings(value: Any) -> Iterator[str | None]:
    if value is None or isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    else:
        raise TypeError(f"{type(value).__name__} is no text")
