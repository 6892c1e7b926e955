"""Measure an AudioPhi model on a data set, by what its task says, and whether it listens.

    audiophi eval --model DIR_OR_ID --data SPEC --output_dir OUT [--task TASK] [--baseline openai/whisper-tiny.en]

SPEC is any data that the training takes (see audiophi/data/datasets.py): a Hub id, a LibriSpeech tree, a folder with
metadata.jsonl, a JSONL, CSV or Parquet file, a release that is known by its layout. OUT gets predictions.jsonl, one
predictions_CONDITION.jsonl for each further way in which rows are asked, all written as the evaluation goes (an
interrupted one continues), and metrics.json. Exit code 0 only when every readable row was scored.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from audiophi.data.datasets import Examples, load_examples, natural_task
from audiophi.data.example import RowError
from audiophi.evaluation import forgetting
from audiophi.evaluation.conditions import CONDITIONS, Plan, complete
from audiophi.evaluation.loop import Listener, Progress, predict
from audiophi.evaluation.predictions import PredictionFile, checkpoint_digest, fingerprint
from audiophi.tasks import TASKS, default_task
from audiophi.tasks.base import Task, plain
from modeling_audiophi.configuration_audiophi import EARS

from .hear import check_model

COLUMNS = ("audio_column", "text_column", "instruction_column", "answer_column")
UNFINISHED = "unfinished"  # in metrics.json while something is still to come: what lies there is to be continued


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    measured = {name: task for name, task in TASKS.items() if task.report}
    parser = argparse.ArgumentParser(
        prog="audiophi eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve", allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--model", required=True, help="AudioPhi checkpoint, slim or full: folder or Hub id")
    parser.add_argument("--data", required=True, help="what to ask about")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--task", choices=tuple(measured), help=f"default: {default_task().name}")
    for name in COLUMNS:
        parser.add_argument(f"--{name}", help="default: the usual names")
    parser.add_argument("--allow_urls", action="store_true", help="fetch what the data names by URL")
    parser.add_argument("--split")
    parser.add_argument("--language", metavar="CODE", help="that is spoken, by which texts are normalised (de, zh; "
                        "none: not at all); default: a column `language`, or else English")  # fmt: skip
    parser.add_argument("--limit", type=int, help="only the first N rows")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--ctc_weight", type=float, help="share of the alignment head in the beams' scores, 0 to 1 "
                        "(0: the LLM alone); default: the checkpoint's")  # fmt: skip
    parser.add_argument("--hear_with", choices=EARS, help="adapter and alignment, the encoder's own decoder, or both; "
                        "default: the checkpoint's")  # fmt: skip
    parser.add_argument("--instruction", help="what all rows are asked; default: as the row asks, or else the task")
    parser.add_argument("--baseline", metavar="ID_OR_DIR", help="a speech recogniser of transformers, side by side: "
                        "its words, or what the LLM answers that reads them")  # fmt: skip
    parser.add_argument("--forgetting", metavar="DATA", help="text-only rows, asked with and without what training "
                        "changed in the LLM")  # fmt: skip
    parser.add_argument("--conditions", nargs="*", choices=tuple(CONDITIONS), help="further ways to ask all rows; "
                        "default: those of the task; none named: none")  # fmt: skip
    parser.add_argument("--show", type=int, default=0, help="print N answers beside their references")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    shared = {action.dest for action in parser._actions}
    owners: dict[str, list[str]] = {}
    for name, task in measured.items():
        before = set(parser._actions)
        task.add_arguments(parser.add_argument_group(f"--task {name}"))
        for action in set(parser._actions) - before:
            owners.setdefault(action.dest, []).append(name)
    args = parser.parse_args(argv)
    args.chosen, args.task = args.task is not None, args.task or default_task().name
    for name in ("batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.ctc_weight is not None and not 0 <= args.ctc_weight <= 1:
        parser.error("--ctc_weight must be between 0 and 1")
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")
    if args.instruction is not None and not args.instruction.strip():
        parser.error("--instruction is empty")
    for name, tasks in owners.items():
        if args.task not in tasks and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} is for --task {' or '.join(tasks)}")
    if strange := {*(args.conditions or ())} - {*TASKS[args.task].conditions}:
        parser.error(f"--conditions {' '.join(sorted(strange))}: task {args.task} has no such way to ask")
    args.own = {
        name: getattr(args, name) for name, tasks in owners.items() if args.task in tasks and name not in shared
    }
    if args.baseline and not has_baseline(TASKS[args.task]):
        parser.error("--baseline is a speech recogniser: this task has nothing to compare with it")
    return args


def has_baseline(task: Task) -> bool:
    """Whether a recogniser's words are an answer, or an LLM can answer from them."""
    return task.reads_alignment or "text" in task.conditions


