"""Text that people write stays text: in a chat message nothing is read as a control token or an audio placeholder.

A chat template joins its own control tokens and people's words to one string, and the tokenizer cannot tell the two
apart: a transcript that contains `<|im_end|>` would end its turn. So words are marked before they go into the template:
MARK follows every character with which a control token could begin. The tokenizer looks for control tokens first, in
the text as it is, and finds none where there are marks; its normaliser then takes the marks out, so that the token ids
are those of the same text in a tokenizer without control tokens.
"""

import json
import re

from tokenizers import AddedToken, normalizers

MARK = "\ufdd0"  # a noncharacter: Unicode keeps it for such use, no text has it


def is_control(token) -> bool:
    """Whether an added token has a meaning of its own; runs of spaces, which some LLMs add, have none."""
    return bool(token.content.strip())


def whole_characters(text: str) -> str:
    """Text that can be written: halves of characters (lone surrogates, as JSON and file names may have) become
    U+FFFD."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def forget_marks(tokenizer) -> None:
    """Make a fast tokenizer drop MARK after it has looked for control tokens. Saved with it; once is enough."""
    backend = tokenizer.backend_tokenizer
    # Those that are looked for in the normalised text would be found when the marks are gone.
    late = [token for token in tokenizer.added_tokens_decoder.values() if is_control(token) and token.normalized]
    for token in late:
        options = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "special")}
        add = backend.add_special_tokens if token.special else backend.add_tokens
        add([AddedToken(token.content, normalized=False, **options)])
    own = json.loads(backend.to_str())["normalizer"]
    if MARK in json.dumps(own, ensure_ascii=False):
        return
    drop = normalizers.Replace(MARK, "")
    backend.normalizer = drop if own is None else normalizers.Sequence([drop, backend.normalizer])


def marker(tokenizer):
    """A function that marks all strings in a text, list or dict of what people wrote; it returns a copy."""
    first = {token.content[0] for token in tokenizer.added_tokens_decoder.values() if is_control(token)}
    pattern = re.compile("|".join(map(re.escape, sorted(first))) or "(?!)")

    def mark(value):
        if isinstance(value, str):
            return pattern.sub(lambda match: match[0] + MARK, whole_characters(value))
        if isinstance(value, (list, tuple)):
            return [mark(part) for part in value]
        return {key: mark(part) for key, part in value.items()} if isinstance(value, dict) else value

    return mark
