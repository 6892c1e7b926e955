"""Makes the model card of a checkpoint from `model_card.md`, and tells when one says something else than its sources.

inputs = collect(folder, metrics=["OUT/metrics.json"])      card_files.py
write_card(make_card(folder, inputs), inputs, folder / "README.md")
check_card(folder)                                          what somebody has changed in it since
"""

import difflib
import json
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import ModelCard

from audiophi.tasks import TASKS, default_task
from audiophi.tasks.base import Task
from audiophi.tasks.transcribe import Transcribe
from audiophi.training.recipe import Recipe

from .architecture import describe_parts, millions, parameters_by_part, read_config, stored
from .card_files import CARD_NAME, CURVES_NAME, Inputs, collect, read_recipe
from .data_sources import About, Described, describe_data, read_about, tasks_of, training_sources
from .licences import HubAnswers, Licence, binding_licence, component_licence, is_hub_id, parse_licence, short_name
from .results import check_metrics, eval_command, eval_results, results_section, titled
from .template import CardError, fill, template_path


def make_card(folder: str | Path, inputs: Inputs) -> ModelCard:
    """The card of the checkpoint in `folder`.

    CardError, ValueError or OSError for a folder without a checkpoint, metrics that are incomplete or were measured on
    other weights, a licence that allows more than a part's, and a template that asks for what nobody fills in.
    """
    folder = Path(folder)
    config = read_config(folder)
    about = read_about(inputs.about, "about")
    recipes = [read_recipe(text, f"recipe {number}") for number, text in enumerate(inputs.recipes, 1)]
    name = about.name or (inputs.repository or "").rpartition("/")[2]
    name = name or (recipes[-1].name if recipes else folder.resolve().name)
    evaluations = [(metrics, check_metrics(metrics, path, folder)) for path, metrics in inputs.metrics.items()]
    sources = described_sources(recipes, about, inputs.answers)
    licences = part_licences(config, recipes, sources, about, inputs.answers)
    names = [TASKS[name].asked_as or name for name in tasks_of(recipes, saved_tasks(folder))]
    tasks = [TASKS[name] for name in dict.fromkeys(names)] or [default_task()]

    card = ModelCard(template_path().read_text(encoding="utf-8"))
    header = card.data
    header.license, header.license_name = None, None
    for key, value in binding_licence(licences, about.licence).items():
        setattr(header, key, value)
    header.language = about.language or sorted({code for source in sources for code in source.languages}) or None
    header.base_model = hub_ids(config, recipes) or None
    header.datasets = list(dict.fromkeys(source.hub_id for source in sources if source.hub_id)) or None
    header.tags += [task.report.tag for task in tasks] + about.tags
    header.model_name = name
    results = [eval_results(metrics, task, about, inputs.answers) for metrics, task in evaluations]
    if len({found[0].unique_identifier for found in results}) < len(results):
        raise CardError("two of the metrics.json files are of the same data and split: a card names each once")
    header.eval_results = [result for found in results for result in found] or None
    if header.eval_results is None:
        header.model_name = None

    sections = [results_section(m, task, name, about, inputs.answers) for m, task in evaluations]
    values = {
        "name": name,
        "repository": inputs.repository or name,
        "summary": about.summary or summary(config, tasks),
        "example": tasks[0].report.example,
        "output": " or ".join(task.report.output for task in tasks),
        "architecture": architecture(config),
        "holds": holds(config, folder),
        "components": "\n".join(component_rows(config, licences)),
        "training": "\n\n".join(
            filter(None, (training_section(inputs, recipes, sources, about), decoding_section(inputs, about, folder)))
        ),
        "results": "\n\n".join([*sections, GAP]) if sections else not_measured(tasks),
        "limits": limits_section(about, sources, bool(evaluations)),
        "licences": licence_section(licences, header),
    }
    card.text = fill(card.text, values)
    return ModelCard(str(card))  # as it is read from a file, so that writing it again changes nothing


def saved_tasks(folder: Path) -> list[str]:
    """The tasks that the checkpoint in `folder` knows."""
    file = folder / "processor_config.json"
    saved = json.loads(file.read_text(encoding="utf-8")).get("tasks") if file.is_file() else None
    return [task["name"] for task in saved or ()]


GAP = (
    "The *listening gap* is what another clip's audio costs: the score with the wrong audio against the score with the "
    "right one. A model that writes likely words without listening has a gap of 0."
)


def described_sources(recipes: list[Recipe], about: About, answers: HubAnswers) -> list[Described]:
    """The data sets of the recipes, each once."""
    languages = {source.path: source.language for source in training_sources(recipes)}
    return [describe_data(path, about, answers, language) for path, language in languages.items()]


