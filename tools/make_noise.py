"""Make clips in which nobody speaks: what a model that only ever heard speech writes words for.

    python tools/make_noise.py OUT_DIR [--clips 300] [--max_seconds 20]

OUT_DIR gets FLAC files (16 kHz mono) and metadata.jsonl, for a source with `task: no_speech`. A third is digital
silence, the rest noise of a random slope (white to brown) and level (-80 to -15 dBFS), every other one with mains hum
or clicks in it. Lengths are uniform from 0.3 s. Same arguments, same clips.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import soundfile as sf

SAMPLE_RATE = 16_000
MIN_SECONDS = 0.3
KINDS = ("silence", "noise", "noise", "hum", "silence", "clicks")


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
    level = 10 ** (rng.uniform(-80, -15) / 20)
    return np.clip(samples * level / (np.sqrt(np.mean(samples**2)) + 1e-12), -1, 1).astype(np.float32)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--max_seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.clips < 1 or args.max_seconds < MIN_SECONDS:
        parser.error(f"--clips must be 1 or more and --max_seconds at least {MIN_SECONDS}")
    if (args.output / "metadata.jsonl").exists():
        parser.error(f"{args.output} exists; remove it or choose another folder")
    args.output.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    rows = []
    for number in range(args.clips):
        kind = KINDS[number % len(KINDS)]
        seconds = float(rng.uniform(MIN_SECONDS, args.max_seconds))
        samples = make_clip(kind, seconds, rng)
        name = f"{number:05d}-{kind}.flac"
        sf.write(args.output / name, samples, SAMPLE_RATE)
        rows.append({"audio": name, "text": "", "kind": kind, "seconds": round(len(samples) / SAMPLE_RATE, 3)})
    (args.output / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} clips, {sum(row['seconds'] for row in rows) / 3600:.2f} h: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
