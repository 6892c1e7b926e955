"""The file of predictions: appended to as an evaluation goes, continued after an interruption."""

import hashlib
import json
from pathlib import Path


def fingerprint(model: str) -> dict:
    """What tells one model from another: its name, and for a folder size and time of change of its files."""
    folder = Path(model)
    files = sorted(path for path in folder.glob("*") if path.is_file()) if folder.is_dir() else []
    return {"name": model, "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]}


def checkpoint_digest(model: str) -> dict[str, str] | None:
    """SHA-256 of a checkpoint's weights (`weights`) and of its decoding settings (`generation`), by which metrics.json
    and a model card know that they belong together, wherever the folder lies.

    `model`: a folder, or a Hub id that is in the Hub's cache; None for one that is not.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except (OSError, ValueError):
            return None
    weights = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            weights.update(hashlib.file_digest(stream, "sha256").digest())
    settings = folder / "generation_config.json"
    values = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    values.pop("transformers_version", None)  # saving the same settings anew changes it
    generation = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    return {"weights": weights.hexdigest(), "generation": generation.hexdigest()}


class PredictionFile:
    """Predictions as JSON lines at `path`, with the settings that made them in `<path>.settings.json` beside it.

    Predictions of an earlier run are kept when it had the same `settings` (JSON-able) and `fresh` is False. A last line
    that an interruption cut short is dropped. A context manager; `predictions` lists what the file holds.
    """

    def __init__(self, path: Path, settings: dict, fresh: bool = False):
        self.path = path
        self.predictions: list[dict] = []
        self._settings_path = path.with_name(path.name + ".settings.json")
        settings_text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        kept = 0
        if not fresh and self._settings_path.exists() and self._settings_path.read_text() == settings_text:
            kept = self._read()
        else:
            # The old file goes before the new settings come, so that the two always belong together.
            path.unlink(missing_ok=True)
            self._settings_path.write_text(settings_text)
        self._stream = open(path, "ab")
        self._stream.truncate(kept)

    def _read(self) -> int:
        """Fill `predictions` from the file; returns the number of bytes that are whole lines."""
        size = 0
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []:
            if not line.endswith(b"\n"):
                break
            self.predictions.append(json.loads(line))
            size += len(line)
        return size

    def add(self, prediction: dict) -> None:
        """Append one prediction, on disk at once."""
        self.predictions.append(prediction)
        self._stream.write(json.dumps(prediction, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        self._stream.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stream.close()