def started_from(recipes: list[Recipe]) -> list[str]:
    """Checkpoints that training started from and that none of the recipes made."""
    made = [recipe.output_dir.rstrip("/") for recipe in recipes]
    return [
        recipe.init_from
        for recipe in recipes
        if recipe.init_from and not any(recipe.init_from.startswith(f"{folder}/") for folder in made)
    ]


def part_licences(config, recipes, sources, about: About, answers: HubAnswers) -> dict[str, Licence]:
    """Name -> licence of everything that the model was made of."""
    found = {}
    for base in config.base_components.values():
        name = short_name(base["id"])
        stated = about.components.get(name)
        found[name] = parse_licence(stated) if stated else component_licence(base["id"], base["revision"], answers)
    for checkpoint in started_from(recipes):
        stated = about.components.get(short_name(checkpoint))
        found[short_name(checkpoint)] = (
            parse_licence(stated) if stated else component_licence(checkpoint, answers=answers)
        )
    for source in sources:
        found.setdefault(source.title, source.licence)
    if not recipes:
        found["training data"] = Licence(None, "unknown", "no recipe was given")
    return found


def hub_ids(config, recipes: list[Recipe]) -> list[str]:
    """Base components and starting points that others can find on the Hub."""
    names = [*(base["id"] for base in config.base_components.values()), *started_from(recipes)]
    return [name for name in names if is_hub_id(name)]


def summary(config, tasks: list[Task]) -> str:
    does = " and ".join(task.report.summary for task in tasks)
    names = [short_name(base["id"]) for base in config.base_components.values()] or ["an audio encoder", "an LLM"]
    return f"{does[:1].upper()}{does[1:]} by a small language model: {' → adapter → '.join(names)}. Made with AudioPhi."


def architecture(config) -> str:
    rows = [f"| {part} | {what} | {count} |" for part, what, count in describe_parts(config)]
    rate = f"{config.audio_tokens_per_second:.2f}"
    fewer = "" if config.readout == "frames" else " at most, fewer after the collapse"
    whole = f", and every clip as a whole {config.clip_tokens} more" if config.clip_tokens else ""
    return "\n".join(
        [
            "| part | what | parameters |",
            "|---|---|---|",
            *rows,
            "",
            f"One second of audio becomes {rate} tokens of the LLM{fewer}{whole}.",
        ]
    )


def holds(config, folder: Path) -> str:
    """What the checkpoint's files hold."""
    files, total = stored(folder), sum(parameters_by_part(config).values())
    if not config.slim:
        return f"*Full*: it holds all {millions(total)} parameters and needs no other repository."
    return (
        f"*Slim*: it holds what was trained, {millions(files.numbers)} numbers, and names its base components, which "
        f"are loaded with it ({millions(total)} parameters together)."
    )


def component_rows(config, licences: dict[str, Licence]) -> list[str]:
    rows = []
    for base in config.base_components.values():
        name = short_name(base["id"])
        where = "a folder on the machine that made it" if name != base["id"] else base["revision"] or "not recorded"
        rows.append(f"| {name} | {where} | {licences[name]} |")
    return rows or ["| none is named | – | – |"]


def training_section(inputs: Inputs, recipes: list[Recipe], sources: list[Described], about: About) -> str:
    if not recipes:
        return about.training or "No recipe was given: how it was trained is not recorded here."
    parts = [about.training] if about.training else []
    for name in started_from(recipes):
        parts.append(f"It goes on from `{short_name(name)}`; what that was trained on is not in the tables below.")
    rows = ["| data | folder or id | licence | how that is known |", "|---|---|---|---|"]
    rows += [f"| {s.title} | `{s.path}` | {s.licence} | {s.by} |" for s in sources]
    parts.append("\n".join(rows))
    for number, (text, recipe) in enumerate(zip(inputs.recipes, recipes, strict=True), 1):
        parts.append(stages_table(recipe))
        parts.append(
            f"<details><summary>Recipe {number}: {recipe.name} (`python train.py RECIPE.yaml`)</summary>\n\n"
            f"```yaml\n{text.rstrip()}\n```\n\n</details>"
        )
    if inputs.curves:
        parts.append(f"![Losses and error rates over the training time]({CURVES_NAME})")
    return "\n\n".join(parts)


def decoding_section(inputs: Inputs, about: About, folder: Path) -> str | None:
    """On which clips the weights of decoding were chosen; None where they were not, or the checkpoint has others."""
    file = folder / "generation_config.json"
    saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    fitted = inputs.decoding or {}
    told = [text for text in (decoding_text(fitted, saved, about, inputs.answers), ears_text(fitted, saved)) if text]
    return " ".join([*told, "A figure on these clips flatters."]) if told else None


