"""What `eval.py` wrote in metrics.json, as a card's tables and as the Hub's structured results; nothing else."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult

from audiophi.evaluation.predictions import checkpoint_digest
from processing.prompts import INSTRUCTIONS

from .data_sources import About, Described, describe_data, last_part
from .licences import HubAnswers, slug
from .template import CardError


@dataclass(frozen=True)
class Task:
    """How the metrics of one task are shown. `rows`: (label, key); `needed`: further keys that the text tells;
    `optional`: rows that older metrics.json lack."""

    type: str
    name: str
    rows: tuple[tuple[str, str], ...]
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()


SPEECH = Task(
    "automatic-speech-recognition",
    "Speech recognition",
    (
        ("word error rate, %", "wer"),
        ("character error rate, %", "cer"),
        ("word error rate of the alignment head alone, %", "wer_align"),
        ("word error rate with another clip's audio, %", "wer_shuffled_audio"),
        ("word error rate with silence, %", "wer_silence"),
        ("listening gap, points", "listening_gap"),
        ("never stopped, %", "never_stopped"),
    ),
    ("wer_ci95", "wer_ci95_unit", "utterances", "words", "normalizer"),
    ("cer",),
)
CAPTION = Task(
    "audio-text-to-text",
    "Audio captioning",
    (
        ("CIDEr-D", "cider_d"),
        ("CIDEr-D with another clip's audio", "cider_d_shuffled"),
        ("ROUGE-L", "rouge_l"),
        ("BLEU-4", "bleu_4"),
        ("label accuracy, %", "label_accuracy"),
        ("label accuracy with another clip's audio, %", "label_accuracy_shuffled"),
        ("listening gap", "listening_gap"),
        ("never stopped, %", "never_stopped"),
    ),
    ("listening_gap_of", "clips", "references", "distinct_captions"),
)
ALWAYS = ("model", "checkpoint", "settings", "unscored_rows")
GAPS = {  # what the listening gap is the difference of: the one with another clip's audio first
    "wer": ("wer_shuffled_audio", "wer"),
    "cider_d": ("cider_d", "cider_d_shuffled"),
    "label_accuracy": ("label_accuracy", "label_accuracy_shuffled"),
}


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
    caption = "cider_d" in metrics or settings.get("task") == "caption"
    task = CAPTION if caption else SPEECH
    again = f"make it anew: {eval_command(settings, str(folder), caption)} --output_dir OUT"
    wanted = [key for _, key in task.rows if key not in task.optional]
    for key in (*ALWAYS, *wanted, *task.needed):
        if key not in metrics:
            raise CardError(f"{path}: lacks {key!r}, which the card tells; {again}")
    if "data" not in settings:
        raise CardError(f"{path}: does not say in `settings` which data it is of; {again}")
    if metrics[task.rows[0][1]] is None:
        raise CardError(f"{path}: {task.rows[0][1]!r} is null: no row was scored; {again}")
    first, second = (metrics[key] for key in GAPS[metrics["listening_gap_of"] if caption else "wer"])
    gap = metrics["listening_gap"]
    if None not in (first, second, gap) and abs(first - second - gap) > 1e-6:
        raise CardError(f"{path}: listening_gap {gap} is not {first} - {second}: the file was changed; {again}")
    found = checkpoint_digest(str(folder))
    for part, words in (("weights", "weights"), ("generation", "decoding settings (generation_config.json)")):
        if metrics["checkpoint"] is None or metrics["checkpoint"].get(part) != found[part]:
            raise CardError(
                f"{path}: was measured with other {words} than those in {folder} (on {metrics['model']}); {again}"
            )
    return task


def eval_command(settings: dict, model: str, caption: bool = False) -> str:
    """The eval.py command of `settings`; data on somebody's disk by the last part of its path."""
    task = "caption" if caption else settings.get("task", "transcribe")
    usual = {
        "task": "transcribe", "dtype": "float32", "max_new_tokens": 256, "rows": None,
        "instruction": INSTRUCTIONS.get(task),
    }  # fmt: skip
    given = {"model": model, "data": "DATA", **settings, "task": task}
    words = ["python eval.py"]
    for key in ("task", "model", *(key for key in given if key not in ("task", "model"))):
        value = given[key]
        if value is None or key == "rows" or value == usual.get(key):
            continue
        if key in ("data", "audio_folder") and Path(value).is_absolute():
            value = last_part(value)
        words.append(f"--{key} {shlex.quote(str(value))}")
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
    for label, key in task.rows:
        if key not in metrics:
            continue
        cells = [with_interval(column, key) if key in column else "–" for column in filter(None, (metrics, baseline))]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    for key, value in (metrics.get("official") or {}).items():
        rows.append(f"| {key} | {show(value)} |")
    command = eval_command(settings, name, task is CAPTION) + (" --official" if metrics.get("official") else "")
    command += f" --baseline {baseline['model']}" if baseline else ""
    lines = [
        f"### {task.name}: {titled(data, settings)}",
        "",
        f"`{command}`",
        "",
        measured_on(metrics, task),
        "",
        *rows,
    ]
    return "\n".join(lines)


def with_interval(metrics: dict, key: str) -> str:
    interval = metrics.get("wer_ci95") if key == "wer" else None
    return show(metrics[key]) + (f" ({show(interval[0])} to {show(interval[1])})" if interval else "")


def titled(data: Described, settings: dict) -> str:
    split = settings.get("split")
    return data.title + (f", {split}" if split else "")


def measured_on(metrics: dict, task: Task) -> str:
    """How much was scored, and how."""
    parts = []
    if task is SPEECH:
        parts.append(f"{metrics['utterances']:,} clips, {metrics['words']:,} words; {metrics['normalizer']}")
        if metrics["wer_ci95"]:
            parts.append(f"in brackets the 95 % interval over {metrics['wer_ci95_unit']}s")
    else:
        parts.append(f"{metrics['clips']:,} clips, {metrics['references']:,} references, "
                     f"{metrics['distinct_captions']:,} different captions; the listening gap is of "
                     f"`{metrics['listening_gap_of']}`")  # fmt: skip
    if metrics["settings"].get("limit"):
        parts.append(f"only the first {metrics['settings']['limit']:,} rows")
    if metrics["unscored_rows"]:
        parts.append(f"{metrics['unscored_rows']:,} readable rows could not be scored and are not in these figures")
    return "; ".join(parts) + "."


def eval_results(metrics: dict, task: Task, about: About, answers: HubAnswers) -> list[EvalResult]:
    """The Hub's structured results: every score that is defined, under the name that it has in metrics.json."""
    settings, data = metrics["settings"], describe_data(metrics["settings"]["data"], about, answers)
    size = metrics["clips"] if task is CAPTION else metrics["utterances"]
    common = {
        "task_type": task.type,
        "task_name": task.name,
        "dataset_type": data.hub_id or slug(last_part(data.path)),
        "dataset_name": titled(data, settings),
        "dataset_config": data.config,
        "dataset_split": settings.get("split"),
        "dataset_args": {"clips": size},
    }
    found = []
    for label, key in (*task.rows, *((key, key) for key in metrics.get("official") or {})):
        value = metrics[key] if key in metrics else (metrics.get("official") or {}).get(key)
        if value is None:
            continue
        arguments = None
        if key == "wer":
            arguments = {"normalizer": metrics["normalizer"], "ci95": metrics["wer_ci95"]}
        found.append(
            EvalResult(**common, metric_type=key, metric_name=label, metric_value=value, metric_args=arguments)
        )
    return found
