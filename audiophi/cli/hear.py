"""What `perform.py` and `ask.py` share: which files, one model for all of them, results as they come."""

import argparse
import json
import sys
from pathlib import Path

from .results import ResultFile, when_changed

STDIN = "-"
SUBTITLES = {"srt": ("", ","), "vtt": ("WEBVTT\n\n", ".")}  # what begins the file, and the point of seconds
DEFAULT_MODEL = Path(__file__).resolve().parents[2] / "checkpoints" / "audiophi-tiny"


def add_hearing_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all of them have."""
    in_clone = DEFAULT_MODEL.is_dir()
    parser.add_argument(
        "--model", required=not in_clone, default=str(DEFAULT_MODEL) if in_clone else None,
        help="checkpoint: folder or Hub id; in a clone of AudioPhi by default checkpoints/audiophi-tiny",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="RESULTS.jsonl", help="write results there, one JSON line per "
                        "file as it is done, instead of printing them; files already in it are skipped")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=1, help="files (or pieces of one) decoded at a time")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="per file, or per piece of a long one")
    parser.add_argument("--num_beams", type=int, help="default: the checkpoint's")
    add_model_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """How `load_pipeline` loads."""
    # No choices: to know them is to import transformers, which takes seconds.
    parser.add_argument("--hear_with", metavar="{alignment,decoder,both}", help="adapter and alignment, the encoder's "
                        "own decoder, or both; default: the checkpoint's")  # fmt: skip
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")


def find_files(names: list[str]) -> list[str]:
    """Files as given, folders replaced by the audio files in them, each once. ValueError for a folder without any."""
    from audiophi.data.dataset_files import AUDIO_SUFFIXES, audio_files

    found = []
    for name in names:
        if not Path(name).is_dir():
            found.append(name)
            continue
        inside = list(map(str, audio_files(Path(name))))
        if not inside:
            raise ValueError(f"{name}: no audio files in this folder ({', '.join(sorted(AUDIO_SUFFIXES))})")
        found += inside
    return list(dict.fromkeys(found))


def check_model(model: str) -> None:
    """FileNotFoundError for what is neither a checkpoint's folder nor could be one's id on the Hub."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise FileNotFoundError(f"{model}: this folder holds no config.json, so it is no checkpoint")
    elif model.count("/") != 1 or model.startswith(("/", ".", "~")) or folder.exists() or folder.parent.is_dir():
        raise FileNotFoundError(f"{model}: no such folder, and no id of the Hub (org/name)")


def load_pipeline(args: argparse.Namespace):
    """The pipeline of `args.model`. OSError or ValueError where it cannot be loaded."""
    import torch
    from transformers import pipeline
    from transformers.utils import logging

    from modeling_audiophi import AudioPhiForConditionalGeneration
    from modeling_audiophi.configuration_audiophi import check_ears
    from processing import AudioPhiProcessor

    check_model(args.model)
    logging.disable_progress_bar()  # of reading the weights: the one to be seen counts files
    # Loaded here, because pipeline() wraps what goes wrong into pages of tracebacks.
    processor = AudioPhiProcessor.from_pretrained(args.model)
    model = AudioPhiForConditionalGeneration.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    if args.hear_with:
        check_ears(model.config, args.hear_with)
        model.config.hear_with = args.hear_with
    return pipeline("audio-text-to-text", model=model, processor=processor, device=args.device)


