"""Seconds and peak memory against the amount of work.

    python benchmarks/cost_vs_work.py [--quick] [--long] [--minutes 6] [--output benchmarks/results.json]

    length   one recording of 1 s ... 10 min (1 h with --long) through the pipeline, as the checkpoint decodes
    batch    1 ... 32 clips of 7 s at once through the pipeline
    rows     a JSON Lines manifest of 1,000 ... 100,000 rows: what training does with it before its first step, each
             size in a process of its own. Its rows share eight files, whose lengths it gives (and once does not)

Memory is resident (VmHWM, Linux), beyond what the process held before: model and libraries are not counted. A case that
would take longer than the time left, judged by the one before it, is left out and said so.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from full_size import forget_peak, memory_of_process
from measuring import CHECKPOINT, RATE, ROOT, joined_speech, make_model, markdown, script, spoken_clips

LENGTHS = (1, 10, 60, 300, 600)
HOUR = 3600
BATCHES = (1, 2, 4, 8, 16, 32)
ROWS = (1_000, 10_000, 100_000)
CLIP_SECONDS = 7.0
FILES = 8
# A first step of these seconds of audio, as in recipes/quickstart.yaml.
BATCH_SECONDS = 130.0
EPOCHS = 12


def measured(work) -> dict:
    """Seconds and bytes beyond the present ones of `work()`."""
    before = memory_of_process("VmRSS")
    forget_peak()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "memory": max(0, memory_of_process("VmHWM") - before)}


# ---- audio ---------------------------------------------------------------------------------------------------------


def measure_pipeline(options, section: dict, save) -> None:
    """Adds the rows of `length` and `batch` to the section."""
    import torch
    from transformers import pipeline

    model, processor = make_model(options.weights)
    pipe = pipeline("audio-text-to-text", model=model, processor=processor)
    lengths = (1, 4) if options.quick else LENGTHS + (HOUR,) * options.long
    batches = (1, 2) if options.quick else BATCHES
    new_tokens = 4 if options.quick else 160  # per piece of at most 30 s; a trained model stops by itself

    def hear(clips, batch_size):
        with torch.inference_mode():
            pipe([(wave, RATE) for wave, _ in clips], batch_size=batch_size, max_new_tokens=new_tokens)

    hear(joined_speech(1, 1.0), 1)  # what is made once
    # Both kinds in turn, the small ones first: a slow machine has some of each.
    cases = [("length", size) for size in lengths] + [("batch", size) for size in batches]
    cases.sort(key=lambda case: case[1] * (CLIP_SECONDS if case[0] == "batch" else 1))
    rate = 0.0  # seconds per second of audio, of the last case
    for kind, size in cases:
        seconds = size if kind == "length" else CLIP_SECONDS * size
        if rate and rate * seconds > options.budget.left:
            section["left_out"].append(f"{kind} {size} (about {rate * seconds:.0f} s)")
            continue
        clips = joined_speech(1, size) if kind == "length" else joined_speech(size, CLIP_SECONDS)
        found = measured(lambda clips=clips, kind=kind, size=size: hear(clips, size if kind == "batch" else 1))
        rate = found["seconds"] / seconds
        section[kind].append({"size": size, "audio_seconds": seconds, **found})
        print(f"{kind} {size}: {found['seconds']:.1f} s, {found['memory'] / 2**20:.0f} MiB", flush=True)
        save(section)


# ---- rows ----------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, rows: int, with_seconds: bool) -> Path:
    """A manifest of `rows` rows on FILES short files; every text is another one."""
    import soundfile

    clips = spoken_clips()[:FILES]
    for number, (wave, _) in enumerate(clips):
        soundfile.write(folder / f"{number}.flac", wave, RATE)
    sentences = [line for line in (ROOT / "data" / "sentences.txt").read_text("utf-8").splitlines() if line.strip()]
    path = folder / "manifest.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for index in range(rows):
            number = index % len(clips)
            # No text comes twice, as of a corpus.
            text = f"{sentences[index % len(sentences)]} {sentences[index // len(sentences)]}"
            row = {"id": f"row-{index}", "audio": f"{number}.flac", "text": text}
            if with_seconds:
                row["duration"] = len(clips[number][0]) / RATE
            file.write(json.dumps(row) + "\n")
    return path


def prepare_rows(manifest: Path) -> dict[str, dict]:
    """What training does before its first step, by part, and for comparison the first batch of a stream: seconds and
    memory of each. The first three are `stages.prepare`, the others `stage_data`."""
    from audiophi.data.alignment_text import AlignmentTokenizer
    from audiophi.data.collator import AudioPhiCollator
    from audiophi.training import corpus as corpora
    from audiophi.training.bad_rows import BadRows
    from audiophi.training.batches import BatchSchedule
    from audiophi.training.kept import kept_vocab
    from audiophi.training.plan import token_rate
    from audiophi.training.prompt_room import PromptRoom
    from audiophi.training.recipe import Source, Stage, recipe_from_dict
    from audiophi.training.streams import StreamingSet
    from modeling_audiophi import AudioPhiConfig
    from processing import AudioPhiProcessor

    processor = AudioPhiProcessor.from_pretrained(CHECKPOINT)
    tokenizer = AlignmentTokenizer(processor.tokenizer)
    room = PromptRoom(processor, AudioPhiConfig.from_pretrained(CHECKPOINT), {})
    sources = [Source(str(manifest))]
    bad = BadRows(manifest.with_name("bad_rows.jsonl"), 0.0)
    cache = str(manifest.with_name("cache"))
    parts, made = {}, {}

    def part(name, work):
        parts[name] = measured(lambda: made.update({name: work()}))
        return made[name]

    part("reading the manifest", lambda: corpora.load_examples(corpora.source_spec(sources[0])))
    del made["reading the manifest"]

    def read():
        return corpora.Corpus(sources, bad, cache_dir=cache)

    def hashes(corpus):
        keys = [corpus.key(row, 0, 1.0) for row in corpus.rows]
        corpus.share()
        return keys

    def order(corpus):
        sizes = {"seconds": [row.seconds for row in corpus.rows], "tokens": [row.tokens for row in corpus.rows]}
        return BatchSchedule(**sizes, epochs=EPOCHS, batch_seconds=BATCH_SECONDS)

    corpus = part("reading and checking its rows", read)
    part("alignment vocabulary", lambda: kept_vocab(tokenizer, list(corpus.texts()), cache))
    part("hashes of the audio", lambda: hashes(corpus))
    part("token rate, longest prompt", lambda: token_rate(room, corpus))
    schedule = part("order of batches", lambda: order(corpus))

    def again():
        second = read()
        kept_vocab(tokenizer, list(second.texts()), cache)
        return hashes(second), token_rate(PromptRoom(processor, room.config, {}), second), order(second)

    part("(all of it at a second start)", again)
    dataset = corpora.TrainingSet(corpus, processor, None, {})
    collate = AudioPhiCollator(processor, mode="lm")
    part("first batch", lambda: collate([dataset[draw] for draw in next(iter(schedule))]))
    recipe = recipe_from_dict(
        {
            "name": "rows",
            "components": {"audio": "a", "text": "b"},
            "data": {"train": [{"path": str(manifest)}], "streaming": True},
            "stages": [{"name": "lm", "loss": "lm", "steps": 1, "batch_seconds": BATCH_SECONDS}],
        }
    )
    stage = Stage(name="lm", loss="lm", steps=1, batch_seconds=BATCH_SECONDS)
    stream = StreamingSet(sources, bad, processor, stage, recipe)
    part("(streaming: true, first batch)", lambda: collate(next(iter(stream))))
    return parts


def measure_rows(options, section: dict, save) -> None:
    """Adds the rows of `rows` to the section: each size in a process of its own."""
    sizes = (200, 400) if options.quick else ROWS
    cases = [(size, True) for size in sizes] + [(sizes[-1], False)]
    last = {}
    for size, with_seconds in cases:
        expected = max((seconds * size / smaller for smaller, seconds in last.items()), default=0.0)
        name = f"{size:,} rows" + ("" if with_seconds else " without lengths")
        if expected > options.budget.left:
            section["left_out"].append(f"{name} (at most {expected:.0f} s)")
            continue
        with tempfile.TemporaryDirectory() as folder:
            manifest = write_manifest(Path(folder), size, with_seconds)
            # The tables that `datasets` writes go into the same folder, so that nothing is found ready-made.
            child = subprocess.run(
                [sys.executable, __file__, "--child", str(manifest)], env={**os.environ, "HF_DATASETS_CACHE": folder}
            )
            if child.returncode:
                raise RuntimeError(f"{name}: the process ended with {child.returncode}")
            parts = json.loads(manifest.with_name("parts.json").read_text())
        last = {size: sum(part["seconds"] for part in parts.values())}
        section["rows"].append({"rows": size, "with_seconds": with_seconds, "parts": parts})
        print(f"{name}: {last[size]:.1f} s", flush=True)
        save(section)


# ---- the whole -----------------------------------------------------------------------------------------------------


def measure(options, save) -> dict:
    section = {"length": [], "batch": [], "rows": [], "left_out": []}
    if "rows" in options.parts:
        measure_rows(options, section, save)
    if "audio" in options.parts:
        measure_pipeline(options, section, save)
    return section


def table(section: dict) -> str:
    """Markdown: a table per kind."""
    tables = []
    for kind, header in (("length", "recording"), ("batch", "clips of 7 s at once")):
        rows = [
            [f"{row['size']:,} s" if kind == "length" else row["size"], f"{row['seconds']:.1f}",
             f"{row['seconds'] / row['audio_seconds']:.3f}", f"{row['memory'] / 2**20:.0f}"]
            for row in sorted(section[kind], key=lambda row: row["size"])
        ]  # fmt: skip
        if rows:
            tables.append(markdown([header, "seconds", "seconds per second of audio", "peak memory, MiB"], rows))
    if section["rows"]:
        runs = section["rows"]
        names = [f"{run['rows']:,}" + ("" if run["with_seconds"] else ", lengths not given") for run in runs]
        rows = []
        for part in runs[0]["parts"]:
            cells = [f"{r['parts'][part]['seconds']:.2f} s, {r['parts'][part]['memory'] / 2**20:.0f} MiB" for r in runs]
            rows.append([part, *cells])
        tables.append(markdown(["rows of the manifest", *names], rows))
        tables.append(growth(runs))
    if section["left_out"]:
        tables.append(f"No time was left for: {'; '.join(section['left_out'])}.")
    return "\n\n".join(tables)


def growth(runs: list[dict]) -> str:
    """How the start grows from the smallest to the largest manifest, and what makes up most of it."""
    runs = [run for run in runs if run["with_seconds"]]
    if len(runs) < 2:
        return ""
    first, last = runs[0], runs[-1]

    def total(run, what):
        # The manifest is read a second time to check its rows, and streaming is another way: neither adds up.
        parts = [p for p in run["parts"] if not p.startswith(("(", "reading the manifest"))]
        return sum(run["parts"][part][what] for part in parts), max(parts, key=lambda p: run["parts"][p][what])

    times = last["rows"] / first["rows"]
    lines = []
    for what, unit in (("seconds", 1.0), ("memory", 2**20)):
        (before, _), (after, largest) = total(first, what), total(last, what)
        share = 100 * last["parts"][largest][what] / max(after, 1e-9)
        more = f"{after / before:.1f} times" if before else "?"
        lines.append(
            f"{times:g} times the rows take {more} the {what} ({before / unit:.1f} to {after / unit:.1f} "
            f"{'s' if what == 'seconds' else 'MiB'}); most of it, {share:.0f} %: {largest}."
        )
    return " ".join(lines)


def add_options(parser) -> None:
    parser.add_argument("--long", action="store_true", help="also a recording of an hour")
    parser.add_argument("--parts", nargs="+", choices=("rows", "audio"), default=["rows", "audio"])


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--child"]:
        manifest = Path(arguments[1])
        manifest.with_name("parts.json").write_text(json.dumps(prepare_rows(manifest)))
        return 0
    return script("cost_vs_work", __doc__, measure, table, 6, arguments, add_options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
