"""Chats → prompts: the one place where a prompt is built, for training, evaluation and inference alike.

A chat's way: `read_chat` (items are checked; contents become strings with a placeholder for each clip) → the LLM's chat
template (`Renderer`) → text, and where the assistant speaks in it. The template may be any LLM's: it only ever sees
strings, and need not say what the assistant writes (`{% generation %}`). Two rules hold whatever the template does:

- A chat that ends with the assistant's turn is the generation prompt of the turns before it, then the answer. So a
  model is trained on what it is given later, also where a template writes other things into a prompt than into a chat
  that is over (Qwen3's empty thoughts, Mistral's system message).
- What the assistant said is labelled up to its end-of-turn token: a model that never sees it never learns to stop.
"""

import base64
import os
import unicodedata
import zlib
from dataclasses import dataclass, field

from .plain_text import is_control

# What transformers' tokenizers and processors take as options; everything else is a variable of the template.
PROCESSOR_OPTIONS = frozenset(
    ("add_special_tokens", "max_length", "pad_to_multiple_of", "padding", "padding_side", "sampling_rate", "truncation")
)
NONCHARACTERS = [chr(code) for code in range(0xFDD1, 0xFDF0)]  # free for such use, as plain_text's MARK
MASK_NAMES = {
    "input_features": "input_features_mask",
    "input_values": "input_values_mask",
    "audio_hidden_states": "audio_hidden_mask",
}
HEARD = "heard_ids"  # of a clip that is only words: what the alignment would hear, see `AudioPhiProcessor.pad_audio`


@dataclass
class Chat:
    """messages: dicts whose contents are strings, people's words marked and a placeholder for each clip; clips: in
    their order, as `AudioPhiProcessor.__call__` takes them; asked: the last user turn's words, unmarked (None: there is
    no such turn); num_asked: how many clips it has."""

    messages: list[dict]
    clips: list = field(default_factory=list)
    asked: str | None = None
    num_asked: int = 0


def is_encoded(clip) -> bool:
    """Whether a clip is features already: a dict from `encode_audio`, cached encoder outputs, or simulated."""
    return isinstance(clip, dict) and any(key in clip for key in (*MASK_NAMES, HEARD))


def task_code(name: str) -> int:
    """A task's name as a number, the same for everybody."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def wording_key(text: str) -> str:
    """What two ways of writing the same words have in common: without case, punctuation and white space."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if unicodedata.category(c)[0] not in "PZC")


def split_batch(conversation) -> tuple[list, bool]:
    """A chat or a list of chats → (list of chats, whether a list was given)."""
    conversation = getattr(conversation, "messages", conversation)  # transformers' Chat
    if not isinstance(conversation, (list, tuple)):
        raise ValueError(f"a chat is a list of messages, not {type(conversation).__name__}.")
    if conversation and (isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")):
        return [getattr(chat, "messages", chat) for chat in conversation], True
    return [conversation], False


# ---- messages --------------------------------------------------------------------------------------------------------


def read_chat(conversation, audio_token: str, mark=lambda value: value) -> Chat:
    """Check a chat and make its contents strings. `mark` is applied to what people wrote.

    Raises ValueError naming turn and item for what is not understood: nothing is left out of a prompt silently.
    """
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ValueError("a chat needs at least one message.")
    chat = Chat([])
    for number, message in enumerate(conversation, start=1):
        message = message.model_dump() if hasattr(message, "model_dump") else message
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"turn {number}: a message is a dict with a role and a content, not {short(message)}.")
        place = f"turn {number} ({short(message['role'])})"
        rest = {key: mark(value) for key, value in message.items() if key != "content" and value is not None}
        if message["role"].isidentifier():
            rest["role"] = message["role"]  # templates compare it
        if message.get("content") is None and message.get("tool_calls"):  # as OpenAI writes calls of functions
            chat.messages.append(rest)
            continue
        parts, clips = read_content(message.get("content"), place)
        text = "".join(audio_token if part is None else mark(part) for part in parts)
        chat.messages.append({**rest, "content": text})
        chat.clips += clips
        if message["role"] == "user":
            chat.asked, chat.num_asked = " ".join(part for part in parts if part is not None), len(clips)
    return chat


def read_content(content, place: str) -> tuple[list[str | None], list]:
    """A message's content → (its texts in order, None where a clip is heard; the clips)."""
    if isinstance(content, str):
        return [content], []
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{place}: content is {short(content)}; expected a text or a list of items.")
    parts, clips = [], []
    for number, item in enumerate(content, start=1):
        clip, text = read_item(item, f"{place}, item {number}")
        parts.append(text)
        clips += [] if text is not None else [clip]
    return parts, clips


