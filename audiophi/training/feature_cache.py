"""On-disk cache of a frozen audio encoder's outputs, so that epochs after the first do not run the encoder.

Layout: `<cache_dir>/<fingerprint>/` holds `fingerprint.json` and pairs `<shard>.npy` (frames of many clips, (frames,
D)) and `<shard>.json` (which clip lies where). A shard counts only once its `.json` is there, and both files are
written under another name and renamed: a process killed at any moment leaves a valid cache that the next run
completes. Shard names are random, so several processes may fill one cache.

A shard is opened for each clip that is read: draws are in random order, so that no file would be read twice soon, and
descriptors are fewer than the shards of a large cache.

The fingerprint covers all that determines the features: the encoder's weights, its layer, the feature extractor's
settings, the dtype. A clip's key covers its audio bytes and the speed factor. So nothing is ever stale, and deleting
the folder is always safe.
"""

import hashlib
import json
import logging
import os
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from processing.audio_io import check_file

logger = logging.getLogger(__name__)


def fingerprint_of(**parts) -> dict:
    """Plain data (as JSON reads it back) that identifies how features are made; keyword values may be anything JSON
    writes."""
    return json.loads(json.dumps(parts, sort_keys=True, default=str))


def hash_weights(module: torch.nn.Module) -> str:
    """sha256 over names, dtypes and bytes of all parameters and persistent buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_audio(source: bytes | str | os.PathLike) -> str:
    """sha256 of the encoded audio: bytes, or the file at a path. Raises OSError or AudioError if
    the path cannot be read."""
    digest = hashlib.sha256(source) if isinstance(source, bytes) else hashlib.sha256()
    if not isinstance(source, bytes):
        check_file(os.fspath(source))
        with open(source, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:32]


def clip_key(audio_hash: str, speed: float = 1.0) -> str:
    """Cache key of a clip played at a speed factor."""
    return f"{audio_hash}@{speed:g}"


class Place(NamedTuple):
    """Where a clip's frames lie: in the file `shard`.npy from byte `offset`, `frames` of each window, `size` values
    each."""

    shard: str
    offset: int
    frames: list[int]
    size: int


class FeatureCache:
    """Maps a clip's key to its encoder windows, a list of (frames, D) arrays.

    Args:
        cache_dir: folder that may hold caches of several encoders.
        fingerprint: from fingerprint_of().
        dtype: "float16" halves the size (relative rounding error 5e-4); "float32" is exact.
        shard_bytes: a shard is written when this much is waiting: what an interruption can cost.
    """

    def __init__(self, cache_dir: str | Path, fingerprint: dict, dtype: str = "float16", shard_bytes: int = 32 << 20):
        fingerprint = {**fingerprint, "dtype": dtype}
        name = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = Path(cache_dir) / name
        self.dtype, self.shard_bytes = np.dtype(dtype), shard_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._entries: dict[str, Place] = {}
        self._known: set[str] = set()  # shards
        self._waiting: dict[str, list[np.ndarray]] = {}
        self._waiting_bytes = 0
        if not (self.folder / "fingerprint.json").exists():
            self._write(self.folder / "fingerprint.json", json.dumps(fingerprint, indent=1, sort_keys=True).encode())
        self.refresh()

    def refresh(self) -> None:
        """Reads the index of shards that other processes have completed since."""
        for index in sorted(self.folder.glob("*.json")):
            if index.name != "fingerprint.json" and index.stem not in self._known:
                self._read_shard(index)

    def _read_shard(self, index: Path) -> None:
        """Adds a shard's clips. One that contradicts its index (a copy cut short) is removed, and will be made again;
        one that cannot be read now (too many open files, a share that is away) stays where it is."""
        array = index.with_suffix(".npy")
        try:
            clips = json.loads(index.read_text())
            with open(array, "rb") as file:
                np.lib.format.read_magic(file)
                (frames, size), _, dtype = np.lib.format.read_array_header_1_0(file)
                offset, length = file.tell(), os.fstat(file.fileno()).st_size
            told = sum(sum(clip["frames"]) for clip in clips)
            if (frames, dtype) != (told, self.dtype) or length != offset + frames * size * dtype.itemsize:
                raise ValueError(f"{length} bytes are not {told} frames of {size} {self.dtype}")
        except OSError as error:
            logger.warning("cache: %s cannot be read (%s); its clips are encoded again", index, error)
            return
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("cache: %s and %s are damaged (%s) and removed", array, index.name, error)
            index.unlink(missing_ok=True)
            array.unlink(missing_ok=True)
            return
        self._add(index.stem, clips, offset, size)

    def _add(self, shard: str, clips: list[dict], offset: int, size: int) -> None:
        """Notes where the clips of a shard lie, whose frames begin at byte `offset`."""
        self._known.add(shard)
        for clip in clips:
            self._entries[clip["key"]] = Place(shard, offset, clip["frames"], size)
            offset += sum(clip["frames"]) * size * self.dtype.itemsize

    def __contains__(self, key: str) -> bool:
        return key in self._entries or key in self._waiting

    def __len__(self) -> int:
        return len(self._entries) + len(self._waiting)

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file())

    def num_frames(self, key: str) -> int:
        """Frames of all windows of a clip."""
        return sum(self._entries[key].frames)

    def put(self, key: str, windows: list[np.ndarray | torch.Tensor]) -> None:
        """Stores a clip's windows, (frames, D) each, all valid frames. Written to disk in shards; call flush() at the
        end."""
        arrays = [np.asarray(w.detach().cpu().float() if isinstance(w, torch.Tensor) else w) for w in windows]
        if self.dtype == np.float16 and max(np.abs(a).max(initial=0) for a in arrays) > np.finfo(np.float16).max:
            raise ValueError("the encoder's outputs exceed the range of float16; set cache_dtype: float32")
        self._waiting[key] = [a.astype(self.dtype) for a in arrays]
        self._waiting_bytes += sum(a.nbytes for a in self._waiting[key])
        if self._waiting_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what is waiting as one shard."""
        if not self._waiting:
            return
        clips = [{"key": key, "frames": [len(w) for w in windows]} for key, windows in self._waiting.items()]
        frames = np.concatenate([w for windows in self._waiting.values() for w in windows])
        index = self.folder / f"{uuid.uuid4().hex}.json"
        partial = index.with_suffix(".npy.partial")
        with open(partial, "wb") as file:
            np.save(file, frames)
            offset = file.tell() - frames.nbytes
        os.replace(partial, index.with_suffix(".npy"))
        self._write(index, json.dumps(clips).encode())
        self._waiting, self._waiting_bytes = {}, 0
        self._add(index.stem, clips, offset, frames.shape[1])

    def get(self, key: str) -> list[torch.Tensor]:
        """A clip's windows, float32 (frames, D) each. OSError where it is not there or cannot be read."""
        if key in self._waiting:
            self.flush()
        if key not in self._entries:
            raise FileNotFoundError(
                f"{self.folder}: lacks the encoder's outputs of clip {key}, which were there when the stage began. "
                "Leave the folder alone while a run uses it; the same command again makes what is missing"
            )
        shard, offset, lengths, size = self._entries[key]
        path, count = self.folder / f"{shard}.npy", sum(lengths) * size
        frames = np.fromfile(path, self.dtype, count, offset=offset)
        if len(frames) < count:
            raise OSError(f"{path}: ends before clip {key}")
        return list(torch.from_numpy(frames.astype(np.float32).reshape(-1, size)).split(lengths))

    @staticmethod
    def _write(path: Path, content: bytes) -> None:
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        partial.write_bytes(content)
        os.replace(partial, path)
