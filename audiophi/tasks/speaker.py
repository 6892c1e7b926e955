"""speaker: questions about who speaks, made from columns. Sex, child or adult, which language."""

from .base import Row
from .questions import YES_NO, Kind, Questions
from .traits import SEXES, grown_of, sex_of

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
        if sex := sex_of(row):
            other = next(name for name in SEXES.values() if name != sex)
            pair = (sex, other)
            asked += [SEX.ask(sex, choices=pair), IS_SEX.ask("yes", sex=sex), IS_SEX.ask("no", sex=other)]
        if grown := grown_of(row):
            asked.append(GROWN.ask(grown, choices=(grown, *({"a child", "an adult"} - {grown}))))
        if row.language:
            wrong = [other.language for other in row.others if other.language]
            wrong = [name for name in dict.fromkeys([*wrong, *LANGUAGES]) if name != row.language][:3]
            for place in range(len(wrong) + 1):
                options = [*wrong]
                options.insert(place, row.language)
                asked.append(LANGUAGE.ask(row.language, choices=options, options=", ".join(options)))
        return asked
