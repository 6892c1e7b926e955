"""The text normaliser under which every word error rate of this project is counted.

Whisper's English normaliser (Radford et al. 2022, appendix C): lower case, no punctuation, no fillers such as "um",
contractions spelled out, British to American spelling, number words to digits. Taken from PyPI's `whisper-normalizer`,
because the copy in transformers lacks the spelling table. Figures under another normaliser do not compare.
"""

from functools import lru_cache
from importlib.metadata import version

from whisper_normalizer.english import EnglishTextNormalizer

NORMALIZER_NAME = f"whisper-normalizer {version('whisper-normalizer')} EnglishTextNormalizer"


@lru_cache(maxsize=1)
def _english() -> EnglishTextNormalizer:
    return EnglishTextNormalizer()


def normalize(text: str) -> str:
    """Words separated by single spaces; "" when nothing speakable is left."""
    return " ".join(_english()(text).split())
