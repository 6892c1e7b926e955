"""What a model card is made of, and where it is kept: in `card/` beside the card, so that anybody can make it again.

    card/recipe-1.yaml ...   the recipes of the training, in their order
    card/metrics-1.json ...  what eval.py wrote
    card/decoding.json       on which clips the weights of decoding were chosen
    card/about.yaml          what the author states (`data_sources.About`)
    card/card.json           the repository's name and the Hub's answers about licences

Absolute paths of the machine are cut down to their last part before anything is kept or shown.
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from audiophi.training.recipe import Recipe, RecipeError, recipe_from_dict

from .data_sources import read_about
from .licences import HubAnswers
from .results import read_metrics
from .template import CardError

CARD_NAME, CURVES_NAME, DECODING_NAME, KEPT = "README.md", "curves.png", "decoding.json", "card"
ABSOLUTE_PATH = re.compile(r"""(?<![\w/.~-])/(?!/)(?:[^\s,}\]"'/]+/)+""")


@dataclass
class Inputs:
    """What a card is made of: `recipes` (texts, in the order of training), `metrics` (name of the file -> content),
    what its author states (`about`, as YAML), the Hub's `answers`, where it is published (`repository`), the picture of
    the run's `curves`, and how its weights of `decoding` were chosen (audiophi/training/decoding_fit.py)."""

    recipes: list[str] = field(default_factory=list)
    metrics: dict[str, dict] = field(default_factory=dict)
    about: str = ""
    answers: HubAnswers = field(default_factory=HubAnswers)
    repository: str | None = None
    curves: Path | None = None
    decoding: dict | None = None


def collect(
    folder: str | Path,
    metrics: Sequence[str | Path] = (),
    recipes: Sequence[str | Path] = (),
    about: str | Path | None = None,
    curves: str | Path | None = None,
    beside: str | Path | None = None,
) -> Inputs:
    """The inputs of the card of the checkpoint in `folder`.

    What is not given is what was kept when the card was last written (in `beside`, default `folder`), else the recipe,
    the curves and the decoding of the run whose `final/` the folder is. CardError, RecipeError or FileNotFoundError
    name a file that cannot be used.
    """
    folder = Path(folder)
    beside = Path(beside or folder)
    kept = beside / KEPT
    found = Inputs()
    if (kept / "card.json").is_file():
        state = json.loads((kept / "card.json").read_text(encoding="utf-8"))
        found.repository, found.answers = state["repository"], HubAnswers(**state["answers"])
    files = [Path(path) for path in recipes] or sorted(kept.glob("recipe-*.yaml"), key=number_of)
    if not files and (folder.parent / "recipe.yaml").is_file():
        files = [folder.parent / "recipe.yaml"]
    for file in files:
        found.recipes.append(shorten(file.read_text(encoding="utf-8")))
        read_recipe(found.recipes[-1], str(file))
    for file in [Path(path) for path in metrics] or sorted(kept.glob("metrics-*.json"), key=number_of):
        if str(file) in found.metrics:
            raise CardError(f"{file}: is given twice")
        found.metrics[str(file)] = json.loads(shorten_values(read_metrics(file)))
    about = Path(about) if about else kept / "about.yaml"
    if about.is_file() or about != kept / "about.yaml":
        found.about = about.read_text(encoding="utf-8")
        read_about(found.about, str(about))
    places = [Path(curves)] if curves else [beside / CURVES_NAME, folder.parent / CURVES_NAME]
    if curves and not places[0].is_file():
        raise FileNotFoundError(f"{curves}: no such file")
    found.curves = next((path for path in places if path.is_file()), None)
    for file in (kept / DECODING_NAME, folder.parent / DECODING_NAME):
        if found.decoding is None and file.is_file():
            found.decoding = json.loads(shorten_values(json.loads(file.read_text(encoding="utf-8"))))
    return found


def number_of(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def shorten(text: str) -> str:
    """`text` with absolute paths cut down to their last part."""
    return ABSOLUTE_PATH.sub("", text)


def shorten_values(value) -> str:
    """JSON with absolute paths in its texts cut down to their last part."""

    def walk(value):
        if isinstance(value, dict):
            return {key: walk(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [walk(inner) for inner in value]
        return (Path(value).name or value) if isinstance(value, str) and value.startswith("/") else value

    return json.dumps(walk(value), indent=2) + "\n"


def read_recipe(text: str, name: str) -> Recipe:
    """RecipeError naming the file for one that is no recipe."""
    try:
        return recipe_from_dict(yaml.safe_load(text))
    except (RecipeError, yaml.YAMLError) as error:
        raise RecipeError(f"{name}: {error}") from error


def write_card(card: ModelCard, inputs: Inputs, path: str | Path) -> None:
    """The card at `path`; beside it curves.png, and in `card/` what it was made of."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = kept_files(inputs)
    for name, text in files.items():
        (path.parent / name).parent.mkdir(exist_ok=True)
        (path.parent / name).write_text(text, encoding="utf-8")
    for file in (path.parent / KEPT).glob("*"):
        if f"{KEPT}/{file.name}" not in files:
            file.unlink()
    if inputs.curves and inputs.curves.resolve() != (path.parent / CURVES_NAME).resolve():
        shutil.copyfile(inputs.curves, path.parent / CURVES_NAME)
    card.save(path)


def kept_files(inputs: Inputs) -> dict[str, str]:
    """Name -> content of the files that are kept beside a card."""
    files = {f"{KEPT}/recipe-{number}.yaml": text for number, text in enumerate(inputs.recipes, 1)}
    files |= {
        f"{KEPT}/metrics-{number}.json": json.dumps(metrics, indent=2) + "\n"
        for number, metrics in enumerate(inputs.metrics.values(), 1)
    }
    if inputs.about:
        files[f"{KEPT}/about.yaml"] = inputs.about
    if inputs.decoding:
        files[f"{KEPT}/{DECODING_NAME}"] = json.dumps(inputs.decoding, indent=2) + "\n"
    state = {"repository": inputs.repository, "answers": asdict(inputs.answers)}
    files[f"{KEPT}/card.json"] = json.dumps(state, indent=2, sort_keys=True) + "\n"
    return files


def is_generated(path: Path) -> bool:
    """Whether a card was made by `write_card`."""
    return path.is_file() and (path.parent / KEPT / "card.json").is_file()
