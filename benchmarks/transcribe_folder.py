"""A folder of files: `audiophi transcribe` against Whisper in transformers' own ASR pipeline.

    python benchmarks/transcribe_folder.py [--quick] [--minutes 5] [--folder DIR] [--batch_size 8]

The files (default: 24 development clips of data/synthetic_speech, written as FLAC) are transcribed in turn by

    two ears      the command, with checkpoints/audiophi-tiny as it is: alignment and Whisper base's decoder, four beams
    audiophi      the same with `--hear_with alignment`: the LLM writes what the alignment hears
    one by one    that with `--batch_size 1`, its default: what the alignment heard is the draft of each transcript
    whisper       openai/whisper-tiny.en in transformers' `automatic-speech-recognition` pipeline, greedy, its default
    whisper base  openai/whisper-base likewise

each time in a process of its own, in interleaved rounds. The real-time factor is seconds of work per second of audio
(below 1: faster than speech), once from the start of the process, once without starting Python and loading the model.
Word error rates stand beside them where the words are known, because a model that writes less is faster. Needs the real
components (tools/get_components.py); where they are not there, nothing is measured, and that is said.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import CHECKPOINT, RATE, markdown, median, script, spoken_clips

WHISPER = {"whisper": "openai/whisper-tiny.en", "whisper base": "openai/whisper-base"}
ALIGNMENT = ["--hear_with", "alignment"]
OURS = {"two ears": [], "audiophi": ALIGNMENT, "one by one": [*ALIGNMENT, "--batch_size", "1"]}
CONTESTANTS = (*OURS, *WHISPER)
ROUNDS = 3
FILES = 24
MAX_NEW_TOKENS = 160  # for a piece of at most 30 s, as in the checkpoint's evaluation; only loops reach it


def write_folder(folder: Path, limit: int) -> dict[str, str]:
    """The development clips as FLAC files -> {name: words}."""
    import soundfile

    words = {}
    for number, (wave, text) in enumerate(spoken_clips()[:limit]):
        words[f"{number:04}.flac"] = text
        soundfile.write(folder / f"{number:04}.flac", wave, RATE)
    return words


def audio_seconds(files: list[str]) -> float:
    from processing.audio_io import load_audio

    return sum(len(load_audio(file, target_rate=RATE)) / RATE for file in files)


# ---- one contestant, in its own process ------------------------------------------------------------------------------


def hear_with_command(folder: Path, model: str, batch_size: int, options: list[str]) -> dict:
    """`audiophi transcribe FOLDER OPTIONS` -> {"load": seconds, "texts": {name: words}}."""
    from audiophi.cli import hear
    from audiophi.cli.main import main

    load_pipeline, loading = hear.load_pipeline, []

    def timed(arguments):
        start = time.perf_counter()
        pipe = load_pipeline(arguments)
        loading.append(time.perf_counter() - start)
        return pipe

    hear.load_pipeline = timed
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch, "results.jsonl")
        command = ["transcribe", str(folder), "--model", model, "--batch_size", str(batch_size)]
        command += ["--max_new_tokens", str(MAX_NEW_TOKENS), "--output", str(results), *options]
        try:
            if main(command):
                raise RuntimeError(f"audiophi {' '.join(command)} failed")
        finally:
            hear.load_pipeline = load_pipeline
        lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    texts = {Path(line["file"]).name: line["text"] for line in lines if "file" in line}
    return {"load": loading[0], "texts": texts}


def hear_with_whisper(folder: Path, model: str, batch_size: int) -> dict:
    """As `hear_with_command`."""
    from audiophi.cli.hear import find_files
    from audiophi.evaluation.baseline import BaselineListener
    from processing.audio_io import load_audio

    start = time.perf_counter()
    recogniser = BaselineListener(model, "cpu")
    load = time.perf_counter() - start
    files, texts = find_files([str(folder)]), {}
    for first in range(0, len(files), batch_size):
        batch = files[first : first + batch_size]
        words = recogniser.words([load_audio(file, target_rate=recogniser.sampling_rate) for file in batch])
        texts |= {Path(file).name: text for file, text in zip(batch, words, strict=True)}
    return {"load": load, "texts": texts}


def hear_in_this_process(who: str, folder: Path, model: str, batch_size: int) -> dict:
    """With "work": seconds between the imports and the end, the loading left out."""
    # What transformers imports lazily belongs to starting Python.
    from transformers import AutoModel, pipeline  # noqa: F401

    import audiophi  # noqa: F401

    start = time.perf_counter()
    if who in WHISPER:
        found = hear_with_whisper(folder, model, batch_size)
    else:
        found = hear_with_command(folder, model, batch_size, OURS[who])
    return {"work": time.perf_counter() - start - found["load"], **found}


def hear(who: str, folder: Path, model: str, batch_size: int) -> dict:
    """With "all": seconds of the whole process."""
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch, "found.json")
        start = time.perf_counter()
        child = subprocess.run(
            [sys.executable, __file__, "--child", who, str(folder), model, str(batch_size), str(found)]
        )
        seconds = time.perf_counter() - start
        if child.returncode:
            raise RuntimeError(f"{who}: the process ended with {child.returncode}")
        return {"all": seconds, **json.loads(found.read_text(encoding="utf-8"))}


# ---- the whole -----------------------------------------------------------------------------------------------------


def measure(options, save) -> dict:
    from audiophi.cli.hear import find_files

    section = {"batch_size": options.batch_size, "rounds": 0, "contestants": {}}
    if options.weights != "checkpoint":
        return {**section, "skipped": "the checkpoint's base components are not on this machine"}
    models = {who: WHISPER.get(who, str(CHECKPOINT)) for who in CONTESTANTS}
    with tempfile.TemporaryDirectory() as scratch:
        folder, words = Path(options.folder or scratch), None
        if options.folder is None:
            words = write_folder(folder, 4 if options.quick else FILES)
        files = find_files([str(folder)])
        section |= {"files": len(files), "audio_seconds": audio_seconds(files)}
        found = {who: [] for who in CONTESTANTS}
        for _ in range(1 if options.quick else ROUNDS):
            if sum(runs[-1]["all"] for runs in found.values() if runs) > options.budget.left:
                break
            for who, runs in found.items():
                runs.append(hear(who, folder, models[who], options.batch_size))
                section["contestants"][who] = summary(runs, section["audio_seconds"], words)
                save(section)
            section["rounds"] += 1
            both, ours, single, theirs, base = (section["contestants"][who]["work"] for who in CONTESTANTS)
            section["headline"] = {
                "transcribe_ratio": round(theirs / ours, 3),
                "transcribe_ratio_one_by_one": round(theirs / single, 3),
                "transcribe_ratio_two_ears": round(theirs / both, 3),
                "transcribe_ratio_two_ears_base": round(base / both, 3),
            }
            save(section)
    return section


def summary(runs: list[dict], seconds: float, words: dict[str, str] | None) -> dict:
    """Medians over the rounds; word error rate in percent, None where the words are not known."""
    from audiophi.evaluation.metrics import count_errors, word_error_rate

    work, everything = (median([run[name] for run in runs]) for name in ("work", "all"))
    wer = None
    if words is not None:
        missing = sorted(set(words) - set(runs[-1]["texts"]))
        if missing:
            raise RuntimeError(f"{len(missing)} files were not transcribed, {missing[0]} the first of them")
        heard = runs[-1]["texts"]
        wer = word_error_rate([count_errors(said, heard[name]) for name, said in words.items()])
    return {"work": work, "all": everything, "rtf": work / seconds, "rtf_all": everything / seconds, "wer": wer}


def table(section: dict) -> str:
    """Markdown: a row per contestant."""
    if "skipped" in section:
        return f"Not measured: {section['skipped']}."
    rows = [
        [who, f"{found['rtf']:.3f}", f"{found['rtf_all']:.3f}", f"{found['work']:.1f}", f"{found['all']:.1f}",
         "?" if found["wer"] is None else f"{found['wer']:.1f}"]
        for who, found in section["contestants"].items()
    ]  # fmt: skip
    header = ["", "real-time factor", "with start and loading", "seconds", "with start and loading", "WER %"]
    told = f"{section['files']} files, {section['audio_seconds']:.0f} s of audio, {section['batch_size']} at a time, "
    rounds = f"median of {section['rounds']}" if section["rounds"] else "of a first round that was not ended"
    return markdown(header, rows) + f"\n\n{told}{rounds}."


def add_options(parser) -> None:
    parser.add_argument("--folder", type=Path, help="of audio files, instead of the repository's own")
    parser.add_argument("--batch_size", type=int, default=8)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--child"]:
        who, folder, model, batch_size, output = arguments[1:]
        found = hear_in_this_process(who, Path(folder), model, int(batch_size))
        Path(output).write_text(json.dumps(found), encoding="utf-8")
        return 0
    return script("transcribe_folder", __doc__, measure, table, 5, arguments, add_options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
