"""What takes long to find out about data and follows from it alone, kept on disk for the next start."""

import contextlib
import functools
import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import audiophi
import processing
from audiophi.data.alignment_text import AlignmentTokenizer


def kept(cache_dir: str | Path | None, name: str | None, make: Callable):
    """`make()`, plain data; what it made before where `<cache_dir>/<name>.json` has it.

    Several processes may do this at once, and what is damaged is made anew. `cache_dir` or `name` None: nothing is
    kept.
    """
    if cache_dir is None or name is None:
        return make()
    file = Path(cache_dir, f"{name}.json")
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        made = make()
    partial = file.with_suffix(f".{uuid.uuid4().hex}.partial")
    with contextlib.suppress(OSError):  # a full or read-only disk only costs the time to make it again
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(made))
        os.replace(partial, file)
    return made


@functools.cache
def code_hash() -> str:
    """Of the code that reads data and makes examples of it: what another version found out is not taken over."""
    digest = hashlib.sha256()
    for package in (audiophi, processing):
        for file in sorted(Path(package.__file__).parent.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def kept_vocab(tokenizer: AlignmentTokenizer, texts: list[str], cache_dir: str | None) -> list[int]:
    """`tokenizer.vocab(texts)`."""
    digest = hashlib.sha256(json.dumps([tokenizer.made_of, code_hash(), texts]).encode())
    return kept(cache_dir, f"align_vocab/{digest.hexdigest()[:32]}", lambda: tokenizer.vocab(texts))