def hear(
    args: argparse.Namespace, question: dict[str, str], form: str, timestamps: str = "piece", confidence: bool = False
) -> int:
    """Ask `question` ({"task": name} or {"instruction": words}) about every file, print or write the answers in `form`,
    with times of each piece or word, and how sure each word is → exit code. OSError, ValueError where no file can be
    heard at all."""
    from tqdm import tqdm

    for name in ("batch_size", "max_new_tokens", "num_beams"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            args.error(f"--{name} must be at least 1")
    files = find_files(args.files)
    if form in SUBTITLES and (len(files) > 1 or args.output):
        args.error(f"--format {form} is for one file, printed; with --output the times of many are in the JSON lines")
    failed = 0
    made_with = {name: getattr(args, name) for name in ("max_new_tokens", "num_beams", "hear_with", "dtype")}
    made_with["model"] = newest_change(args.model)
    made_with |= {"timestamps": timestamps} if timestamps == "word" else {}
    made_with |= {"confidence": True} if confidence else {}
    with ResultFile(args.output, {"model": str(args.model), **question, "made_with": made_with}) as results:
        todo = [file for file in files if file not in results.done or file == STDIN]
        if len(todo) < len(files):
            print(f"{len(files) - len(todo)} of {len(files)} files are already in {args.output}", file=sys.stderr)
        if not todo:
            return 0
        pipe = load_pipeline(args)
        settings = {**question, "batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
        if args.num_beams:
            settings["num_beams"] = args.num_beams
        # A generator, because a list would be answered only when all of it is done.
        settings["return_timestamps"] = "word" if timestamps == "word" else True
        settings |= {"return_confidence": True} if confidence else {}
        answers = pipe((sys.stdin.buffer if file == STDIN else file for file in todo), **settings)
        # Silent where nobody watches (disable=None) and for a single file.
        with tqdm(
            zip(todo, answers, strict=True), total=len(todo), unit="file", disable=None if todo[1:] else True
        ) as bar:
            for file, answer in bar:
                result = as_result(file, answer)
                results.add(result)
                if "error" in result:
                    failed += 1
                    bar.write(f"audiophi: {file}: {result['error']}", file=sys.stderr)
                elif not args.output:
                    end = "" if form in SUBTITLES else "\n"
                    bar.write(printed(result, form, len(files) > 1), file=sys.stdout, end=end)
                    sys.stdout.flush()
    if failed:
        print(f"audiophi: {failed} of {len(todo)} files failed", file=sys.stderr)
    return 1 if failed else 0


def newest_change(model: str) -> str | None:
    """When a checkpoint's folder last changed, UTC; None for one on the Hub."""
    return (
        max((when_changed(str(file)) for file in Path(model).iterdir()), default=None) if Path(model).is_dir() else None
    )


def as_result(file: str, answer: dict) -> dict:
    """The pipeline's answer as what is written: {"file", "text", "chunks": [{"start", "end", "text"}] for transcripts},
    times in seconds, or {"file", "error"}."""
    if "error" in answer:
        return {"file": file, "error": answer["error"].removeprefix(f"{file}: ")}
    result = {"file": file, "text": answer["generated_text"]}
    if "chunks" in answer:
        pieces = [(*chunk["timestamp"], chunk["text"]) for chunk in answer["chunks"]]
        result["chunks"] = [{"start": start, "end": end, "text": text} for start, end, text in pieces]
    if "words" in answer:
        result["words"] = answer["words"]
    return result


def printed(result: dict, form: str, several: bool) -> str:
    """A result as it is printed; with `several` files, text says which it belongs to."""
    if form == "json":
        return json.dumps(result, ensure_ascii=False)
    if form in SUBTITLES:
        return subtitles(result["chunks"], form)
    return f"{result['file']}: {result['text']}" if several else result["text"]


def subtitles(chunks: list[dict], form: str = "srt") -> str:
    """Chunks of a transcript as SubRip ("srt") or WebVTT ("vtt"): a number, the times, the words, an empty line. Chunks
    without words are left out."""
    head, point = SUBTITLES[form]
    spoken = [chunk for chunk in chunks if chunk["text"]]
    return head + "".join(
        f"{number}\n{clock(chunk['start'], point)} --> {clock(chunk['end'], point)}\n{chunk['text']}\n\n"
        for number, chunk in enumerate(spoken, start=1)
    )


def clock(seconds: float, point: str = ",") -> str:
    """Seconds → 01:02:03,004"""
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
