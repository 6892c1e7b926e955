"""`model_card.md`, the design of every card: where it is, and how its {placeholders} are filled in."""

import re
from pathlib import Path

COMMENT = re.compile(r"<!-- Template:.*?-->\n*", re.DOTALL)
PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


class CardError(ValueError):
    """A card that cannot be made as asked; the message says what is missing and which command makes it."""


def template_path() -> Path:
    """`model_card.md`: in a clone at its top, in an installation where pip has put it. CardError where it is gone."""
    from importlib.metadata import PackageNotFoundError, files

    top = Path(__file__).resolve().parents[2]
    places = [top / "model_card.md", top / "share" / "audiophi" / "model_card.md"]  # the latter by `pip --target`
    try:
        places += [Path(file.locate()) for file in files("audiophi") or () if file.name == "model_card.md"]
    except PackageNotFoundError:
        pass
    for path in places:
        if path.is_file():
            return path
    raise CardError(f"the card's template is at none of {', '.join(map(str, places))}: install the package anew")


def fill(text: str, values: dict[str, str]) -> str:
    """`text` without the template's comment, its {placeholders} replaced. CardError for one that `values` lacks."""

    def value_of(match):
        if match[1] not in values:
            raise CardError(f"model_card.md asks for {match[0]}, which nothing fills in; known: {', '.join(values)}")
        return values[match[1]]

    return PLACEHOLDER.sub(value_of, COMMENT.sub("", text))