def read_item(item, place: str) -> tuple:
    """An item of a content → (clip, None) or (None, text)."""
    if not isinstance(item, dict):
        raise ValueError(f'{place}: {short(item)} is not an item. Write {{"type": "text", "text": …}}.')
    kind = item.get("type")
    if kind in ("text", "input_text"):
        if not isinstance(item.get("text"), str):
            raise ValueError(f"{place}: its text is {short(item.get('text'))}.")
        return None, item["text"]
    if kind == "audio":
        if "encoded" in item and not is_encoded(item["encoded"]):
            raise ValueError(f"{place}: its encoded has none of {', '.join((*MASK_NAMES, HEARD))}.")
        given = next((item[key] for key in ("encoded", "audio") if is_encoded(item.get(key))), None)
        return given or {key: value for key, value in item.items() if key != "type"}, None
    if kind == "input_audio":  # OpenAI
        data = item.get("input_audio")
        data = data.get("data") if isinstance(data, dict) else None
        if isinstance(data, str) and data.startswith("data:"):
            return {"url": data}, None
        try:
            return {"bytes": base64.b64decode("".join(data.split()), validate=True)}, None
        except (AttributeError, ValueError):
            raise ValueError(f"{place}: input_audio has no data in base64.") from None
    if kind == "audio_url":  # vLLM
        url = item.get("audio_url")
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str):
            raise ValueError(f"{place}: audio_url has no url.")
        return {"url": url}, None
    raise ValueError(
        f"{place}: type {short(kind)} is not understood; known are audio, text, input_audio, audio_url, input_text."
    )


def short(value) -> str:
    """A value as error messages show it."""
    text = repr(value) if isinstance(value, (str, int, float, type(None))) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "…"


# ---- templates -------------------------------------------------------------------------------------------------------


