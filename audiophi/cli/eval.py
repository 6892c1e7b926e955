"""Word error rate of an AudioPhi model, or how good its captions of sounds are, and whether it listens.

    audiophi eval --model DIR_OR_ID --data SPEC --output_dir OUT [--baseline openai/whisper-tiny.en]
    audiophi eval --task caption --model DIR_OR_ID --data SPEC --output_dir OUT [--label_column label] [--official]

SPEC is any data that the training takes (see audiophi/data/datasets.py): a Hub id, a LibriSpeech tree, a folder with
metadata.jsonl, a JSONL, CSV or Parquet file; for captions also the folder of Clotho, AudioCaps, ESC-50 or UrbanSound8K,
and any data with class labels. OUT gets predictions.jsonl, written as the evaluation goes (an interrupted
one continues), and metrics.json. Exit code 0 only when every readable row was scored.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from audiophi.data.datasets import load_audio_dataset
from audiophi.evaluation import caption_scoring
from audiophi.evaluation.caption_metrics import caption_scores, official_scores
from audiophi.evaluation.metrics import percent
from audiophi.evaluation.predictions import PredictionFile, checkpoint_digest, fingerprint
from audiophi.evaluation.scoring import (
    AudioPhiTranscriber,
    Transcriber,
    summarize,
    transcribe_dataset,
    transcribe_silence,
)
from processing.prompts import INSTRUCTIONS

TABLE = (
    ("WER %", "wer"),
    ("  95 % interval", "wer_ci95"),
    ("CER %", "cer"),
    ("substitutions", "substitutions"),
    ("deletions", "deletions"),
    ("insertions", "insertions"),
    ("words", "words"),
    ("utterances", "utterances"),
    ("WER %, alignment head alone", "wer_align"),
    ("WER %, another clip's audio", "wer_shuffled_audio"),
    ("WER %, silence", "wer_silence"),
    ("listening gap", "listening_gap"),
    ("never stopped %", "never_stopped"),
    ("empty %", "empty"),
    ("real-time factor", "rtf"),
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="audiophi eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="AudioPhi checkpoint, slim or full: folder or Hub id")
    parser.add_argument("--data", required=True, help="what to transcribe")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--task", choices=tuple(INSTRUCTIONS), default="transcribe")
    parser.add_argument("--audio_column")
    parser.add_argument("--text_column")
    parser.add_argument("--label_column", help="captions: the class of a sound; default: label, category or class")
    parser.add_argument("--audio_folder", help="captions: where the audio of Clotho or AudioCaps is, if elsewhere")
    parser.add_argument("--allow_urls", action="store_true", help="fetch what the data names by URL")
    parser.add_argument("--official", action="store_true", help="captions: METEOR, SPICE, SPIDEr-FL, FENSE too (Java)")
    parser.add_argument("--split")
    parser.add_argument("--limit", type=int, help="only the first N rows")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--ctc_weight", type=float, help="share of the alignment head in the beams' scores, 0 to 1 "
                        "(0: the LLM alone); default: the checkpoint's")  # fmt: skip
    parser.add_argument("--instruction", help=f"default, by the task: {' '.join(INSTRUCTIONS.values())}")
    parser.add_argument("--baseline", metavar="ID_OR_DIR", help="a speech recogniser of transformers, side by side")
    parser.add_argument("--show", type=int, default=0, help="print N transcripts beside their references")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    args = parser.parse_args(argv)
    for name in ("batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.ctc_weight is not None and not 0 <= args.ctc_weight <= 1:
        parser.error("--ctc_weight must be between 0 and 1")
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")
    for name in ("label_column", "audio_folder", "official"):
        if args.task != "caption" and getattr(args, name):
            parser.error(f"--{name} is for --task caption")
    if args.task == "caption" and args.baseline:
        parser.error("--baseline is a speech recogniser: it has no captions to compare with")
    args.instruction = args.instruction or INSTRUCTIONS[args.task]
    return args


def transcribe_all(rows, transcribe: Transcriber, file: PredictionFile, args, name: str) -> list[dict]:
    """Predictions of all rows, those of an interrupted run taken from `file`, with progress on the terminal."""
    start = last = time.monotonic()
    new = 0
    todo = len(rows) - len(file.predictions)
    done = {prediction["row"] for prediction in file.predictions}
    if done:
        print(f"{name}: {len(done)} of {len(rows)} rows are already in {file.path}")
    score = {"score": caption_scoring.caption_fields} if args.task == "caption" else {}
    for prediction in transcribe_dataset(rows, transcribe, args.batch_size, transcribe.sampling_rate, done, **score):
        file.add(prediction)
        new += 1
        if time.monotonic() - last > 10 or new == todo:
            last = time.monotonic()
            eta = (last - start) / new * (todo - new)
            print(f"{name}: {len(file.predictions)}/{len(rows)} rows, ETA {eta:.0f} s{so_far(file, args)}", flush=True)
    return file.predictions


def so_far(file: PredictionFile, args: argparse.Namespace) -> str:
    """The word error rate up to now, or the latest caption."""
    scored = [p for p in file.predictions if "error" not in p]
    if args.task == "caption":
        return f", heard: {scored[-1]['hypothesis']}" if scored else ""
    errors = sum(p["substitutions"] + p["deletions"] + p["insertions"] for p in scored)
    return f", WER so far {show(percent(errors, sum(p['words'] for p in scored)))} %"


def load_rows(args: argparse.Namespace) -> tuple:
    """The data set to evaluate on, and the classes of the whole of it.

    Raises ValueError for captions where transcripts are asked for.
    """
    captions = {"label_column": args.label_column, "task": "caption"} if args.task == "caption" else {}
    spec = {"path": args.data, "allow_urls": args.allow_urls}
    spec |= {"audio_folder": args.audio_folder} if args.audio_folder else {}
    rows = load_audio_dataset(spec, args.audio_column, args.text_column, args.split, **captions)
    if args.task != "caption" and "captions" in rows.column_names:
        raise ValueError(f"{args.data}: holds captions of sounds, not transcripts; add --task caption.")
    classes = sorted({label for label in rows["label"] if label}) if args.task == "caption" else []
    return rows if args.limit is None else rows.take(args.limit), classes


def evaluate(args: argparse.Namespace) -> tuple[dict, list[dict]]:
    """The metrics of one evaluation, and the readable rows that could not be scored."""
    rows, classes = load_rows(args)
    if args.task == "caption":  # whatever is missing is missing now, not after the decoding
        probe = (["a dog barks", "it is raining"], [["a dog is barking"], ["rain falls"]])
        for metric in (caption_scores, *([official_scores] if args.official else [])):
            metric(*probe)
    dtype = getattr(torch, args.dtype)
    settings = {
        "data": args.data, "audio_column": args.audio_column, "text_column": args.text_column, "split": args.split,
        "limit": args.limit, "rows": len(rows), "dtype": args.dtype, "max_new_tokens": args.max_new_tokens,
        "ctc_weight": args.ctc_weight, "task": args.task, "label_column": args.label_column,
        "audio_folder": args.audio_folder,
    }  # fmt: skip

    args.output_dir.mkdir(parents=True, exist_ok=True)
    metrics_path = args.output_dir / "metrics.json"
    # With metrics.json the last evaluation was complete, so what lies here is not continued but replaced.
    fresh = metrics_path.exists()
    metrics_path.unlink(missing_ok=True)

    transcribe = load_transcriber(args, dtype)
    ours = {**settings, "model": fingerprint(args.model), "instruction": args.instruction}
    with PredictionFile(args.output_dir / "predictions.jsonl", ours, fresh) as file:
        predictions = transcribe_all(rows, transcribe, file, args, "model")
    if args.task == "caption":
        scores = caption_scoring.summarize_captions(predictions, classes)
        if args.official:
            scored = [p for p in predictions if "error" not in p]
            texts = ([p["hypothesis"] for p in scored], [p["references"] for p in scored])
            scores["official"] = official_scores(*texts) if len(scored) > 1 else None
    else:
        transcribe.with_alignment = False
        seconds = [prediction["seconds"] for prediction in predictions if "error" not in prediction]
        silence = transcribe_silence(seconds, transcribe, args.batch_size, transcribe.sampling_rate)
        scores = summarize(predictions, silence)
    unreadable = [p for p in predictions if p.get("readable") is False]
    unscored = [p for p in predictions if p.get("readable")]
    metrics = {
        **scores,
        "unreadable_rows": len(unreadable),
        "unscored_rows": len(unscored),
        "model": args.model,
        "checkpoint": checkpoint_digest(args.model),
        "settings": {**settings, "instruction": args.instruction},
    }
    for prediction in (*unreadable, *unscored):
        print(f"row {prediction['row']} not scored: {prediction['error']}", file=sys.stderr)

    if args.baseline:
        from audiophi.evaluation.baseline import BaselineTranscriber

        del transcribe
        baseline = BaselineTranscriber(args.baseline, args.device, dtype)
        theirs = {**settings, "model": fingerprint(args.baseline), "max_new_tokens": None}  # the model's own limit
        with PredictionFile(args.output_dir / "baseline_predictions.jsonl", theirs, fresh) as file:
            predictions = transcribe_all(rows, baseline, file, args, "baseline")
        metrics["baseline"] = {"model": args.baseline, **summarize(predictions)}

    write_atomically(metrics_path, json.dumps(metrics, indent=2) + "\n")
    return metrics, unscored


def load_transcriber(args: argparse.Namespace, dtype: torch.dtype) -> AudioPhiTranscriber:
    """The model and its processor, ready to transcribe."""
    from modeling_audiophi import AudioPhiForConditionalGeneration
    from processing import AudioPhiProcessor

    model = AudioPhiForConditionalGeneration.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    processor = AudioPhiProcessor.from_pretrained(args.model)
    caption = args.task == "caption"  # the alignment head reads words in order: it has no part in a caption
    ctc_weight = 0.0 if caption and args.ctc_weight is None else args.ctc_weight
    return AudioPhiTranscriber(
        model, processor, args.instruction, args.max_new_tokens, ctc_weight, with_alignment=not caption
    )


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is either the old or the new one at any moment."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def print_table(metrics: dict) -> None:
    """The scores, beside the baseline's where there is one."""
    columns = [("", metrics)] if "baseline" not in metrics else [("model", metrics), ("baseline", metrics["baseline"])]
    print(f"\n{'':30}" + "".join(f"{title:>20}" for title, _ in columns))
    table = caption_scoring.TABLE if "cider_d" in metrics else TABLE
    for label, key in table:
        print(f"{label:30}" + "".join(f"{show(column[key]):>20}" for _, column in columns))
    if "cider_d" in metrics:
        for key, value in (metrics.get("official") or {}).items():
            print(f"{key:30}{show(value):>20}")
        print(f"{metrics['references']} references; the listening gap is of {metrics['listening_gap_of']}")
        return
    print(f"normaliser: {metrics['normalizer']}; interval over {metrics['wer_ci95_unit']}s")


def print_examples(path: Path, number: int) -> None:
    """The first transcripts in the file of predictions, in the order of the data."""
    predictions = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    for prediction in sorted(predictions, key=lambda p: p["row"])[:number]:
        if "error" not in prediction:
            print(f"\n{prediction['id']}\n  said:  {prediction['reference']}\n  heard: {prediction['hypothesis']}")
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
    try:
        metrics, unscored = evaluate(args)
    except (ValueError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 1
    print_examples(args.output_dir / "predictions.jsonl", args.show)
    print_table(metrics)
    if metrics["unreadable_rows"]:
        print(f"{metrics['unreadable_rows']} rows have no text or no usable audio and were left out")
    if unscored:
        print(f"{len(unscored)} readable rows could not be scored", file=sys.stderr)
    scored = metrics["clips" if args.task == "caption" else "utterances"]
    if not scored:
        print("no row was scored", file=sys.stderr)
    return 0 if scored and not unscored else 1
