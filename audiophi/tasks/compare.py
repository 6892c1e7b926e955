"""compare: questions about two clips of a source. Which one has the dog, or the word; are they the same sound; is it
the same person's sex."""

from dataclasses import replace

from audiophi.data.example import drawing

from .base import Row
from .questions import YES_NO, Kind, Questions, words_of
from .traits import sex_of
from .words import CONTENT

ORDER = ("the first", "the second")

SOUND_IN = Kind(
    "which_clip_sound",
    (
        "In which recording do you hear {one}, the first or the second?",
        "Which of the two recordings is {one}, the first or the second?",
        "Where is {one} heard: in the first or in the second?",
    ),
    ("Which one has {one} in it, the first or the second recording?",),
    "choice",
)
WORD_IN = Kind(
    "which_clip_word",
    (
        'In which recording is the word "{one}" said, the first or the second?',
        'Which of the two recordings has the word "{one}", the first or the second?',
        'Where do you hear "{one}": in the first or in the second?',
    ),
    ('Which one contains the word "{one}", the first or the second recording?',),
    "choice",
)
SAME_SOUND = Kind(
    "same_sound",
    ("Are both recordings of the same sound?", "Is the same kind of sound in both?", "Do both have the same sound?"),
    ("Is what you hear the same in the two recordings?",),
    "yes_no",
    YES_NO,
)
SAME_SEX = Kind(
    "same_sex",
    (
        "Are both speakers of the same sex?",
        "Are the two speakers both men or both women?",
        "Is the second speaker of the same sex as the first?",
    ),
    ("Do two men or two women speak here, and not one of each?",),
    "yes_no",
    YES_NO,
)


class Compare(Questions):
    name = "compare"
    others, about_words = 12, True
    what = "to compare it with"

    def example(self, row: Row):
        other = self.partner(row)
        return super().example(replace(row, others=(other,) if other else ()))  # it is asked for more than once

    def clips(self, row: Row):
        own = super().clips(row)
        other = self.partner(row)
        return (*own, *super().clips(other)) if other and len(own) == 1 else ()

    def partner(self, row: Row) -> Row | None:
        """The other clip: of another kind, or of the same, by the row's number; the first where the row's own kind is
        not known, since all others would be read for nothing."""
        own, wanted, second = self.likeness(row), drawing(row.number)("alike", (True, False)), None
        for other in row.others:
            if len(other.clips) != 1:
                continue
            if own is None or (own == self.likeness(other)) == wanted:
                return other
            second = second or other
        return second

    def likeness(self, row: Row):
        return row.label or sex_of(row)

    def questions(self, row: Row):
        other = self.partner(row)
        if other is None:
            return []
        asked = []
        if row.label and other.label:
            asked.append(SAME_SOUND.ask("yes" if row.label == other.label else "no"))
            if row.label != other.label:
                asked += [SOUND_IN.ask(place, one=label, choices=ORDER)
                          for place, label in zip(ORDER, (row.label, other.label), strict=True)]  # fmt: skip
        sexes = [sex_of(one) for one in (row, other)]
        if all(sexes):
            asked.append(SAME_SEX.ask("yes" if sexes[0] == sexes[1] else "no"))
        said = [words_of(one.text) if row.speech is not False else [] for one in (row, other)]
        if not row.label and all(said):
            own = [[word for word in dict.fromkeys(mine) if len(word) >= CONTENT and word not in theirs]
                   for mine, theirs in (said, said[::-1])]  # fmt: skip
            for first, second in zip(*own, strict=False):
                asked += [WORD_IN.ask(ORDER[0], one=first, choices=ORDER),
                          WORD_IN.ask(ORDER[1], one=second, choices=ORDER)]  # fmt: skip
        return asked