# ---- data ------------------------------------------------------------------------------------------------------------


def load_rows(args: argparse.Namespace) -> tuple[Examples, list[str]]:
    """The rows to evaluate on, and the classes of the whole data set.

    Raises ValueError for data that are another task's, and for a missing package that its rows need.
    """
    spec = {"path": args.data, "task": args.task, "allow_urls": args.allow_urls}
    spec |= {name: getattr(args, name) for name in COLUMNS}
    spec |= {name: args.own[name] for name in ("label_column", "audio_folder") if args.own.get(name)}
    spec |= {"split": args.split, "instruction": args.instruction, "language": args.language}
    rows = load_examples(spec).for_evaluation()
    natural = natural_task(rows.columns)
    if natural.name != args.task and not args.chosen:
        raise ValueError(f"{args.data}: its rows are for another task, add --task {natural.name} (or --task {args.task}"
                         " to ask for it all the same).")  # fmt: skip
    classes = sorted({plain(label) for label in labels_of(rows) if label})
    rows = rows if args.limit is None else rows.take(args.limit)
    check_rows(rows, TASKS[args.task], natural)
    return rows, classes


def labels_of(rows: Examples) -> list[str]:
    """The class of every row, where there is such a column."""
    column = rows.columns.by.get("label")
    if column is None:
        return []
    table = rows.rows if isinstance(rows.rows, list) else rows.rows.select_columns([column])
    name = rows._labels.get(column, str)
    values = (table[int(number)].get(column) for number in rows.numbers)
    return [name(value) for value in values if value is not None]


def check_rows(rows: Examples, task: Task, natural: Task) -> None:
    """Whatever is missing is missing now, not after the decoding. Audio is not read."""
    first, usable = None, 0
    for number in range(len(rows)):
        try:
            task.fields(rows[number], "")
        except RowError as error:
            first = first or error
            continue
        usable += 1
        if not isinstance(rows.rows, list):
            return  # rows of a table hold audio, which would all be read
    if not usable:
        hint = f"; these rows are for --task {natural.name}" if natural is not task else ""
        raise ValueError(f"{rows.path}: no row can be used: {first}{hint}")


# ---- predictions -----------------------------------------------------------------------------------------------------


def predict_all(rows, hear, task: Task, path: Path, settings: dict, fresh: bool, args, name: str) -> list[dict]:
    """Predictions of all rows, those of an interrupted run taken from the file, with progress on the terminal."""
    with PredictionFile(path, settings, fresh) as file:
        done = {prediction["row"] for prediction in file.predictions}
        if done:
            print(f"{name}: {len(done)} of {len(rows)} rows are already in {file.path}")
        progress = Progress(len(rows) - len(done))
        last = time.monotonic()
        for prediction in predict(rows, hear, task, args.batch_size, hear.sampling_rate, done, progress):
            file.add(prediction)
            if time.monotonic() - last > 10 or progress.done_rows == progress.rows:
                last = time.monotonic()
                scored = [p for p in file.predictions if "error" not in p]
                told = f", {task.so_far(scored)}" if scored else ""
                print(f"{name}: {len(file.predictions)}/{len(rows)} rows, ETA {progress.eta():.0f} s{told}", flush=True)
        return file.predictions


def predict_condition(name: str, rows, own: list[dict], hear, task, settings, fresh, args) -> list[dict] | None:
    """Predictions of one further way to ask every row that was scored; None where there is no such way."""
    scored = [p for p in own if "error" not in p]
    plan: Plan = CONDITIONS[name](rows, scored, task, hear.sampling_rate)
    if not plan:
        return None
    path = args.output_dir / f"predictions_{name}.jsonl"
    # What is asked depends on which rows were scored.
    settings = {**settings, "condition": name, "scored": len(scored)}
    asked = predict_all(plan, hear, task, path, settings, fresh, args, name)
    return complete(plan, asked, own, rows, task)


