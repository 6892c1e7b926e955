"""What is known of a clip as a whole, from a row's columns: who speaks, and what is heard beside the words."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Row

ADULT = 18  # years
CHILD = 12  # between the two nobody can tell
SEXES = {"m": "a man", "male": "a man", "man": "a man", "f": "a woman", "female": "a woman", "woman": "a woman"}


def age_of(text: str | None) -> int | None:
    """Years from "6", "50-70" (the lower) or "6.0"; None for anything else."""
    try:
        return int(float((text or "").split("-")[0]))
    except ValueError:
        return None


def sex_of(row: "Row") -> str | None:
    """"a man" or "a woman", of adults and of whoever's age is not known."""
    years = age_of(row.age)
    return SEXES.get((row.gender or "").strip().lower()) if years is None or years >= ADULT else None


def grown_of(row: "Row") -> str | None:
    """"a child" or "an adult"."""
    years = age_of(row.age)
    if years is None or CHILD < years < ADULT:
        return None
    return "a child" if years <= CHILD else "an adult"


def description(row: "Row") -> str | None:
    """All that is known, as words without articles: "woman adult English"; None where that is nothing."""
    sex, grown = ((trait(row) or "").partition(" ")[2] for trait in (sex_of, grown_of))
    label = None if (row.label or "").strip().lower() in SEXES else row.label  # a column of both names
    known = [sex, grown, row.language, label]
    return " ".join(part for part in known if part) or None