def decoding_text(fitted: dict, saved: dict, about: About, answers: HubAnswers) -> str | None:
    """How alignment, LLM and prior were weighed: `fitted` is a run's decoding.json, `saved` a generation_config."""
    settings = (saved.get("tasks") or {}).get(Transcribe.name, {})
    if "chosen" not in fitted or not fitted["chosen"].items() <= settings.items():
        return None
    data = [
        f"{source['clips']:,} of {titled(describe_data(source['path'], about, answers), source)}"
        for source in fitted.get("data", ())
    ]
    settings = ", ".join(f"`{name}` {value:g}" for name, value in fitted["chosen"].items())
    errors = [trial["error_rate"] for trial in fitted["tried"]]
    clips = f"{fitted['clips']:,} development clips" + (f" ({', '.join(data)})" if data else "")
    return (
        f"How it decodes transcripts ({settings}) was chosen on {clips}: of {len(errors)} settings that were tried the "
        f"one with the fewest word errors there, {min(errors):.2f} %."
    )


def ears_text(fitted: dict, saved: dict) -> str | None:
    """How alignment and language model were weighed beside the encoder's decoder."""
    ears = fitted.get("ears")
    if not ears or any(saved.get(name) != value for name, value in ears["chosen"].items()):
        return None
    chosen = {name: ears["chosen"][name] for name in ears["tried"][0] if name != "error_rate"}
    error = next(trial["error_rate"] for trial in ears["tried"] if chosen.items() <= trial.items())
    return (
        f"With two ears, what is chosen from the texts of the encoder's decoder and the alignment's "
        f"({', '.join(f'`{name}` {value:g}' for name, value in chosen.items())}) was found on {ears['clips']:,} "
        f"development clips: of {len(ears['tried'])} pairs of weights the one that trusts the alignment least and is "
        f"behind the best by no more than a standard error, {error:.2f} % (the mean over {ears['domains']} sources)."
    )


def stages_table(recipe: Recipe) -> str:
    rows = [f"| stage of {recipe.name} | loss | trained | length |", "|---|---|---|---|"]
    for stage in recipe.stages:
        tuned = [f"{part} ({how})" for part, how in asdict(stage.tune).items() if how not in (None, "frozen")]
        length = f"{stage.steps:,} steps" if stage.steps else f"{stage.epochs:g} epochs"
        length = f"at most {length}, in {stage.minutes:g} minutes" if stage.minutes else length
        rows.append(f"| {stage.name} | {stage.losses} | {', '.join(tuned)} | {length} |")
    return "\n".join(rows)


def not_measured(tasks: list[Task]) -> str:
    commands = [eval_command({"task": task.name}, "CHECKPOINT") for task in tasks]
    lines = "\n".join(f"{command} --output_dir OUT" for command in commands)
    return (
        f"Nothing was measured. What measures it, and puts it here:\n\n```sh\n{lines}\n"
        "audiophi card CHECKPOINT --metrics OUT/metrics.json\n```"
    )


def limits_section(about: About, sources: list[Described], measured: bool) -> str:
    languages = sorted({code for source in sources for code in source.languages})
    heard = f" ({', '.join(languages)})" if languages else ""
    lines = [
        f"It was trained on the data above{heard}: on other languages, accents, noise, telephone lines and music "
        "it may write words that nobody said.",
        "Its figures hold for the data named above, not for yours." if measured else "How good it is, is not known.",
        "Not for decisions about people.",
        *about.limits,
    ]
    return "\n".join(f"- {line}" for line in lines)


def licence_section(licences: dict[str, Licence], header) -> str:
    chosen = header.license if header.license != "other" else f"other ({header.license_name})"
    missing = [name for name, licence in licences.items() if licence.kind == "unknown"]
    lines = [f"This checkpoint: **{chosen}**. The most demanding licence of a part holds for the whole."]
    if missing:
        lines.append(f"Not known is that of {', '.join(missing)}: who uses the model has to find it out.")
    rows = [f"| {name} | {licence} |" for name, licence in licences.items()]
    return "\n".join([" ".join(lines), "", "| part | licence |", "|---|---|", *rows])


def check_card(folder: str | Path, path: str | Path | None = None, inputs: Inputs | None = None) -> list[str]:
    """Lines in which the card at `path` differs from what its sources make, as a diff; none where it says the same."""
    folder = Path(folder)
    path = Path(path or folder / CARD_NAME)
    inputs = inputs or collect(folder, beside=path.parent)
    wanted = str(make_card(folder, inputs)).splitlines()
    return list(
        difflib.unified_diff(path.read_text(encoding="utf-8").splitlines(), wanted, str(path), "sources", lineterm="")
    )
