"""Rows of manifests, LibriSpeech's tree and plain folders, as the files have them; and the search for audio files."""

import csv
import io
import json
from collections.abc import Collection, Iterator
from pathlib import Path

# What libsndfile or, where it is installed, torchcodec reads.
AUDIO_SUFFIXES = {
    *(".wav", ".flac", ".mp3", ".mp2", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf"),
    *(".w64", ".rf64", ".sph", ".m4a", ".m4b", ".mp4", ".mov", ".3gp", ".webm", ".weba", ".mka", ".mkv", ".aac"),
    *(".amr", ".wma", ".spx", ".ac3", ".ape", ".wv", ".avi"),
}
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
    """Every audio file below a folder, sorted. Hidden ones are none of its user's: macOS' ._x.wav, trash, __MACOSX."""
    return sorted(
        file
        for file in root.rglob("*")
        if file.suffix.lower() in AUDIO_SUFFIXES
        and not any(part.startswith(".") or part == "__MACOSX" for part in file.relative_to(root).parts)
    )


def manifest_rows(manifest: Path) -> Iterator[dict]:
    """Rows of a CSV, TSV or JSONL file."""
    if manifest.suffix in (".csv", ".tsv"):
        with open(manifest, newline="", encoding="utf-8-sig") as file:
            yield from _table_rows(manifest, file)
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


def _table_rows(manifest: Path, file) -> Iterator[dict]:
    """Rows of a CSV or TSV file. ValueError naming the line of one that has not a value for each column, and of a quote
    that takes whole lines into a field, both of which would be read as something else without a word."""
    tabs = manifest.suffix == ".tsv"
    # In Common Voice's TSVs a quote is a letter; in CSVs one that does not end is an error.
    rules = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True, "skipinitialspace": True}
    lines = csv.reader(file, **rules)
    try:
        names = [name.strip() for name in next(lines, [])]
        if "|" in "".join(names[:1]):
            raise ValueError(f"{manifest}: is separated by |, or has no header. Write it as CSV with a line of names.")
        for values in filter(None, lines):
            if len(values) != len(names):
                raise ValueError(
                    f"{manifest}: line {lines.line_num} has {len(values)} values for {len(names)} columns "
                    f"({', '.join(names)}). {'' if tabs else 'Texts with a comma or a quote have to be quoted.'}"
                )
            if any(_is_row(line, names) for value in values for line in value.splitlines()[1:]):
                raise ValueError(
                    f"{manifest}: a quote swallows the rows before line {lines.line_num}. Write quotes in texts twice."
                )
            yield dict(zip(names, map(_unquoted, values) if tabs else values, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{manifest}: cannot be read behind line {lines.line_num} ({error}).") from error


def _is_row(line: str, names: list[str]) -> bool:
    """Whether a line of a text looks like one of a CSV file that names audio."""
    cells = line.split(",")
    return len(cells) == len(names) and any(Path(cell.strip()).suffix.lower() in AUDIO_SUFFIXES for cell in cells)


def _unquoted(value: str) -> str:
    """A value that is in quotes as a whole, with those in it written twice, as spreadsheets do; any other as it is."""
    inside = value[1:-1].replace('""', "")
    whole = len(value) > 1 and value[0] == value[-1] == '"' and '"' not in inside
    return value[1:-1].replace('""', '"') if whole else value


def nested_metadata(root: Path) -> list[Path]:
    """metadata.{jsonl,csv} of the folders below, as `datasets` documents it for splits."""
    below = sorted({file.parent for kind in ("jsonl", "csv") for file in root.rglob(f"metadata.{kind}")})
    return [file for folder in below if (file := metadata_file(folder)) is not None and file.suffix != ".parquet"]


def rows_of_folders(manifests: list[Path], root: Path, split: str | None, audio: Collection[str]) -> Iterator[dict]:
    """Rows of several manifests below a folder, their `audio` columns relative to it. `split`: a folder's name."""
    if split is not None:
        manifests = [file for file in manifests if split in file.relative_to(root).parts]
        if not manifests:
            raise ValueError(f"{root}: no folder {split!r} with metadata.")
    for manifest in manifests:
        folder = manifest.parent.relative_to(root)
        for row in manifest_rows(manifest):
            named = {name: row[name] for name in audio if isinstance(row.get(name), str)}
            yield {**row, **{n: p if "://" in p or p[:1] == "~" else str(folder / p) for n, p in named.items()}}


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
        files = {file.stem: file for file in transcript.parent.iterdir() if file.suffix.lower() in AUDIO_SUFFIXES}
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
