"""Words as they are heard: a transcript of what comes through a pipe, window by window.

    arecord -f S16_LE -r 16000 -c 1 -t raw | audiophi transcribe - --stream
    ffmpeg -i rtsp://… -f wav - | audiophi transcribe - --stream 4 --format json

Raw samples (16 bit, little-endian, 16 kHz, mono) or a WAV file of 16-bit samples at any rate. A window is cut at its
quietest place and written as soon as it is full, so a word is written at most `--stream` seconds after it is said, and
the time that the model takes.
"""

import json
import struct
import sys
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from modeling_audiophi.chunks_audiophi import split_at_pauses

RAW = (16_000, 1)  # rate in Hz and channels of samples without a header
READ = 3_200  # bytes that are waited for, at most: a tenth of a second of raw samples
SECONDS = (1.0, 30.0)  # shortest and longest window


def header(source: BinaryIO) -> tuple[int, int, bytes]:
    """(rate in Hz, channels, first samples) of what begins here. ValueError for a WAV file of other samples than of 16
    bits."""
    start = source.read(12)
    if start[:4] != b"RIFF" or start[8:] != b"WAVE":
        return *RAW, start
    rate = channels = 0
    while len(head := source.read(8)) == 8:
        name, size = struct.unpack("<4sI", head)
        if name == b"data":  # its size is not known of a stream
            break
        chunk = source.read(size + size % 2)
        if name == b"fmt ":
            kind, channels, rate, _, _, bits = struct.unpack("<HHIIHH", chunk[:16])
            if bits != 16 or kind not in (1, 0xFFFE):
                raise ValueError(f"standard input: WAV of {bits}-bit samples; send 16-bit PCM (ffmpeg: -c:a pcm_s16le)")
    if not rate:
        raise ValueError("standard input: a WAV file without a format before its samples")
    return rate, channels, b""


def windows(source: BinaryIO, seconds: float) -> Iterator[tuple[float, np.ndarray, int]]:
    """(begin in seconds, samples (n,) float32, rate in Hz) of what comes, each window as soon as it is full."""
    rate, channels, left = header(source)
    read, width = getattr(source, "read1", source.read), 2 * channels
    heard, begin = np.zeros(0, np.float32), 0

    while True:
        data = read(READ)
        left += data
        whole = len(left) // width * width
        new = np.frombuffer(left[:whole], "<i2").reshape(-1, channels).mean(1) / 32_768
        heard, left = np.concatenate([heard, new.astype(np.float32)]), left[whole:]
        while len(heard) > seconds * rate or (not data and len(heard)):
            end = split_at_pauses(heard, rate, seconds)[0][1]
            yield begin / rate, heard[:end], rate
            heard, begin = heard[end:], begin + end
        if not data:
            return


def stream(pipe, question: dict, seconds: float, form: str, **settings) -> int:
    """Prints what is said on standard input, as text or as JSON lines with times → exit code. ValueError for input that
    is none."""
    for begin, samples, rate in windows(sys.stdin.buffer, seconds):
        text = pipe((samples, rate), **question, **settings)["generated_text"]
        if form == "json":
            end = begin + len(samples) / rate
            text = json.dumps({"start": round(begin, 3), "end": round(end, 3), "text": text}, ensure_ascii=False)
        if text:
            print(text, flush=True)
    return 0
