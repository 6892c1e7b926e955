"""Transcripts as targets of the alignment (CTC) loss.

CTC must emit a token within the few frames in which it is heard, so whole words as single tokens, as an LLM's tokenizer
makes them, are hard targets: rare, and without any trace of their spelling. A BPE tokenizer's merges are ordered by how
early they were learned, so keeping only the first N of them gives shorter units *with the ids of the same LLM*, whose
embeddings remain usable.
"""

import hashlib
import itertools
import json
import string
import unicodedata

from tokenizers import Tokenizer

CASES = ("lower", "keep")
BATCH = 1000  # texts that are spelled at once
# What "lower" makes of ASCII, by character.
PLAIN_ASCII = {code: c.lower() if (c := chr(code)).isalnum() or c == "'" else " " for code in range(128)}


def normalise_transcript(text: str, case: str = "lower") -> str:
    """The form of a transcript that is trained on.

    "lower": lower case, only letters (of any script) with their marks, digits and apostrophes between single spaces (an
    emoji's variation selector is a mark without a letter, and no word). "keep": as written,
    with spaces collapsed. Corpora differ (LibriSpeech is upper case without punctuation); in a mixture of them as they
    are, the model would have to guess the corpus.
    """

    def is_mark(character: str) -> bool:
        return unicodedata.category(character)[0] == "M"

    if case not in CASES:
        raise ValueError(f"text case {case!r} is not one of {', '.join(CASES)}.")
    if case == "lower":
        if text.isascii():  # most of a large corpus
            return " ".join(text.translate(PLAIN_ASCII).split())
        text = unicodedata.normalize("NFC", text).lower().replace("’", "'")
        text = "".join(c if unicodedata.category(c)[0] in "LMN" or c == "'" else " " for c in text)
        text = "".join(c for before, c in itertools.pairwise(" " + text) if before != " " or not is_mark(c))
    return " ".join(text.split())


class AlignmentTokenizer:
    """Transcript ↔ ids of the LLM's vocabulary, in short units.

    Args:
        tokenizer: the LLM's (fast) tokenizer.
        merges: number of BPE merges kept; None = the LLM's own tokenisation.
    """

    def __init__(self, tokenizer, merges: int | None = None):
        self.tokenizer = tokenizer
        self.merges = merges
        specification = json.loads(tokenizer.backend_tokenizer.to_str())
        if merges is not None:
            model = specification["model"]
            if model["type"] != "BPE":
                raise ValueError(
                    f"alignment merges={merges}: the LLM's tokenizer is {model['type']}, only a BPE can be "
                    "truncated. Set it to null."
                )
            if merges < 0:
                raise ValueError(
                    f"alignment merges={merges}: must be 0 or more, or null for the LLM's own tokenisation."
                )
            # With ignore_merges a word that is in the vocabulary would be taken whole, whatever merges are left.
            model["ignore_merges"] = False
            model["merges"] = model["merges"][:merges]
        specification["truncation"] = specification["padding"] = None
        for token in specification["added_tokens"]:  # a transcript has words only, whatever they look like
            token["special"] = token["special"] or bool(token["content"].strip())
        told = json.dumps(specification)
        self.made_of = hashlib.sha256(told.encode()).hexdigest()  # equal for tokenizers that do the same
        self._units = Tokenizer.from_str(told)
        if specification["model"]["type"] == "BPE":
            specification["model"] |= {"merges": [], "ignore_merges": False}
        self._letters = Tokenizer.from_str(json.dumps(specification))
        self._units.encode_special_tokens = self._letters.encode_special_tokens = True
        # Llama 2's family puts a space before every text itself, and would make a word of one more.
        self._space = "" if self._units.encode("a", add_special_tokens=False).tokens[0].startswith("▁") else " "

    def encode(self, text: str) -> list[int]:
        """Ids of a transcript, its first word with a leading space as in running text. Empty for a blank one."""
        text = text.strip()
        return self._units.encode(self._space + text, add_special_tokens=False).ids if text else []

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens dropped."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def vocab(self, texts) -> list[int]:
        """Sorted ids that occur in `texts`, and those by which any word in their scripts can be spelled: of a-z and
        their own characters as such, of these' neighbours in Unicode without merges (that is, mostly as bytes)."""
        ids, letters, texts = set(), set(string.ascii_lowercase + "'"), filter(None, map(str.strip, texts))
        while part := [self._space + text for text in itertools.islice(texts, BATCH)]:
            for encoding in self._units.encode_batch_fast(part, add_special_tokens=False):  # on all cores
                ids.update(encoding.ids)
            letters.update(*(text.replace(" ", "") for text in part))
        for letter in letters:
            ids.update(self.encode(letter))
            ids.update(self._units.encode(letter, add_special_tokens=False).ids)
        # Characters that differ in the last byte of UTF-8 alone: of an alphabet all, of Chinese what looks alike.
        near = {chr(ord(letter) // 64 * 64 + place) for letter in letters for place in range(64)}
        if not any(letter.isupper() for letter in letters):
            near = {letter for letter in near if not letter.isupper()}
        for letter in letters | {letter for letter in near if unicodedata.category(letter)[0] in "LMN"}:
            ids.update(self._letters.encode(letter, add_special_tokens=False).ids)
        return sorted(ids)
