"""Chats as others write them -> turns of one form.

    [{"role": "user", "content": "..." | [{"type": "audio", "path": ...}, {"type": "text", "text": ...}]}, ...]
        OpenAI's and transformers' messages
    [{"from": "human", "value": "<audio>..."}, {"from": "gpt", "value": "..."}]
        ShareGPT's conversations
    [{"role": "user", "content": "<audio>..."}, ...] and a column of audios
        LLaMA-Factory's and ms-swift's messages

A `<audio>` in the words of a user stands for the next clip of a row that has clips; in a row without it is text.
"""

import json
import re

from .example import AUDIO

MARK = "<audio>"
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip
TEXT_TYPES = ("text", "input_text", "output_text")


def chat_of(turns, audios: list) -> tuple[list[dict], list]:
    """(messages, audios): turns with contents as text, or as lists of `AUDIO` and text items for users, and the audio
    of all of them in order.

    `turns`: of any of the forms above, or JSON of one; `audios`: of the row's own columns. Raises ValueError for an
    unknown role, an answer without a question, and marks that are more or fewer than the clips.
    """
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except json.JSONDecodeError as error:
            raise ValueError(f"its chat is text, but no JSON ({error})") from error
    if not isinstance(turns, (list, tuple)) or not all(isinstance(turn, dict) for turn in turns) or not turns:
        raise ValueError(f"its chat is no list of turns: {turns!r:.80}")
    messages, own = [], []
    for number, turn in enumerate(turns, 1):
        role = turn.get("role", turn.get("from"))
        if role not in ROLES:
            raise ValueError(f"turn {number}: unknown role {role!r}; known: {', '.join(ROLES)}")
        content = turn.get("content", turn.get("value"))
        items = _items(content, number, own)
        if ROLES[role] != "user":
            if any(item["type"] == "audio" for item in items):
                raise ValueError(f"turn {number}: audio in a turn of the {ROLES[role]}; only users are heard")
            messages.append({"role": ROLES[role], "content": "".join(item["text"] for item in items)})
        else:
            messages.append({"role": "user", "content": items})
    roles = [message["role"] for message in messages]
    for before, role in zip([None, *roles], roles, strict=False):
        if role == "assistant" and before != "user":
            raise ValueError("an answer without a question: an assistant's turn does not follow a user's")
        if role == "system" and before is not None:
            raise ValueError("a system turn that is not the first")
    if "user" not in roles:
        raise ValueError("a chat without a user's turn")
    if own and audios:
        raise ValueError(f"{len(own)} clips in its turns and {len(audios)} in a column: name them once")
    if audios:
        messages = _placed(messages, len(audios))
    return messages, own or audios


def places_of(messages) -> int:
    """How many clips the turns of users have a place for, marks not counted."""
    users = [message["content"] for message in messages if message["role"] == "user"]
    return sum(item["type"] == "audio" for content in users for item in content)


def _items(content, number: int, own: list) -> list[dict]:
    """Content as `AUDIO` and text items; the audio that it names itself goes to `own`."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"turn {number}: its content is neither text nor a list: {content!r:.80}")
    items = []
    for item in content:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind in TEXT_TYPES:
            items.append({"type": "text", "text": item["text"]})
        elif kind in ("audio", "audio_url", "input_audio"):
            own_audio = _named(item)
            if own_audio is not None:
                own.append(own_audio)
            items.append(AUDIO)
        else:
            raise ValueError(f"turn {number}: an item of unknown type {kind!r}; known: text, audio, audio_url")
    return items


def _named(item: dict):
    """The audio that an item names; None for a mere place."""
    for key in ("audio", "path", "url", "audio_url", "file"):
        value = item.get(key)
        if isinstance(value, dict):
            value = value.get("url") or value.get("path") or (value if value.get("bytes") or "array" in value else None)
        if value is not None:
            return value
    if "bytes" in item or "array" in item:
        return {key: value for key, value in item.items() if key != "type"}
    return None


def _placed(messages: list[dict], clips: int) -> list[dict]:
    """Users' turns with `AUDIO` where they have marks. Without any the clips are what the first turn is about."""
    users = [message for message in messages if message["role"] == "user"]
    places = places_of(messages)
    marks = sum(item["text"].count(MARK) for m in users for item in m["content"] if item["type"] == "text")
    if not places and not marks:
        users[0]["content"] = [*([AUDIO] * clips), *users[0]["content"]]
        return messages
    if places + marks != clips:
        many = "more" if places + marks > clips else "fewer"
        raise ValueError(f"{places + marks} {MARK} marks, {many} than its {clips} clips")
    for message in users:
        message["content"] = [part for item in message["content"] for part in _split(item)]
    return messages


def _split(item: dict) -> list[dict]:
    if item["type"] == "audio":
        return [item]
    parts = re.split(f"({re.escape(MARK)})", item["text"])
    # A line break beside a mark only sets it apart.
    texts = [part if part == MARK else part.strip("\n") if len(parts) > 1 else part for part in parts]
    return [AUDIO if text == MARK else {"type": "text", "text": text} for text in texts if text]
