"""Clips in which nobody speaks, made here: what a model that only ever heard speech writes words for.

    {path: "noise:300", task: no_speech}     300 clips, without any file

A quarter is digital silence, the rest noise of a random slope (white to brown) and level (-80 to -15 dBFS), some with
mains hum, clicks or beeps in it. Lengths are uniform from 0.3 to 8 s. A clip is known by its number, and is the same
every time.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile as sf

SAMPLE_RATE = 16_000
SECONDS = (0.3, 8.0)
KINDS = ("silence", "noise", "hum", "clicks", "beeps", "noise", "silence", "hum")
MISSING_AUDIO_IS_NORMAL = False


def matches(path: Path) -> bool:
    """Whether "noise:PATH" can be made: PATH is a number of clips."""
    return str(path).isdecimal() and 0 < int(str(path)) <= 100_000


def rows(path: Path, split: str | None = None, audio_folder: Path | None = None) -> Iterator[dict]:
    """One row per clip: audio ({"bytes": FLAC, "path"}), text (""), label (one of KINDS), id, seconds.

    Raises ValueError for a split.
    """
    if split is not None:
        raise ValueError(f"noise:{path}: has no splits.")
    for number in range(int(str(path))):
        kind, rng = KINDS[number % len(KINDS)], np.random.default_rng(number)
        samples, buffer = make_clip(kind, rng.uniform(*SECONDS), rng), io.BytesIO()
        sf.write(buffer, samples, SAMPLE_RATE, format="FLAC")
        name = f"{kind}-{number}"
        yield {
            "audio": {"bytes": buffer.getvalue(), "path": f"{name}.flac"}, "text": "", "label": kind, "id": name,
            "seconds": len(samples) / SAMPLE_RATE,
        }  # fmt: skip


def make_clip(kind: str, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Samples (seconds * SAMPLE_RATE,) float32 of one of KINDS."""
    size = int(seconds * SAMPLE_RATE)
    if kind == "silence":
        return np.zeros(size, dtype=np.float32)
    spectrum = np.fft.rfft(rng.standard_normal(size))
    spectrum[1:] /= np.arange(1, len(spectrum)) ** rng.uniform(0, 1.2)  # 0 white, 0.5 pink, 1 brown
    samples = np.fft.irfft(spectrum, size)
    samples /= np.sqrt(np.mean(samples**2)) + 1e-12
    time = np.arange(size) / SAMPLE_RATE
    if kind == "hum":
        mains = rng.choice([50, 60])
        samples = 0.3 * samples + sum(
            rng.uniform(0, 2) * np.sin(2 * np.pi * mains * k * time + rng.uniform(0, 6)) for k in range(1, 6)
        )
    if kind == "clicks":
        clicks = rng.random(size) < 3 / SAMPLE_RATE
        samples += clicks * rng.uniform(10, 60, size)
    if kind == "beeps":
        on = np.sin(2 * np.pi * rng.uniform(0.3, 3) * time) > rng.uniform(-0.5, 0.9)
        samples = rng.uniform(0, 0.3) * samples + 2 * on * np.sin(2 * np.pi * rng.uniform(200, 3000) * time)
    level = 10 ** (rng.uniform(-80, -15) / 20)
    return np.clip(samples * level / (np.sqrt(np.mean(samples**2)) + 1e-12), -1, 1).astype(np.float32)
