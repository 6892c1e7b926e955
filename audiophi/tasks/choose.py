"""choose: questions about what is heard, made from class labels. Which of these sounds, this or that, is it this."""

from .base import Row
from .questions import YES_NO, Kind, Questions

MOST = 4  # choices

WHICH = Kind(
    "which_sound",
    (
        "Which of these sounds is it: {options}?",
        "What do you hear? Choose one: {options}.",
        "Choose what is heard: {options}.",
        "One of these is heard. Which one? {options}",
        "Options: {options}. Which one fits the recording?",
    ),
    ("Pick the right sound from this list: {options}.", "The recording is of one of these, say which: {options}."),
    "choice",
)
EITHER = Kind(
    "either_sound",
    (
        "Is this {one} or {two}?",
        "What is it, {one} or {two}?",
        "Do you hear {one} or {two}?",
        "{one} or {two}: which one is heard?",
    ),
    ("Would you say that is {one} or rather {two}?", "Tell {one} from {two}: which is it?"),
    "choice",
)
IS_IT = Kind(
    "is_sound",
    (
        "Is this {one}?",
        "Do you hear {one}?",
        "Can {one} be heard?",
        "Is there {one} in the recording?",
        "Is the sound {one}?",
    ),
    ("Would you say that this is {one}?", "Does it sound like {one}?"),
    "yes_no",
    YES_NO,
)
NOT_HEARD = Kind("not_heard", (), ("Which of these two is not in the recording: {one} or {two}?",), "choice")


def other_labels(row: Row) -> list[str]:
    """Up to MOST labels that are not the row's."""
    wrong = {}
    for other in row.others:
        if other.label and other.label != row.label:
            wrong[other.label] = None
            if len(wrong) == MOST:
                break
    return list(wrong)


class Choose(Questions):
    name = "choose"
    others = 12
    what = "to choose from: no label, or no other label in its source"

    def questions(self, row: Row):
        wrong = other_labels(row)
        if not row.label or not wrong:
            return []
        asked = []
        for place in range(min(MOST, len(wrong) + 1)):  # the right one in every place
            options = wrong[: MOST - 1]
            options.insert(place, row.label)
            asked.append(WHICH.ask(row.label, choices=options, options=", ".join(options)))
        for other in wrong:
            pair = (row.label, other)
            asked += [EITHER.ask(row.label, choices=pair, one=row.label, two=other),
                      EITHER.ask(row.label, choices=pair, one=other, two=row.label),
                      IS_IT.ask("yes", one=row.label), IS_IT.ask("no", one=other),
                      NOT_HEARD.ask(other, choices=pair, one=row.label, two=other),
                      NOT_HEARD.ask(other, choices=pair, one=other, two=row.label)]  # fmt: skip
        return asked