class Renderer:
    """One chat template with its variables: chats → text.

    Args:
        tokenizer: of the LLM.
        template: Jinja.
        variables: for the template, `tools` and `documents` too.
    """

    def __init__(self, tokenizer, template: str, variables: dict):
        self.tokenizer = tokenizer
        self.template = template
        self.variables = {"enable_thinking": False, **variables}
        controls = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if is_control(t)), key=len)
        self.controls = controls[::-1]  # of several that fit, the longest
        self.merges_system = None
        self.leads, self.ending = {}, ""

    def prompt(self, messages: list[dict]) -> str:
        """Text after which the assistant speaks."""
        return self._render(messages, add_generation_prompt=True)

    def whole(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """Text of a chat that was held, and where the assistant speaks in it: [(first, past the last character), …]."""
        text, spans, _ = self._anchored(messages)
        return text, spans

    def begun(self, messages: list[dict]) -> str:
        """Text of a chat whose last message is to be continued."""
        text, _, end = self._anchored(messages, last_too=True)
        return text[:end]

    def _anchored(self, messages, last_too=False) -> tuple[str, list[tuple[int, int]], int]:
        """(text, spans, where the words of the last message that was looked for end).

        What is looked for gets a pair of noncharacters around it, inside its outer white space, which some templates
        trim; when they are taken out again, the text is as it was.
        """
        # A turn that calls a function is no answer of the assistant's to learn.
        speaks = [message["role"] == "assistant" and not message.get("tool_calls") for message in messages]
        ends_with_answer, speaks[-1] = speaks[-1], speaks[-1] or last_too
        if not any(speaks):
            return self._render(messages), [], 0
        contents = [message["content"] for message, sought in zip(messages, speaks, strict=True) if sought]
        start, end = [mark for mark in NONCHARACTERS if not any(mark in content for content in contents)][:2]
        wrapped = [
            {**message, "content": wrap(message["content"], start, end)} if sought else message
            for message, sought in zip(messages, speaks, strict=True)
        ]
        text = marked = self._render(wrapped)
        plain = messages
        if ends_with_answer and len(messages) > 1:
            before, _, answer = text.rpartition(start)
            marked, plain = self.prompt(wrapped[:-1]), messages[:-1]
            text = marked + self._own_beginning(before, contents[-1]) + start + answer
        if unwrap(marked, start, end)[0] != self._render(plain, add_generation_prompt=plain is not messages):
            raise self._error("rewrites what the assistant said")
        text, places = unwrap(text, start, end)
        if [text[first:last] for first, last in places] != [content.strip() for content in contents]:
            raise self._error("leaves out or rewrites what the assistant said")
        spans = []
        for content, (first, last) in zip(contents, places, strict=True):
            first -= len(self._own_beginning(text[:first], content))
            space = content[len(content.rstrip()) :]
            last += len(space) if text.startswith(space, last) else 0
            past, text = self._close(text, last, ends_with_answer and len(spans) == len(contents) - 1)
            spans.append((first, past))
        return text, spans if speaks[-1] == ends_with_answer else spans[:-1], last

    def _close(self, text: str, position: int, is_last: bool) -> tuple[int, str]:
        """Where a turn ends whose words end at `position`, past its end-of-turn token, and the text, which gets an end
        token if the template writes nothing after the last turn."""
        behind = text[position:]
        spaces = len(behind) - len(behind.lstrip())
        for token in self.controls:
            if behind.startswith(token, spaces):
                return position + spaces + len(token), text
        self._lead("")
        if self.ending and behind.startswith(self.ending):  # no token of this vocabulary
            return position + len(self.ending), text
        if is_last:
            if self.tokenizer.eos_token is None:
                raise self._error("ends the assistant's turn with no token, and the tokenizer has no end token")
            text = text[:position] + self.tokenizer.eos_token + behind
            position += len(self.tokenizer.eos_token)
        return position, text

    def _own_beginning(self, before: str, content: str) -> str:
        """The end of `before`, the text up to an answer's words, that the assistant writes: nothing, or a space, or
        white space that `content` begins with."""
        space = content[: len(content) - len(content.lstrip())]
        return next((lead for lead in (self._lead(space), space) if before.endswith(lead)), "")

    def _lead(self, space: str) -> str:
        """What stands between the generation prompt and the words of an answer that begins with `space`."""
        if space not in self.leads:
            asked = [{"role": "user", "content": "a"}]
            start, end = NONCHARACTERS[:2]
            prompt = self._render(asked, add_generation_prompt=True)
            held = self._render([*asked, {"role": "assistant", "content": f"{space}{start}b{end}"}])
            before, _, behind = held.partition(start)
            self.ending = behind.partition(end)[2].rstrip()
            lead = before[len(os.path.commonprefix([prompt, before])) :]
            # The prompt may say other things than a chat that is over: those are no part of the answer.
            self.leads[space] = space if lead.strip() and not before.startswith(prompt) else lead
        return self.leads[space]

    def _render(self, messages, add_generation_prompt=False) -> str:
        """The template's text. System messages of templates that refuse or forget them go into the first user turn."""
        if messages and messages[0]["role"] == "system" and self._forgets_system():
            first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
            if first is not None:
                user = messages[first]
                content = f"{messages[0]['content']}\n\n{user['content']}"
                messages = [*messages[1:first], {**user, "content": content}, *messages[first + 1 :]]
        text = self._try(messages, add_generation_prompt)
        if isinstance(text, Exception):
            raise self._error(f"does not take this chat ({text})") from text
        return text

    def _forgets_system(self) -> bool:
        if self.merges_system is None:
            secret = "mlwqx"
            chat = [{"role": "system", "content": secret}, {"role": "user", "content": "a"}]
            text = self._try(chat, True)
            self.merges_system = isinstance(text, Exception) or secret not in text
        return self.merges_system

    def _try(self, messages, add_generation_prompt) -> str | Exception:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except Exception as error:  # whatever a template raises
            return error

    def _error(self, what: str) -> ValueError:
        name = self.tokenizer.name_or_path or "the language model"
        return ValueError(f"the chat template of {name} {what}. Choose another one with chat_template=….")


def wrap(content: str, start: str, end: str) -> str:
    """`content` with marks around it, inside its outer white space."""
    words = content.strip()
    space = content[: len(content) - len(content.lstrip())]
    return space + start + words + end + content[len(space) + len(words) :]


def unwrap(text: str, start: str, end: str) -> tuple[str, list[tuple[int, int]]]:
    """Take the marks out again → (text, where what they were around lies in it)."""
    first, *parts = text.split(start)
    whole, places = [first.replace(end, "")], []
    length = len(whole[0])
    for part in parts:
        inner, _, after = part.partition(end)
        places.append((length, length + len(inner)))
        whole += [inner, after.replace(end, "")]
        length += len(inner) + len(whole[-1])
    return "".join(whole), places
