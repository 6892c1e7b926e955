"""What `eval.py` wrote in metrics.json, as a card's tables and as the Hub's structured results; nothing else."""

import json
import shlex
from pathlib import Path

from huggingface_hub import EvalResult

from audiophi.evaluation.predictions import checkpoint_digest
from audiophi.tasks import TASKS, default_task
from audiophi.tasks.base import Task

from .data_sources import About, Described, describe_data, last_part
from .licences import HubAnswers, slug
from .template import CardError

ALWAYS = ("model", "checkpoint", "settings", "unscored_rows")
USUAL = {"dtype": "float32", "max_new_tokens": 256, "rows": None}  # what eval.py takes where nothing is said


def read_metrics(path: Path) -> dict:
    """CardError for a file that is no metrics.json."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CardError(f"{path}: cannot be read as metrics.json ({error})") from error
    if not isinstance(metrics, dict):
        raise CardError(f"{path}: is no metrics.json of eval.py")
    return metrics


def check_metrics(metrics: dict, path: str, folder: Path) -> Task:
    """The task of `metrics`, once they are whole and belong to the checkpoint in `folder`.

    CardError naming the key that is missing, or what does not fit, and the command that makes the file anew.
    """
    settings = metrics.get("settings") or {}
    again = f"make it anew: {eval_command(settings, str(folder))} --output_dir OUT"
    task = TASKS.get(settings.get("task", default_task().name))
    task = task and task.scored_as(metrics)
    report = task.report if task else None
    if report is None:
        raise CardError(f"{path}: is of the task {settings['task']!r}, which nobody knows how to show; {again}")
    wanted = [key for _, key in report.rows if key not in report.optional]
    for key in (*ALWAYS, *wanted, *report.needed, report.size, *(["listening_gap"] if report.gap else ())):
        if key not in metrics:
            raise CardError(f"{path}: lacks {key!r}, which the card tells; {again}")
    if "data" not in settings:
        raise CardError(f"{path}: does not say in `settings` which data it is of; {again}")
    main_score = report.rows[0][1]
    if metrics[main_score] is None:
        raise CardError(f"{path}: {main_score!r} is null: no row was scored; {again}")
    for of, (first, second) in report.gap.items():
        values = (metrics[first], metrics[second], metrics["listening_gap"])
        if of in (None, metrics.get("listening_gap_of")) and None not in values:
            if abs(values[0] - values[1] - values[2]) > 1e-6:
                raise CardError(
                    f"{path}: listening_gap {values[2]} is not {values[0]} - {values[1]}: the file was changed; {again}"
                )
    found = checkpoint_digest(str(folder))
    for part, words in (("weights", "weights"), ("generation", "decoding settings (generation_config.json)")):
        if metrics["checkpoint"] is None or metrics["checkpoint"].get(part) != found[part]:
            raise CardError(
                f"{path}: was measured with other {words} than those in {folder} (on {metrics['model']}); {again}"
            )
    return task


def eval_command(settings: dict, model: str) -> str:
    """The eval.py command of `settings`; data on somebody's disk by the last part of its path."""
    name = settings.get("task", default_task().name)
    task = TASKS.get(name)
    usual = {**USUAL, "task": default_task().name, "instruction": task.wordings[0] if task and task.wordings else None}
    given = {"model": model, "data": "DATA", **settings, "task": name}
    words = ["python eval.py"]
    for key in ("task", "model", *(key for key in given if key not in ("task", "model"))):
        value = given[key]
        if value is None or value is False or key == "rows" or value == usual.get(key):
            continue
        if key in ("data", "audio_folder") and Path(value).is_absolute():
            value = last_part(value)
        words.append(f"--{key}" if value is True else f"--{key} {shlex.quote(str(value))}")
    return " ".join(words)