def evaluate(args: argparse.Namespace, report: Callable[[dict], None]) -> tuple[dict, list[dict]]:
    """The metrics of one evaluation, and the readable rows that could not be scored. `report` is called with the
    model's own scores, before anything else is measured."""
    task = TASKS[args.task]
    check_model(args.model)
    rows, classes = load_rows(args)
    task.check(args)
    instruction = args.instruction or (task.wordings[0] if task.wordings else None)
    settings = {
        "data": args.data, **{name: getattr(args, name) for name in COLUMNS}, "split": args.split, "limit": args.limit,
        "language": args.language,
        "rows": len(rows), "dtype": args.dtype, "max_new_tokens": args.max_new_tokens, "ctc_weight": args.ctc_weight,
        "hear_with": args.hear_with,
        "task": args.task, "allow_urls": args.allow_urls or None,
        **{name: value or None for name, value in args.own.items()},
    }  # fmt: skip

    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "metrics.json"
    # With a whole metrics.json the last evaluation was complete, so what lies here is not continued but replaced.
    fresh = path.exists() and UNFINISHED not in json.loads(path.read_text(encoding="utf-8"))
    path.unlink(missing_ok=True)

    listen = load_listener(args)
    ours = {**settings, "model": fingerprint(args.model), "instruction": instruction}
    predictions = predict_all(rows, listen, task, args.output_dir / "predictions.jsonl", ours, fresh, args, "model")
    conditions = {}
    listen.with_alignment = False
    for name in task.conditions if args.conditions is None else args.conditions:
        asked = predict_condition(name, rows, predictions, listen, task, ours, fresh, args)
        if asked is not None:
            conditions[name] = asked
    scores = task.summarize(predictions, conditions=conditions, classes=classes, **args.own)
    unreadable = [p for p in predictions if p.get("readable") is False]
    unscored = [p for p in predictions if p.get("readable")]
    metrics = {
        **scores,
        "unreadable_rows": len(unreadable),
        "unscored_rows": len(unscored),
        "model": args.model,
        "checkpoint": checkpoint_digest(args.model),
        "settings": {**settings, "instruction": instruction},
    }
    for prediction in (*unreadable, *unscored):
        print(f"row {prediction['row']} not scored: {prediction['error']}", file=sys.stderr)

    further = {"baseline": measure_baseline, "forgetting": measure_forgetting}
    waiting = [name for name in further if getattr(args, name)]
    save(path, {**metrics, **({UNFINISHED: waiting} if waiting else {})})
    report(metrics)
    for number, name in enumerate(waiting, 1):
        metrics[name] = further[name](args, task, rows, listen, settings, fresh)
        save(path, {**metrics, **({UNFINISHED: waiting[number:]} if waiting[number:] else {})})
    return metrics, unscored


def measure_baseline(args, task: Task, rows, listen: Listener, settings: dict, fresh: bool) -> dict:
    """The scores of a recogniser's words on the same rows, or of what the LLM answers that reads them."""
    from audiophi.evaluation.baseline import BaselineListener, Cascade

    hear = BaselineListener(args.baseline, args.device, getattr(torch, args.dtype))
    theirs = {**settings, "model": fingerprint(args.baseline)}
    if task.reads_alignment:
        theirs["max_new_tokens"] = None  # the recogniser's own limit
    else:
        hear = Cascade(hear, listen)
        theirs |= {"reader": fingerprint(args.model), "instruction": args.instruction}
    path = args.output_dir / "baseline_predictions.jsonl"
    predictions = predict_all(rows, hear, task, path, theirs, fresh, args, "baseline")
    return {"model": args.baseline, **task.summarize(predictions)}


def measure_forgetting(args, task: Task, rows, listen: Listener, settings: dict, fresh: bool) -> dict:
    """{"data", "rows", score, score_before, "delta"} of text-only rows, by the main score of their task."""
    texts = load_examples({"path": args.forgetting})
    theirs = TASKS[texts.task]
    hear = Listener(listen.engine, theirs, **listen.settings)
    only = TextOnly(texts)
    how = {"data": args.forgetting, "dtype": args.dtype, "max_new_tokens": args.max_new_tokens,
           "model": fingerprint(args.model)}  # fmt: skip
    path = args.output_dir / "predictions_forgetting.jsonl"
    after = predict_all(only, hear, theirs, path, how, fresh, args, "forgetting")
    before = after
    if forgetting.is_changed(listen.engine.model):
        with forgetting.as_before(listen.engine.model):
            path = args.output_dir / "predictions_forgetting_before.jsonl"
            before = predict_all(only, hear, theirs, path, {**how, "before": True}, fresh, args, "before training")
    for prediction in after:
        if "error" in prediction:
            print(f"--forgetting: row {prediction['row']} not scored: {prediction['error']}", file=sys.stderr)
    now, then = (theirs.summarize(predictions)[theirs.main_score] for predictions in (after, before))
    name = theirs.main_score
    return {
        "data": args.forgetting,
        "rows": sum("error" not in prediction for prediction in after),
        name: now,
        f"{name}_before": then,
        "delta": None if None in (now, then) else now - then,
    }


