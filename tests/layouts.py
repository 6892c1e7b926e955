"""Tiny data sets in the layouts in which the real ones are released."""

import csv

import numpy as np
import soundfile

from audiophi.data.dataset_streams import stream_examples
from audiophi.data.datasets import load_examples
from audiophi.data.example import RowError


def load(spec, streaming=False, **options):
    """All rows of a source; those that cannot be used as their errors."""
    if streaming:
        given = spec if isinstance(spec, dict) else {"path": spec}
        return list(stream_examples([{**given, **options}]))
    examples, found = load_examples(spec, **options), []
    for number in range(len(examples)):
        try:
            found.append(examples[number])
        except RowError as error:
            found.append(error)
    return found


def read(example):
    """The waveform of an example's only clip."""
    return example.clips[0].read(example.id)


def tone(path, number, seconds=0.8, rate=16_000):
    """A clip that differs from every other one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(int(seconds * rate)) / rate
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * (150 + 70 * number) * time * (1 + time)), rate)


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_librispeech(root, splits, texts=("THE QUICK BROWN FOX", "SHE SELLS SEA SHELLS", "A LAZY DOG")):
    """LibriSpeech/SPLIT/SPEAKER/CHAPTER/*.flac and *.trans.txt: two speakers a split, one utterance for every text."""
    for number, split in enumerate(splits):
        for speaker in (10 + number, 50 + number):
            chapter = root / split / str(speaker) / "121"
            lines = []
            for index, text in enumerate(texts):
                name = f"{speaker}-121-{index:04}"
                tone(chapter / f"{name}.flac", speaker + index, 0.8 + 0.2 * index)
                lines.append(f"{name} {text}\n")
            (chapter / f"{speaker}-121.trans.txt").write_text("".join(lines))
    return root


def write_common_voice(root, splits=("train", "dev"), texts=("Für die Mädchen!", "Das Öl, ja.", "Süße Äpfel")):
    """de/SPLIT.tsv and de/clips/*.mp3, one utterance for every text and split."""
    for number, split in enumerate(splits):
        lines = ["client_id\tpath\tsentence\tup_votes\tlocale\n"]
        for index, text in enumerate(texts):
            name = f"common_voice_de_{number}{index}.mp3"
            tone(root / "clips" / name, number + index, 0.8 + 0.2 * index)
            lines.append(f"{index}\t{name}\t{text}\t2\tde\n")
        (root / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")
    return root


CLOTHO_SOUNDS = (
    "Distorted AM Radio noise",
    "Paper_Parchment_Rustling",
    "03 Whales Slowing Down",
    "Rope tied to boat (2)",
)


def clotho_captions(number):
    return [f"Sound {number}, told in way {way}." for way in range(1, 6)]


def write_clotho(root, splits, clips=4):
    """clotho_captions_SPLIT.csv and SPLIT/*.wav, 44.1 kHz, with spaces and brackets in file names."""
    for part, split in enumerate(splits):
        rows = []
        for number in range(clips):
            name = f"{CLOTHO_SOUNDS[number % 4]}{'' if number < 4 else number}.wav"
            tone(root / split / name, 10 * part + number, 1.0 + 0.2 * number, 44_100)
            captions = clotho_captions(10 * part + number)
            rows.append({"file_name": name, **{f"caption_{way}": text for way, text in enumerate(captions, 1)}})
        write_csv(root / f"clotho_captions_{split}.csv", rows)
    return root
