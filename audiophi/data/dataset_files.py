"""Rows of manifests, LibriSpeech's tree and plain folders, as the files have them; and the search for audio files."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

AUDIO_SUFFIXES = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".mp4", ".webm", ".aac"}
MANIFEST_SUFFIXES = {".jsonl", ".json", ".csv", ".tsv", ".parquet"}


def metadata_file(folder: Path) -> Path | None:
    """The folder's metadata.{jsonl,csv,parquet}."""
    return next(
        (file for suffix in (".jsonl", ".csv", ".parquet") if (file := folder / f"metadata{suffix}").exists()), None
    )


def read_csv(path: Path) -> list[dict]:
    """Rows of a released CSV. One that is not UTF-8 (some copies went through a spreadsheet) is read byte by byte, so
    that its ASCII captions are right."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def csv_columns(path: Path) -> list[str]:
    """The header of a CSV, [] for a file that is none."""
    if path.suffix != ".csv" or not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        return next(csv.reader(file), [])


def audio_files(root: Path) -> list[Path]:
    """Every audio file below a folder, sorted."""
    return sorted(file for file in root.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES)


def audio_home(manifest: Path) -> Path:
    """The folder that the paths in a manifest start from: its own, of Common Voice's tables `clips` beside them."""
    if manifest.suffix == ".tsv":
        with open(manifest, encoding="utf-8-sig", errors="replace") as file:
            if file.readline().startswith("client_id\tpath\t"):
                return manifest.parent / "clips"
    return manifest.parent


def manifest_rows(manifest: Path) -> Iterator[dict]:
    """Rows of a CSV, TSV or JSONL file."""
    if manifest.suffix in (".csv", ".tsv"):
        with open(manifest, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, delimiter="\t" if manifest.suffix == ".tsv" else ",")
            try:
                yield from rows
            except (UnicodeDecodeError, csv.Error) as error:
                raise ValueError(f"{manifest}: cannot be read behind line {rows.line_num} ({error}).") from error
        return
    if manifest.suffix not in (".jsonl", ".json"):
        raise ValueError(f"{manifest}: not a manifest ({', '.join(sorted(MANIFEST_SUFFIXES))}).")
    with open(manifest, "rb") as file:
        beginning = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        file.seek(0)
        if beginning.startswith(b"["):
            yield from _array(manifest, file.read())
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    raise ValueError(f"{manifest}: line {number} is not UTF-8 ({error}).") from error
                except (json.JSONDecodeError, RecursionError) as error:
                    raise ValueError(f"{manifest}: line {number} is not JSON ({error}).") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{manifest}: line {number} is not a JSON object.")
                yield row


def _array(manifest: Path, content: bytes) -> Iterator[dict]:
    """Rows of a JSON file that is one list."""
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{manifest}: is not JSON ({error}).") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{manifest}: item {number} is not a JSON object.")
        yield row


def librispeech_rows(root: Path, split: str | None) -> Iterator[dict]:
    """The official tree: SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt beside SPEAKER-CHAPTER-NUMBER.flac."""
    transcripts = sorted(root.rglob("*.trans.txt"))
    if split is not None:
        transcripts = [file for file in transcripts if split in file.parts]
        if not transcripts:
            raise ValueError(f"{root}: no folder {split!r} with transcripts.")
    for transcript in transcripts:
        files = {file.stem: file for file in transcript.parent.iterdir() if file.suffix in AUDIO_SUFFIXES}
        for line in transcript.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            if name:
                file = files.get(name, transcript.parent / f"{name}.flac")
                yield {"audio": str(file.relative_to(root)), "text": text, "id": name, "speaker": name.split("-")[0]}


def folder_rows(root: Path, split: str | None) -> Iterator[dict]:
    """Audio files without metadata; the folder that holds a file is its label, as in `datasets`' audiofolder."""
    files = audio_files(root)
    if split is not None:
        files = [file for file in files if split in file.relative_to(root).parts]
    if not files:
        raise ValueError(
            f"{root}: holds no audio files, manifest or transcripts{f' of split {split!r}' if split else ''}."
        )
    for file in files:
        path = file.relative_to(root)
        yield {"audio": str(path), "label": path.parent.name.replace("_", " ") or None, "id": str(path)}