class TextOnly:
    """Rows of a data set, those that have audio as errors."""

    def __init__(self, examples: Examples):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int):
        example = self.examples[number]
        if example.clips:
            raise RowError(f"{example.id}: has audio; --forgetting is for rows of text alone")
        return example


def load_listener(args: argparse.Namespace) -> Listener:
    """The model and its processor, ready to be asked."""
    from modeling_audiophi import AudioPhiForConditionalGeneration
    from modeling_audiophi.configuration_audiophi import check_ears
    from modeling_audiophi.engine_audiophi import Engine
    from processing import AudioPhiProcessor

    dtype, task = getattr(torch, args.dtype), TASKS[args.task]
    model = AudioPhiForConditionalGeneration.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    engine = Engine(model, AudioPhiProcessor.from_pretrained(args.model))
    settings = {"max_new_tokens": args.max_new_tokens}
    if args.ctc_weight is not None:
        settings["ctc_weight"] = args.ctc_weight
    if args.hear_with is not None:
        check_ears(model.config, args.hear_with)
        settings["hear_with"] = args.hear_with
    return Listener(engine, task, args.instruction, with_alignment=task.reads_alignment, **settings)


def save(path: Path, metrics: dict) -> None:
    """Write a file that is either the old or the new one at any moment."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


# ---- the terminal ----------------------------------------------------------------------------------------------------


def print_table(metrics: dict, task: Task) -> None:
    """The scores, beside the baseline's where there is one."""
    task = task.scored_as(metrics)
    columns = [("", metrics)] if "baseline" not in metrics else [("model", metrics), ("baseline", metrics["baseline"])]
    print(f"\n{'':34}" + "".join(f"{title:>20}" for title, _ in columns))
    for label, key in task.table:
        print(f"{label:34}" + "".join(f"{show(column.get(key)):>20}" for _, column in columns))
    for key, value in metrics.items():
        if isinstance(value, dict) and key not in ("settings", "checkpoint", "baseline"):
            print_group(key, value)
    shown = {key for _, key in task.table}
    notes = [f"{key.replace('_', ' ')}: {show(metrics[key])}" for key in task.report.needed if key in metrics
             and key not in shown and not isinstance(metrics[key], dict)]  # fmt: skip
    if notes:
        print("; ".join(notes))


def print_group(name: str, values: dict) -> None:
    """Scores of parts of the rows, or of something beside them."""
    if values:
        print(f"{name.replace('_', ' ')}:")
    for key, value in values.items():
        shown = ", ".join(f"{k} {show(v)}" for k, v in value.items()) if isinstance(value, dict) else show(value)
        print(f"  {key:32}{shown:>20}")


def print_examples(path: Path, number: int) -> None:
    """The first answers in the file of predictions, in the order of the data."""
    predictions = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    for prediction in sorted(predictions, key=lambda p: p["row"])[:number]:
        if "error" not in prediction:
            print(f"\n{prediction['id']}\n  right: {prediction['reference']}\n  heard: {prediction['hypothesis']}")
            if prediction["hypothesis_align"] is not None:
                print(f"  alone: {prediction['hypothesis_align']}    (the alignment head without the LLM)")


def show(value) -> str:
    """A score as the table writes it."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return " to ".join(f"{bound:.2f}" for bound in value)
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    task = TASKS[args.task]

    def report(metrics: dict) -> None:
        print_examples(args.output_dir / "predictions.jsonl", args.show)
        print_table(metrics, task)
        sys.stdout.flush()

    try:
        metrics, unscored = evaluate(args, report)
    except (ValueError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 1
    if "baseline" in metrics or "forgetting" in metrics:
        print_table(metrics, task)
    if metrics["unreadable_rows"]:
        print(f"{metrics['unreadable_rows']} rows could not be used (no text, no usable audio) and were left out")
    if unscored:
        print(f"{len(unscored)} readable rows could not be scored", file=sys.stderr)
    scored = metrics[task.report.size]
    if not scored:
        print("no row was scored", file=sys.stderr)
    return 0 if scored and not unscored else 1


if __name__ == "__main__":
    sys.exit(main())
