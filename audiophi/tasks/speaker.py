"""speaker: questions about who speaks, made from columns. Sex, child or adult, which language."""

from .base import Row
from .questions import YES_NO, Kind, Questions

ADULT = 18  # years
CHILD = 12  # between the two nobody can tell
SEXES = {"m": "a man", "male": "a man", "man": "a man", "f": "a woman", "female": "a woman", "woman": "a woman"}
LANGUAGES = ("English", "Spanish", "French", "Italian", "Russian", "German", "Mandarin", "Hindi")

SEX = Kind(
    "sex",
    (
        "Is the speaker a man or a woman?",
        "Who speaks, a man or a woman?",
        "Is this the voice of a man or of a woman?",
        "A woman or a man: who is speaking?",
        "Do you hear a woman or a man?",
    ),
    ("Tell me whether a man or a woman is talking.", "Whose voice is this, a woman's or a man's?"),
    "choice",
)
IS_SEX = Kind(
    "is_sex",
    ("Is the speaker {sex}?", "Is this {sex} speaking?", "Do you hear {sex}?", "Is this the voice of {sex}?"),
    ("Would you say that {sex} is talking?", "Does the voice belong to {sex}?"),
    "yes_no",
    YES_NO,
)
GROWN = Kind(
    "child_or_adult",
    (
        "Is the speaker a child or an adult?",
        "Who speaks, an adult or a child?",
        "Is this the voice of a child or of an adult?",
        "An adult or a child: who is speaking?",
    ),
    ("Tell me whether a child or an adult is talking.", "Does a child or an adult say this?"),
    "choice",
)
LANGUAGE = Kind(
    "language",
    (
        "Which language is spoken: {options}?",
        "What language is this? Choose one: {options}.",
        "Is this {options}? Name the language.",
    ),
    ("Name the language that you hear, one of {options}.",),
    "choice",
)


class Speaker(Questions):
    name = "speaker"
    others = 4
    what = "said of its speaker: no gender, age or language"

    def questions(self, row: Row):
        asked = []
        years = age_of(row.age)
        sex = SEXES.get((row.gender or "").strip().lower())
        if sex and (years is None or years >= ADULT):
            other = next(name for name in SEXES.values() if name != sex)
            pair = (sex, other)
            asked += [SEX.ask(sex, choices=pair), IS_SEX.ask("yes", sex=sex), IS_SEX.ask("no", sex=other)]
        if years is not None and (years <= CHILD or years >= ADULT):
            grown = ("a child", "an adult") if years <= CHILD else ("an adult", "a child")
            asked.append(GROWN.ask(grown[0], choices=grown))
        if row.language:
            wrong = [other.language for other in row.others if other.language]
            wrong = [name for name in dict.fromkeys([*wrong, *LANGUAGES]) if name != row.language][:3]
            for place in range(len(wrong) + 1):
                options = [*wrong]
                options.insert(place, row.language)
                asked.append(LANGUAGE.ask(row.language, choices=options, options=", ".join(options)))
        return asked


def age_of(text: str | None) -> int | None:
    """Years from "6", "50-70" (the lower) or "6.0"; None for anything else."""
    try:
        return int(float((text or "").split("-")[0]))
    except ValueError:
        return None
