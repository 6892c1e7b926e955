"""The text normalisers under which word and character error rates are counted, by language.

English (and where no language is said): Whisper's English one (Radford et al. 2022, appendix C): lower case, no
punctuation, no fillers such as "um", contractions spelled out, British to American spelling, number words to digits.
Other languages: its basic one, lower case without punctuation, but with the marks that Indic and other scripts write
vowels with. Taken from PyPI's `whisper-normalizer`: the copy in transformers lacks the spelling table, and loses the
marks. "none": as written. Figures under another normaliser do not compare.
"""

import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version

from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

# Written without spaces between words, so that characters are counted: Chinese, Cantonese, Japanese, Thai, Lao, Khmer,
# Burmese.
UNSPACED = frozenset({"zh", "yue", "ja", "th", "lo", "km", "my"})
AS_WRITTEN = "none"


def language_code(language: str) -> str | None:
    """The code of a code or name, "de" of "de-AT" or "German"; None for neither, or a name not known to Whisper."""
    name = language.strip().lower()
    code = TO_LANGUAGE_CODE.get(name) or re.split("[-_]", name)[0]
    return code if re.fullmatch("[a-z]{2,3}", code) or code == AS_WRITTEN else None


def is_unspaced(language: str | None) -> bool:
    return language is not None and language_code(language) in UNSPACED


@cache
def _normalizer(code: str | None):
    if code == AS_WRITTEN:
        return str
    return EnglishTextNormalizer() if code == "en" else BasicTextNormalizer(preserve_marks=True)


def _code(language: str | None) -> str | None:
    return "en" if language is None else language_code(language)


def normalizer_name(languages: Iterable[str | None] = (None,)) -> str:
    """What a figure over texts of these languages was normalised by."""
    names = dict.fromkeys(
        "as written" if found is str else f"whisper-normalizer {version('whisper-normalizer')} {type(found).__name__}"
        for found in map(_normalizer, map(_code, languages))
    )
    return ", ".join(names)


def normalize(text: str, language: str | None = None) -> str:
    """Words separated by single spaces, of languages without spaces the characters alone; "" when nothing speakable is
    left."""
    code = _code(language)
    words = _normalizer(code)(text).split()
    if code not in ("en", AS_WRITTEN):  # a mark without a letter, say an emoji's variation selector, is no word
        words = [word for word in words if any(unicodedata.category(c)[0] in "LN" for c in word)]
    return ("" if code in UNSPACED else " ").join(words)
