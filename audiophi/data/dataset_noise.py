"""Clips in which nobody speaks, made here: what a model that only ever heard speech writes words for.

    {path: "noise:300", task: no_speech}     300 clips, without any file

A fifth is digital silence. A fifth is noise of a random slope (white to brown), a tenth hum of the mains, at levels of
-80 to -15 dBFS. The rest are clicks, beeps and rustle with peaks of -45 to 0 dBFS, one time in two with nothing at all
in between, as a muted line has them, else above noise. Lengths are uniform from 0.3 to 8 s. A clip is known by its
number, and is the same every time.
"""

import io
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile as sf

SAMPLE_RATE = 16_000
SECONDS = (0.3, 8.0)
KINDS = ("silence", "clicks", "noise", "beeps", "hum", "clicks", "silence", "beeps", "noise", "rustle")
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
        kind, flac, seconds = encoded(number)
        name = f"{kind}-{number}"
        audio = {"bytes": flac, "path": f"{name}.flac"}
        yield {"audio": audio, "text": "", "label": kind, "id": name, "seconds": seconds}


@lru_cache(maxsize=500)  # each stage reads them again
def encoded(number: int) -> tuple[str, bytes, float]:
    """Kind, FLAC and seconds of the clip of this number."""
    kind, rng, buffer = KINDS[number % len(KINDS)], np.random.default_rng(number), io.BytesIO()
    samples = make_clip(kind, rng.uniform(*SECONDS), rng)
    sf.write(buffer, samples, SAMPLE_RATE, format="FLAC")
    return kind, buffer.getvalue(), len(samples) / SAMPLE_RATE


def make_clip(kind: str, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Samples (seconds * SAMPLE_RATE,) float32 of one of KINDS."""
    size = int(seconds * SAMPLE_RATE)
    if kind == "silence":
        return np.zeros(size, dtype=np.float32)
    noise = coloured(size, rng)
    if kind in SOUNDS:
        samples = SOUNDS[kind](size, rng)
        samples /= np.abs(samples).max() + 1e-12
        if rng.random() < 0.5:
            samples += noise * 10 ** (rng.uniform(-60, -20) / 20)
        samples *= 10 ** (rng.uniform(-45, 0) / 20)
    else:
        samples = noise if kind == "noise" else hum(size, rng) + rng.choice([0, 0.3]) * noise
        samples *= 10 ** (rng.uniform(-80, -15) / 20) / (np.sqrt(np.mean(samples**2)) + 1e-12)
    return np.clip(samples, -1, 1).astype(np.float32)


def coloured(size: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of a random slope, (size,) of mean square 1."""
    spectrum = np.fft.rfft(rng.standard_normal(size), padded(size))
    spectrum[1:] /= np.arange(1, len(spectrum)) ** rng.uniform(0, 1.2)  # 0 white, 0.5 pink, 1 brown
    samples = np.fft.irfft(spectrum)[:size]
    return samples / (np.sqrt(np.mean(samples**2)) + 1e-12)


def padded(size: int) -> int:
    """At least `size`: a power of two. A prime takes ten times as long."""
    return 1 << (size - 1).bit_length()


def hum(size: int, rng: np.random.Generator) -> np.ndarray:
    turns = 2 * np.pi * rng.choice([50, 60]) * np.arange(size) / SAMPLE_RATE
    return sum(rng.uniform(0, 2) * np.sin(k * turns + rng.uniform(0, 6)) for k in range(1, 6))


def starts(size: int, rng: np.random.Generator) -> np.ndarray:
    """Where something begins, at least once: as regularly as a metronome, or at any time."""
    per_second = 10 ** rng.uniform(-0.3, 1)
    if rng.random() < 0.5:
        times = np.arange(rng.uniform(0, min(size / SAMPLE_RATE, 1 / per_second)), size / SAMPLE_RATE, 1 / per_second)
    else:
        times = rng.uniform(0, size / SAMPLE_RATE, max(1, rng.poisson(per_second * size / SAMPLE_RATE)))
    return np.minimum(times * SAMPLE_RATE, size - SAMPLE_RATE // 50).astype(int)  # or nothing of it would be heard


def clicks(size: int, rng: np.random.Generator) -> np.ndarray:
    """One kind of click again and again, of different loudness: a single sample, a knock that rings, or a burst of
    noise as of a key; half of them come in pairs, as a key's that is let go."""
    time, fade = np.arange(SAMPLE_RATE // 10) / SAMPLE_RATE, 10 ** rng.uniform(-3.3, -1.7)
    shape, again = rng.choice(["sample", "ring", "burst"]), rng.choice([0, rng.uniform(0.03, 0.15)])
    click = np.zeros(len(time))
    if shape == "sample":
        click[: rng.integers(1, 4)] = 1
    elif shape == "ring":
        click = sum(np.sin(2 * np.pi * rng.uniform(200, 7000) * time) for _ in range(rng.integers(1, 4)))
    else:
        click = rng.standard_normal(len(time))
    click, samples = click * np.exp(-time / fade), np.zeros(size)
    for start in starts(size, rng):
        for place in {start, start + int(again * SAMPLE_RATE)}:
            heard = click[: max(0, size - place)]
            samples[place : place + len(heard)] += heard * 10 ** rng.uniform(-0.5, 0)
    return samples


def beeps(size: int, rng: np.random.Generator) -> np.ndarray:
    """Tones of one pitch, two at once, or sliding, with soft or hard edges; a quarter never stops."""
    time, tones = np.arange(size) / SAMPLE_RATE, np.zeros(size)
    for _ in range(rng.integers(1, 3)):
        pitch, slide = 10 ** rng.uniform(2.2, 3.6), rng.choice([0, 0, rng.uniform(-0.1, 0.1)])
        tones += np.sin(2 * np.pi * pitch * (time + slide * time**2))
    if rng.random() < 0.3:
        tones = np.sign(tones)
    if rng.random() < 0.25:
        return tones
    long, gate = int(rng.uniform(0.05, 0.8) * SAMPLE_RATE), np.zeros(size)
    for start in starts(size, rng):
        gate[start : start + long] = 1
    edge = np.ones(rng.integers(1, SAMPLE_RATE // 50))
    return tones * np.convolve(gate, edge / len(edge))[:size]


def rustle(size: int, rng: np.random.Generator) -> np.ndarray:
    """Paper, cloth, steps on gravel: noise of a band that swells and fades many times a second, and pauses."""
    whole = padded(size)
    spectrum, bins = np.fft.rfft(rng.standard_normal(size), whole), np.fft.rfftfreq(whole, 1 / SAMPLE_RATE)
    spectrum[(bins < rng.uniform(50, 2000)) | (bins > rng.uniform(3000, 8000))] = 0
    swell = rng.standard_normal(2 + int(size / SAMPLE_RATE * rng.uniform(5, 40))) - rng.uniform(-0.5, 0.5)
    swell = np.interp(np.linspace(0, 1, size), np.linspace(0, 1, len(swell)), np.maximum(swell, 0) ** 2)
    return np.fft.irfft(spectrum)[:size] * (swell + 1e-3)


SOUNDS = {"clicks": clicks, "beeps": beeps, "rustle": rustle}
