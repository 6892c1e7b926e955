"""Make the demo's sample clips, audiophi/samples/*.ogg: speech of data/synthetic_speech, and sounds out of formulas.

    python tools/make_samples.py audiophi/samples
"""

import io
import sys
from pathlib import Path

import datasets
import numpy as np
import soundfile

ROOT = Path(__file__).resolve().parents[1]
RATE, SECONDS, PEAK = 16_000, 4, 0.7
# Nobody has trained on them: the test split's.
SPEECH = {
    "man": "our flight to oslo was late by two hundred and nine minutes",
    "woman": "we moved to toronto in the spring of that year",
}


def clock(seconds: int = SECONDS) -> np.ndarray:
    """(samples,) a short ring of 2.5 kHz every half second."""
    since = np.arange(seconds * RATE) % (RATE // 2) / RATE
    return PEAK * np.sin(2 * np.pi * 2500 * since) * np.exp(-since / 0.01)


def rain(seconds: int = SECONDS) -> np.ndarray:
    """(samples,) white noise with drops in it."""
    random = np.random.default_rng(0)
    noise = random.normal(0, 0.05, seconds * RATE)
    drops = (random.random(len(noise)) < 0.002) * random.normal(0, 0.5, len(noise))
    return np.clip(noise + np.convolve(drops, np.exp(-np.arange(80) / 15), "same"), -PEAK, PEAK)


def speech() -> dict[str, np.ndarray]:
    files = str(ROOT / "data" / "synthetic_speech" / "test-*.parquet")
    rows = datasets.load_dataset("parquet", data_files=files)["train"]
    rows = rows.cast_column("audio", datasets.Audio(decode=False))
    found = {row["text"]: soundfile.read(io.BytesIO(row["audio"]["bytes"]))[0] for row in rows}
    if missing := [text for text in SPEECH.values() if text not in found]:
        raise SystemExit(f"not in {files}: {missing}; choose other sentences for SPEECH")
    return {name: found[text] for name, text in SPEECH.items()}


def main(output: str) -> int:
    Path(output).mkdir(parents=True, exist_ok=True)
    for name, waveform in {**speech(), "clock": clock(), "rain": rain()}.items():
        soundfile.write(Path(output) / f"{name}.ogg", waveform, RATE, format="OGG", subtype="OPUS")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
