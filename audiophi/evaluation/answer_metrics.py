"""Rules by which an answer is right. A rule: (answer, right answers, choices) -> (score 0 to 1, whether it could be
read); an answer that cannot be read is wrong, never drawn at random."""

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Sequence

import jiwer

from audiophi.tasks.base import plain

from .metrics import count_errors, word_error_rate
from .text_normalization import normalize

LABEL = re.compile(r"^\s*(?:\(([A-Za-z])\)|([A-Za-z])[.):])\s+(?=\S)")  # "(A) a man", "A. a man"
LETTER = re.compile(r"^\s*(?:\(([A-Za-z])\)|([A-Za-z])[.):]?)\s*$")  # "(A)", "A", "A."
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")


class PackageMissing(ValueError):
    """A package without which a metric cannot be computed; the message says how to get it."""


def spans(words: Sequence[str], inside: Sequence[str]) -> list[tuple[int, int]]:
    """Where `words` stand in a row in `inside`: (start, end) each."""
    size = len(words)
    return [(i, i + size) for i in range(len(inside) - size + 1) if size and list(inside[i : i + size]) == list(words)]


def letter_of(text: str, pattern: re.Pattern) -> int | None:
    """The number of the letter that a text is, or begins with, by `pattern`."""
    found = pattern.match(text)
    return None if found is None else ord((found[1] or found[2]).upper()) - ord("A")


def named(answer: str, choices: Sequence[str]) -> int | None:
    """The one choice that an answer names and no other; of two of which one contains the other, the longer one."""
    labels = [letter_of(choice, LABEL) for choice in choices]
    bodies = [plain(choice[LABEL.match(choice).end() :] if LABEL.match(choice) else choice) for choice in choices]
    same = [i for i, body in enumerate(bodies) if body == plain(answer)]
    if len(same) == 1:
        return same[0]
    letter = letter_of(answer, LETTER)
    if letter is not None and letter in labels:
        return labels.index(letter)
    # "(B) a man": the words tell, unless they are no choice's.
    words = plain(answer).split()
    places = {i: spans(body.split(), words) for i, body in enumerate(bodies)}
    found = set()
    for i, own in places.items():
        longer = [span for j, others in places.items() for span in others if len(bodies[j]) > len(bodies[i])]
        if any(not any(a <= start and end <= b for a, b in longer) for start, end in own):
            found.add(i)
    if not found:
        letter = letter_of(answer, LABEL)
        if letter is not None and letter in labels:
            return labels.index(letter)
    return found.pop() if len(found) == 1 else None


def choice(answer: str, references: Sequence[str], choices: Sequence[str]) -> tuple[float, bool]:
    chosen = named(answer, choices)
    if chosen is None:
        return 0.0, False
    right = set()
    for reference in references:
        index = named(reference, choices)
        letter = letter_of(reference, LETTER)
        if index is None and letter is not None and letter < len(choices):
            index = letter
        right.add(index)
    return float(chosen in right), True


def exact(answer, references, choices=()):
    return float(any(plain(answer) == plain(reference) for reference in references)), True


def verbatim(answer, references, choices=()):
    return float(any(answer.strip() == reference.strip() for reference in references)), True


def written(answer, references, choices=()):
    """The share of the words that are right as they are written, with case and marks: 1 - word error rate, at least 0,
    of the best reference. For long answers in a form, of which one misheard word should not cost all."""

    def of(reference):
        wanted = reference.split()
        return max(0.0, 1 - jiwer.wer(reference, answer)) if wanted else float(not answer.split())

    return max(map(of, references), default=0.0), True


def number_in(text: str) -> float | None:
    """The one number that a text has, in digits or in English words."""
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    found = {float(value) for value in NUMBER.findall(text) or NUMBER.findall(normalize(text))}
    return found.pop() if len(found) == 1 else None


def number(answer, references, choices=()):
    value = number_in(answer)
    return float(value is not None and value in {number_in(reference) for reference in references}), value is not None


def yes_or_no(text: str) -> str | None:
    said = {"yes", "no"} & set(plain(text).split())
    return said.pop() if len(said) == 1 else None


def yes_no(answer, references, choices=()):
    said = yes_or_no(answer)
    return float(said is not None and said in {yes_or_no(reference) for reference in references}), said is not None


def contains(answer, references, choices=()):
    words = plain(answer).split()
    return float(any(spans(plain(reference).split(), words) for reference in references)), True


def f1(answer, references, choices=()):
    """Harmonic mean of the precision and recall of the words, whatever their order; of the best reference."""

    def of(reference):
        heard, wanted = plain(answer).split(), plain(reference).split()
        both = sum((Counter(heard) & Counter(wanted)).values())
        return 2 * both / (len(heard) + len(wanted)) if heard and wanted else float(heard == wanted)

    return max(map(of, references), default=0.0), True


METRICS: dict[str, Callable] = {
    "choice": choice,
    "exact": exact,
    "verbatim": verbatim,
    "written": written,
    "number": number,
    "yes_no": yes_no,
    "contains": contains,
    "f1": f1,
}


def wer(answers: Sequence[str], references: Sequence[Sequence[str]], languages: Sequence[str | None]) -> float | None:
    """Percent, over all words."""
    rows = zip(answers, references, languages, strict=True)
    return word_error_rate([count_errors(right[0], answer, language) for answer, right, language in rows])


def has_bleu() -> None:
    if importlib.util.find_spec("sacrebleu") is None:
        raise PackageMissing("rows of metric 'bleu' are scored by sacrebleu, which is not installed: pip install "
                             "sacrebleu")  # fmt: skip


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]], languages: Sequence[str | None] = ()) -> float:
    """BLEU of a corpus, 0 to 100; rows may differ in how many references they have."""
    has_bleu()
    import sacrebleu

    most = max(map(len, references))
    columns = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    return sacrebleu.corpus_bleu(list(answers), columns).score


# Of many rows together.
CORPUS: dict[str, Callable] = {"wer": wer, "bleu": bleu}
