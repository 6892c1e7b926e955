"""Lay speech over sounds: a folder of clips in which it is known both what is said and what is heard behind it.

    python tools/make_mixed.py SPEECH SOUNDS OUT --clips 600 [--snr 5 15] [--speech_exclude speaker=84,2086]
        [--speech_filter split=train] [--sounds_filter fold=1,2,3] [--seed 0]

SPEECH, SOUNDS: data sets as a recipe names them (audiophi/data/datasets.py), with texts and with labels. Each clip is a
drawn utterance of at most --seconds; a drawn sound is repeated or cut to its length and scaled so that the speech is
--snr dB (drawn between the two) louder, by the mean power of both. Writes OUT/metadata.jsonl (audio, text, label,
speaker, snr) and FLAC files of 16 kHz; same arguments, same output.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

RATE = 16_000
PEAK = 0.9


def mix(speech: np.ndarray, sound: np.ndarray, snr: float) -> np.ndarray:
    """(samples,) speech with the sound `snr` dB below it, scaled down where it would clip."""
    sound = np.resize(sound, len(speech))
    power, under = float(np.mean(speech**2)), float(np.mean(sound**2))
    mixed = speech + sound * (power / max(under, 1e-12) * 10 ** (-snr / 10)) ** 0.5
    return (mixed * min(1.0, PEAK / max(1e-9, float(np.abs(mixed).max())))).astype(np.float32)


def columns_of(pairs: list[str]) -> dict[str, list[str]]:
    """["a=1,2"] -> {"a": ["1", "2"]}"""
    return {name: values.split(",") for name, _, values in (pair.partition("=") for pair in pairs)}


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("speech")
    parser.add_argument("sounds")
    parser.add_argument("output", type=Path)
    parser.add_argument("--clips", type=int, default=600)
    parser.add_argument("--snr", type=float, nargs=2, default=(5.0, 15.0), metavar=("LOW", "HIGH"))
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--seed", type=int, default=0)
    for name in ("speech", "sounds"):
        for what in ("filter", "exclude"):
            parser.add_argument(f"--{name}_{what}", nargs="*", default=[], metavar="COLUMN=VALUES")
    args = parser.parse_args(arguments)

    from audiophi.data.datasets import load_examples
    from audiophi.data.example import RowError
    from audiophi.tasks import default_task
    from audiophi.tasks.choose import Choose
    from processing.audio_io import AudioError

    def load(name, **more):
        chosen = {what: columns_of(getattr(args, f"{name}_{what}")) for what in ("filter", "exclude")}
        return load_examples({"path": getattr(args, name), **chosen, **more})

    try:
        speech, sounds = load("speech", task=default_task().name), load("sounds", task=Choose.name)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    rng = random.Random(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    rows, failures, reason = [], 0, None
    while len(rows) < args.clips:
        if failures > 10 * args.clips + 100:
            parser.error(f"too few usable clips, {len(rows)} were made. The last one: {reason}")
        try:
            said, heard = speech[rng.randrange(len(speech))], sounds[rng.randrange(len(sounds))]
            voice = said.clips[0].read(said.id, RATE)
            if len(voice) > args.seconds * RATE:
                raise RowError(f"{said.id}: longer than --seconds {args.seconds:g}")
            snr = rng.uniform(*args.snr)
            mixed = mix(voice, heard.clips[0].read(heard.id, RATE), snr)
        except (RowError, AudioError) as error:
            failures, reason = failures + 1, error
            continue
        name = f"{len(rows):05}.flac"
        soundfile.write(args.output / name, mixed, RATE)
        rows.append({"audio": name, "text": said.reference, "label": heard.label, "speaker": said.speaker,
                     "snr": round(snr, 1), "seconds": round(len(mixed) / RATE, 3),
                     "id": f"{said.id} over {heard.id}"})  # fmt: skip
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (args.output / "metadata.jsonl").write_text(text, encoding="utf-8")
    print(f"{args.output}: {len(rows)} clips, {sum(row['seconds'] for row in rows) / 3600:.2f} h")
    return 0


if __name__ == "__main__":
    sys.exit(main())
