"""Data sets that are recognised by name, and what a user states about others: titles, Hub ids, licences, languages."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from audiophi.data.dataset_registry import MADE
from audiophi.evaluation.text_normalization import AS_WRITTEN, language_code
from audiophi.tasks import TASKS, task_of_source
from audiophi.training.recipe import Recipe, Source
from audiophi.training.recipe_values import build, parse_yaml

from .licences import HubAnswers, Licence, is_hub_id, parse_licence, unknown


@dataclass(frozen=True)
class DataSet:
    """A known data set. `hub_id` only where its makers put it on the Hub."""

    title: str
    licence: Licence
    hub_id: str | None = None
    languages: tuple[str, ...] = ("en",)
    described: bool = False  # its texts, or templates of its classes, describe clips


# By the beginning of a folder's or repository's name, in lower case, letters and digits only.
DATASETS = {
    "librispeech": DataSet("LibriSpeech", parse_licence("cc-by-4.0"), "openslr/librispeech_asr"),
    "commonvoice": DataSet("Common Voice", parse_licence("cc0-1.0"), languages=()),
    "speechocean762": DataSet(
        "speechocean762",
        parse_licence("apache-2.0", "openslr.org/101: free for commercial and non-commercial use"),
        "mispeech/speechocean762",
    ),
    "asteriskcore": DataSet("Asterisk's telephone prompts (Debian)", parse_licence("cc-by-sa-3.0")),
    "clotho": DataSet(
        "Clotho",
        Licence(None, "non-commercial", "captions: Tampere University, non-commercial with attribution; clips: each by "
                "its licence on Freesound"),
        described=True,
    ),
    "audiocaps": DataSet(
        "AudioCaps",
        Licence(None, "unknown", "captions MIT, audio of YouTube's uploaders"),
        described=True,
    ),
    "esc50": DataSet("ESC-50", parse_licence("cc-by-nc-3.0"), described=True),
    "esc10": DataSet("ESC-10", parse_licence("cc-by-3.0"), described=True),
    "urbansound8k": DataSet("UrbanSound8K", parse_licence("cc-by-nc-3.0"), described=True),
    "syntheticspeech": DataSet(
        "synthetic speech",
        Licence(None, "permissive", "made by tools/make_synthetic_speech.py of AudioPhi"),
    ),
    "syntheticwords": DataSet(
        "synthetic speech, lists of words",
        Licence(None, "permissive", "made by tools/make_synthetic_speech.py of AudioPhi"),
    ),
}  # fmt: skip


@dataclass
class AboutSource:
    """What is stated about one data set. `dataset`: its id on the Hub, which may also be a known one's; `licence`: an
    identifier of the Hub or `KIND: TEXT` (see licences.py)."""

    title: str | None = None
    dataset: str | None = None
    licence: str | None = None
    language: list[str] | None = None


@dataclass
class About:
    """What the card's author states, as YAML: everything that neither checkpoint, recipe nor metrics.json can know.

    `sources`: by a data set's path in the recipe (or in eval.py's --data), or that path's last part; `components`:
    licences by id. `licence`: the model's; it cannot allow more than its parts'.
    """

    name: str | None = None
    licence: str | None = None
    language: list[str] | None = None
    tags: list[str] = field(default_factory=list)
    summary: str | None = None
    training: str | None = None
    limits: list[str] = field(default_factory=list)
    sources: dict[str, AboutSource] = field(default_factory=dict)
    components: dict[str, str] = field(default_factory=dict)

    def of(self, path: str) -> AboutSource:
        return self.sources.get(path) or self.sources.get(last_part(path)) or AboutSource()


def read_about(text: str, name: str) -> About:
    """Raises RecipeError (a ValueError) naming the key that it does not know."""
    return build(About, parse_yaml(text, name) or {}, name)


@dataclass(frozen=True)
class Described:
    """A data set as a card names it. `config`: of the Hub's data set."""

    path: str
    title: str
    licence: Licence
    hub_id: str | None
    languages: tuple[str, ...]
    by: str  # how that is known: "stated", "recognised by its name", "the Hub", "not known"
    config: str | None = None


def last_part(path: str) -> str:
    return Path(path.rstrip("/")).name or path


def known_dataset(path: str) -> DataSet | None:
    """The known data set that a path or Hub id names in one of its parts, the last one first."""
    if path.partition(":")[0] in MADE:
        return DataSet("clips in which nobody speaks", Licence(None, "permissive", "made by AudioPhi"), languages=())
    for part in reversed(re.split(r"[/:\\]", path)):
        name = re.sub("[^a-z0-9]", "", part.lower())
        for key, dataset in DATASETS.items():
            if name.startswith(key):
                return dataset
    return None


def describe_data(path: str, about: About, answers: HubAnswers, language: str | None = None) -> Described:
    """What is known of the data set at `path`, first from `about`, then by its name, then from the Hub. `language`:
    that the recipe says of it."""
    stated = about.of(path)
    hub_id, _, rest = path.partition(":")
    config = rest.partition(":")[0] or None
    known = known_dataset(stated.dataset or path)
    on_hub = is_hub_id(hub_id)
    said = [code] if language and (code := language_code(language)) not in (None, AS_WRITTEN) else None
    licence, by = None, "recognised by its name" if known else "not known"
    if known is not None:
        licence = known.licence
    elif stated.dataset or on_hub:
        answer = answers.dataset(stated.dataset or hub_id)
        if answer is not None:
            licence, by = parse_licence(answer), "the Hub"
            stated_id = stated.dataset or hub_id
            known = DataSet(stated_id, licence, stated_id, ())
    if stated.licence:
        licence = parse_licence(stated.licence)
    if stated != AboutSource():
        by = "stated"
    known_id = known.hub_id if known else None
    return Described(
        path=path,
        title=stated.title or (known.title if known else last_part(hub_id if on_hub else path)),
        licence=licence or unknown("where it came from, and state it in the file of --about"),
        hub_id=stated.dataset if stated.dataset and is_hub_id(stated.dataset) else known_id,
        languages=tuple(stated.language or said or (known.languages if known else ())),
        by=by,
        config=config if on_hub and known_id else None,
    )


def training_sources(recipes: Iterable[Recipe]) -> list[Source]:
    """Every source that some stage of the recipes trains on, in their order."""
    return [source for recipe in recipes for stage in recipe.stages for source in stage.data or recipe.data.train]


def tasks_of(recipes: Iterable[Recipe], saved: Iterable[str] = ()) -> list[str]:
    """Names of the tasks that the recipes teach and that can be measured, in their order.

    `saved`: those that the checkpoint says it was trained on, taken where there is no recipe, or where one has a source
    of which only its columns, which are not here, tell the task.
    """
    found: set[str] = set()
    for source in training_sources(recipes):
        known, named = known_dataset(source.path), getattr(source, "task", None)
        if named is None:
            columns = {"references"} if known is not None and known.described else set()
            asks = getattr(source, "instruction_column", None) or getattr(source, "answer_column", None)
            named = task_of_source(columns | ({"instruction"} if asks else set()), source.instruction).name
            if known is None and not asks and source.instruction is None and saved:
                found.update(saved)
                continue
        found.add(named)
    names = found or set(saved)
    names = {name for name in names if name in TASKS and TASKS[name].report}
    return sorted(names, key=lambda name: TASKS[name].order)
