"""Captions against references: CIDEr-D, BLEU, ROUGE-L through aac-metrics, and whether the right class is named.

aac-metrics, as DCASE's evaluation, tokenises with Stanford's PTBTokenizer, a Java program that has to be downloaded.
`tokenize` does the same for captions in Python: 27,040 captions of Clotho and AudioCaps come out the same.
The figures are those of the literature: fractions, CIDEr-D not in percent.
"""

import importlib.util
import re
from collections.abc import Sequence

MISSING = (
    "captions are scored by aac-metrics, which is not installed: pip install -e '.[caption]' (0.5.4; later versions "
    "do not go together with transformers 5)."
)
SCORES = ("cider_d", "rouge_l", "bleu_1", "bleu_2", "bleu_3", "bleu_4")
OFFICIAL = ("meteor", "fense", "spider_fl")  # with what they are made of: SPICE, CIDEr-D, SPIDEr, fluency error
JAVA_AND_MODELS = (
    "METEOR and SPICE need Java 8 to 13 (the variable AAC_METRICS_JAVA_PATH names the program), and they, FENSE and "
    "SPIDEr-FL need files that `aac-metrics-download` fetches."
)
# As PTBTokenizer with -lowerCase, punctuation left out as in coco-caption.
TOKEN = re.compile(
    r"""
    can(?=not\b)                            # can not
  | [a-z]+(?=n't\b) | n't\b                 # do n't
  | '(?:s|re|ve|ll|d|m)\b                   # dog 's
  | \d+(?:[.,:]\d+)*(?:st|nd|rd|th)?\b
  | (?:[a-z]\.){2,}                         # a.m.
  | \w+(?:[-_/]\w+)*                        # walkie-talkie
  | [%$&\#@+*=]
    """,
    re.VERBOSE,
)
QUOTES = str.maketrans("’‘“”", "''\"\"")
# Of a class's name: these say nothing about which class it is.
EMPTY_WORDS = {"a", "an", "and", "of", "or", "the"}


class MetricsMissing(ValueError):
    """A package, program or file without which captions cannot be scored; the message says how to get it."""


def tokenize(caption: str) -> list[str]:
    """Lower-case tokens without punctuation."""
    return TOKEN.findall(caption.lower().translate(QUOTES))


def has_metrics() -> bool:
    """Whether aac-metrics is there."""
    return importlib.util.find_spec("aac_metrics") is not None


def caption_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """cider_d, rouge_l, bleu_1 ... bleu_4 of a corpus; `references` are a list for every candidate.

    CIDEr-D weighs words by how many clips' references have them: it is None for fewer than two clips, and compares only
    on the same data. Raises MetricsMissing without aac-metrics, ValueError for a clip without a reference of words.
    """
    try:
        from aac_metrics.functional import bleu, cider_d, rouge_l
    except ImportError as error:
        raise MetricsMissing(f"{MISSING} ({error})") from error

    heard = [" ".join(tokenize(candidate)) for candidate in candidates]
    wanted = [[words for text in texts if (words := " ".join(tokenize(text)))] for texts in references]
    empty = [index for index, texts in enumerate(wanted) if not texts]
    if empty:
        raise ValueError(f"clip {empty[0]}: none of its references has a word: {list(references[empty[0]])}.")
    if not heard:
        return dict.fromkeys(SCORES)
    cider = float(cider_d(heard, wanted, return_all_scores=False)) if len(heard) > 1 else None
    blues = bleu(heard, wanted, return_1_to_n=True)[0]["bleu_1_to_4"].tolist()
    return dict(zip(SCORES, [cider, float(rouge_l(heard, wanted, return_all_scores=False)), *blues], strict=True))


def official_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The official set of DCASE: meteor, spice, spider, spider_fl, fense and their parts, with Stanford's tokenizer.

    Raises MetricsMissing, saying what to install, when aac-metrics, Java or its files are missing.
    """
    try:
        from aac_metrics.functional import evaluate
    except ImportError as error:
        raise MetricsMissing(f"{MISSING} ({error})") from error
    clean = [" ".join(candidate.split()) for candidate in candidates]
    wanted = [[" ".join(text.split()) for text in texts] for texts in references]
    try:
        corpus, _ = evaluate(clean, wanted, metrics=list(OFFICIAL))
    except Exception as error:  # whatever Java, a missing file or the Hub says
        reason = str(error).strip().split("\n")[0]
        raise MetricsMissing(f"the official caption metrics cannot be computed: {reason} {JAVA_AND_MODELS}") from error
    return {name: float(value) for name, value in corpus.items()}


def stem(word: str) -> str:
    """A word without the endings in which a class's name may differ from a caption: bark, barks, barking."""
    if word.endswith("ies") and len(word) > 4:
        return word.removesuffix("ies") + "y"
    for ending in ("ing", "ed", "es", "s", "e"):
        short = word.removesuffix(ending)
        if short != word and len(short) > 2 and re.search("[aeiouy]", short) and not word.endswith("ss"):
            # clapping: the consonant was doubled for the ending; buzzing, falling: it was not.
            doubled = ending in ("ing", "ed") and short[-1] == short[-2] and short[-1] not in "aefloszu"
            return short[:-1] if doubled else short
    return word


def words_of(text: str) -> frozenset[str]:
    """The stems of a text's words; hyphens and underscores separate."""
    words = re.findall(r"[^\W_]+", text.lower().translate(QUOTES))
    return frozenset(stem(word) for word in words if word not in EMPTY_WORDS)


def names_class(caption: str, label: str, labels: Sequence[str]) -> bool:
    """Whether a caption has all words of `label` and not all words of any other of `labels`, inflected or not.

    A class whose name is a part of the label's own ("engine" of "engine idling") cannot be kept apart from it, and
    does not count as another one.
    """
    heard, own = words_of(caption), words_of(label)
    others = (words_of(other) for other in labels)
    return own <= heard and not any(other <= heard and not other <= own for other in others if other)


def label_accuracy(captions: Sequence[str], labels: Sequence[str], classes: Sequence[str]) -> float | None:
    """Percentage of captions that name their clip's class and no other of `classes`; None without captions."""
    if not captions:
        return None
    named = [names_class(caption, label, classes) for caption, label in zip(captions, labels, strict=True)]
    return 100.0 * sum(named) / len(named)
