"""mixed: questions about speech over a sound, made from rows that have words and a label (`tools/make_mixed.py` makes
such rows). What is heard behind the voice, and what is both said and heard."""

from .base import Row
from .choose import MOST, other_labels
from .questions import YES_NO, Kind, Questions, words_of

BEHIND = Kind(
    "sound_behind",
    (
        "What is heard behind the voice: {options}?",
        "Which of these sounds is in the background: {options}?",
        "Somebody speaks. What else do you hear? Choose one: {options}.",
    ),
    ("Name the sound in the background, one of {options}.",),
    "choice",
)
IS_BEHIND = Kind(
    "is_behind",
    (
        "Is there {one} behind the voice?",
        "Do you hear {one} in the background?",
        "Besides the speaker, is there {one}?",
    ),
    ("Apart from the voice, can {one} be heard?",),
    "yes_no",
    YES_NO,
)
BOTH = Kind(
    "said_and_heard",
    (
        "What is said, and what is heard behind it?",
        "Write down the words and the sound in the background.",
        "Transcribe the speech and name the sound behind it.",
        "Both what is said and what sounds behind it, please.",
        "Tell me the words as well as the noise behind them.",
        "Write what the voice says and also which sound goes with it.",
        "I want two things: the spoken words, and what else is heard.",
        "Report the speech together with the other sound.",
    ),
    ("Give me both the words of the speaker and the background sound.",),
    "f1",
)


class Mixed(Questions):
    name = "mixed"
    others = 12
    what = "said in it over a known sound"

    def questions(self, row: Row):
        words = words_of(row.text)
        if not words or not row.label or row.speech is False:
            return []
        wrong = other_labels(row)
        asked = [BOTH.ask(f'Said: "{" ".join(words)}". Behind it: {row.label}.')]
        for place in range(min(MOST, len(wrong) + 1) if wrong else 0):
            options = wrong[: MOST - 1]
            options.insert(place, row.label)
            asked.append(BEHIND.ask(row.label, choices=options, options=", ".join(options)))
        for other in wrong:
            asked += [IS_BEHIND.ask("yes", one=row.label), IS_BEHIND.ask("no", one=other)]
        return asked