def show(value) -> str:
    """A score as the card writes it; a dash where it is undefined."""
    return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def results_section(metrics: dict, task: Task, name: str, about: About, answers: HubAnswers) -> str:
    """Markdown of one evaluation: what was measured on, the command, the table."""
    settings, data = metrics["settings"], describe_data(metrics["settings"]["data"], about, answers)
    baseline = metrics.get("baseline")
    rows = [
        f"| | {name}" + (f" | {baseline['model']}" if baseline else "") + " |",
        "|---|---|" + "---|" * bool(baseline),
    ]
    for label, key in task.report.rows:
        if key not in metrics:
            continue
        cells = [with_interval(column, key) if key in column else "–" for column in filter(None, (metrics, baseline))]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    for key, value in (metrics.get("official") or {}).items():
        rows.append(f"| {key} | {show(value)} |")
    command = eval_command(settings, name)
    command += f" --baseline {baseline['model']}" if baseline else ""
    lines = [
        f"### {task.report.name}: {titled(data, settings)}",
        "",
        f"`{command}`",
        "",
        measured_on(metrics, task),
        "",
        *rows,
        *(line for key in task.report.needed if isinstance(metrics[key], dict) for line in parts_table(key, metrics)),
    ]
    return "\n".join(lines)


def parts_table(key: str, metrics: dict) -> list[str]:
    """Scores of parts of the rows: {part: {score: value}} as a table after an empty line; none where there are none."""
    parts = metrics[key]
    columns = list(dict.fromkeys(name for scores in parts.values() for name in scores))
    if not columns:
        return []
    rows = [f"| {part} | {' | '.join(show(scores.get(name)) for name in columns)} |" for part, scores in parts.items()]
    return ["", f"| {key.replace('_', ' ')} | {' | '.join(columns)} |", "|---|" + "---|" * len(columns), *rows]


def with_interval(metrics: dict, key: str) -> str:
    interval = metrics.get(f"{key}_ci95")
    return show(metrics[key]) + (f" ({show(interval[0])} to {show(interval[1])})" if interval else "")


def titled(data: Described, settings: dict) -> str:
    split = settings.get("split")
    return data.title + (f", {split}" if split else "")


def measured_on(metrics: dict, task: Task) -> str:
    """How much was scored, and how."""
    parts = []
    for key in dict.fromkeys((task.report.size, *task.report.needed)):
        value, name = metrics[key], key.replace("_", " ")
        if key.endswith("_ci95"):
            if value:
                parts.append(f"in brackets the 95 % interval over {metrics.get(f'{key}_unit', 'row')}s")
        elif isinstance(value, int):
            parts.append(f"{value:,} {name}")
        elif isinstance(value, str) and not key.endswith("_ci95_unit"):
            parts.append(f"{name}: {value}")
    if metrics["settings"].get("limit"):
        parts.append(f"only the first {metrics['settings']['limit']:,} rows")
    if metrics["unscored_rows"]:
        parts.append(f"{metrics['unscored_rows']:,} readable rows could not be scored and are not in these figures")
    return "; ".join(parts) + "."


def eval_results(metrics: dict, task: Task, about: About, answers: HubAnswers) -> list[EvalResult]:
    """The Hub's structured results: every score that is defined, under the name that it has in metrics.json."""
    settings, data = metrics["settings"], describe_data(metrics["settings"]["data"], about, answers)
    common = {
        "task_type": task.report.type,
        "task_name": task.report.name,
        "dataset_type": data.hub_id or slug(last_part(data.path)),
        "dataset_name": titled(data, settings),
        "dataset_config": data.config,
        "dataset_split": settings.get("split"),
        "dataset_args": {task.report.size: metrics[task.report.size]},
    }
    found = []
    for label, key in (*task.report.rows, *((key, key) for key in metrics.get("official") or {})):
        value = metrics[key] if key in metrics else (metrics.get("official") or {}).get(key)
        if value is None:
            continue
        arguments = None
        if f"{key}_ci95" in metrics:
            arguments = {"ci95": metrics[f"{key}_ci95"]}
            arguments |= {"normalizer": metrics["normalizer"]} if "normalizer" in metrics else {}
        found.append(
            EvalResult(**common, metric_type=key, metric_name=label, metric_value=value, metric_args=arguments)
        )
    return found
