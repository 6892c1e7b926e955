"""Damaged audio files, thousands of them: decoding gives finite audio, or an AudioError that names the file."""

import io
import random

import numpy as np
import pytest
import soundfile

from processing import AudioError, load_audio
from tests.hostile import encode, noise, real_speech, time_limit

RATE = 16_000


def speech_files() -> dict[str, bytes]:
    """Speech of this repository as Opus, as it lies there, and written anew in every other format."""
    opus = real_speech()
    wave, rate = soundfile.read(io.BytesIO(opus), dtype="float32")
    wave = wave[: rate // 2]
    return {
        "opus": opus,
        "wav": encode(wave, rate),
        "float.wav": encode(wave, rate, subtype="FLOAT"),
        "flac": encode(wave, rate, "FLAC"),
        "vorbis.ogg": encode(wave, rate, "OGG", "VORBIS"),
        "mp3": encode(wave, rate, "MP3"),
        "adpcm.wav": encode(wave, rate, subtype="IMA_ADPCM"),
        "stereo.aiff": encode(noise(0.2, channels=2), rate, "AIFF"),
    }


def flip_bits(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def damage_header(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 2, 4, 8))):
        data[rng.randrange(min(len(data), 96))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(data)


def truncate(data, rng):
    return data[: rng.randrange(len(data))]


def cut_out(data, rng):
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randrange(1, 2000) :]


def repeat(data, rng):
    start = rng.randrange(len(data))
    return data[:start] + data[max(0, start - rng.randrange(1, 2000)) :]


def insert_noise(data, rng):
    start = rng.randrange(len(data))
    return data[:start] + rng.randbytes(rng.randrange(1, 500)) + data[start:]


def overwrite(data, rng):
    start, size = rng.randrange(len(data)), rng.randrange(1, 300)
    return data[:start] + bytes([rng.choice((0, 0xFF))]) * size + data[start + size :]


def splice(data, rng):
    other = rng.choice(list(FILES.values()))
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


FILES = speech_files()
MUTATIONS = (flip_bits, damage_header, truncate, cut_out, repeat, insert_noise, overwrite, splice)


def decode(data: bytes, name: str) -> str | None:
    """ "refused" for a file that is refused by its name, None for finite audio, else what is wrong."""
    try:
        with time_limit(20, name):
            wave = load_audio(data, name=name)
    except AudioError as error:
        return "refused" if str(error).startswith(f"{name}: ") else f"not named: {error}"
    except Exception as error:  # anything else is what this test looks for
        return f"{type(error).__name__}: {error}"
    if wave.dtype != np.float32 or wave.ndim != 1 or not len(wave) or not np.isfinite(wave).all():
        return f"{wave.dtype} {wave.shape}, finite: {np.isfinite(wave).all()}"
    return None


def fuzz(kind: str, rounds: int) -> tuple[list[str], int]:
    """Every mutation `rounds` times → complaints, each with the seed that makes it again; how many were refused."""
    complaints, refused = [], 0
    for mutate in MUTATIONS:
        for number in range(rounds):
            name = f"{kind} {mutate.__name__} {number}"
            said = decode(mutate(FILES[kind], random.Random(name)), name)
            refused += said == "refused"
            complaints += [f"{name}: {said}"] if said not in (None, "refused") else []
    return complaints, refused


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files(kind):
    assert decode(FILES[kind], kind) is None
    complaints, refused = fuzz(kind, 5)
    assert complaints == []
    assert refused > 3, "the mutations hardly damage anything"


@pytest.mark.faults
@pytest.mark.parametrize("kind", FILES)
def test_thousands_of_damaged_files(kind):
    complaints, refused = fuzz(kind, 100)
    assert complaints == []
    assert refused > 50, "the mutations hardly damage anything"  # any bytes are samples of AIFF: 72 of 800
