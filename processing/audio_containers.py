"""What an audio file's own container says about its length: whether all of it is there, and what has to be set right
so that libsndfile reads all of it.

    mended(data, name) -> list of files, each to be decoded, one behind the other
"""

import logging
import re
from typing import NamedTuple

logger = logging.getLogger(__name__)

# A shortfall of this many bytes is a header counted among the samples, as some writers do, and no loss to be heard.
COUNTED_HEADER = 44


class TruncatedError(ValueError):
    """A file that ends before its header says it should."""


class Layout(NamedTuple):
    """Where the chunks of a container are. start: of the first. kind, size: bytes that name a chunk and tell its size.
    order: of the bytes. pad: what chunks begin at multiples of. head: bytes of the head that the size counts."""

    start: int
    kind: int
    size: int
    order: str
    pad: int
    head: int = 0


LAYOUTS = {
    b"RIFF": Layout(12, 4, 4, "little", 2),
    b"RF64": Layout(12, 4, 4, "little", 2),
    b"RIFX": Layout(12, 4, 4, "big", 2),
    b"FORM": Layout(12, 4, 4, "big", 2),  # AIFF, AIFF-C
    b"riff": Layout(40, 16, 8, "little", 8, head=24),  # W64
    b"caff": Layout(8, 4, 8, "big", 1),
}
SAMPLES = (b"data", b"SSND", b"BODY")


def mended(data: bytes, name: str) -> list[bytes]:
    """A file as one or several that libsndfile reads to their ends.

    Sizes of 0 and near the largest, which writers leave that stream to a pipe or are stopped, become what is there;
    FLAC says no length, since libsndfile would stop at it; Ogg streams that are chained are taken apart, and get the
    end-of-stream flag that they lack. Raises TruncatedError for a file that ends too early.
    """
    if data[:4] in LAYOUTS:
        return [_with_sizes(data, LAYOUTS[data[:4]], name)]
    if data[:4] in (b".snd", b"dns."):
        return [_with_au_size(data, name)]
    if data[:4] == b"OggS":
        return ogg_streams(data, name)
    if data[:7] == b"NIST_1A":
        _check_sphere(data, name)
    return [data]


def without_id3(data: bytes) -> bytes:
    """A file without the ID3v2 tags before it, of which the art alone can be longer than the audio."""
    while data[:3] == b"ID3" and len(data) > 10:
        size = sum((byte & 127) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
        data = data[10 + size + (10 if data[5] & 16 else 0) :]
    return data


def flac_samples(data: bytes) -> int:
    """How many samples FLAC's STREAMINFO announces, 0 where it does not know: the low 36 bits of bytes 18 to 25."""
    return int.from_bytes(data[18:26], "big") & (2**36 - 1)


def with_flac_samples(data: bytes, samples: int) -> bytes:
    """FLAC whose STREAMINFO announces so many samples."""
    head = int.from_bytes(data[18:26], "big") >> 36 << 36
    return data[:18] + (head | samples).to_bytes(8, "big") + data[26:]


def mp3_tag(data: bytes) -> tuple[int, bool]:
    """(position of the Xing tag in the first frame of an MP3 file or -1, whether what it says is all there is).

    It says how many frames and bytes follow. Files that were joined have more, of which decoders know nothing.
    """
    position = max(data.find(b"Xing", 0, 4096), data.find(b"Info", 0, 4096))
    if position < 0:
        return (data.find(b"VBRI", 0, 4096), True)
    flags, frames, size = (int.from_bytes(data[position + at : position + at + 4], "big") for at in (4, 8, 12))
    if not flags & 1 or not frames:
        return -1, False
    return position, not flags & 2 or len(data) - position < 1.01 * size + 512


def _check_size(available: int, size: int, name: str, unit: str = "bytes") -> None:
    if available + COUNTED_HEADER < size:
        raise TruncatedError(f"{name}: truncated file, {available} of the {size} {unit} that its header announces.")


def _unknown(size: int, width: int) -> bool:
    """Whether a size is what writers leave that cannot know it: all bits set, or near 2 or 4 GB."""
    return size >= (0x7FFFF000 if width == 4 else 2**62)


def _with_sizes(data: bytes, layout: Layout, name: str) -> bytes:
    """A file of chunks whose chunk of samples is as large as what is there."""

    def number(at: int, width: int) -> int:
        return int.from_bytes(data[at : at + width], layout.order)

    position, sizes_64 = layout.start, None
    while position + layout.kind + layout.size <= len(data):
        kind, at, width = data[position : position + 4], position + layout.kind, layout.size
        start, size = at + width, number(at, width) - layout.head
        if kind == b"ds64":
            sizes_64 = start
        if kind in SAMPLES:
            if size == 2**32 - 1 and sizes_64:
                at, width = sizes_64 + 8, 8
                size = number(at, width)
            outer, available = number(4, 4), len(data) - start
            # An empty recording may have chunks behind its samples, but then the file's own size counts them.
            stopped = size <= 0 and (data[:4] != b"RIFF" or outer + 8 <= start or _unknown(outer, 4))
            if not (stopped and available) and not _unknown(size, width):
                _check_size(available, size, name)
                return data
            size = (available + layout.head).to_bytes(width, layout.order)
            return data[:at] + size + data[at + width :]
        size += -(size + layout.head) % layout.pad
        position = start + max(size, 0)
    if data[8:12] == b"WAVE":
        raise TruncatedError(f"{name}: truncated file, its WAV header has no data chunk.")
    return data  # say AVI


def _with_au_size(data: bytes, name: str) -> bytes:
    order = "big" if data[:4] == b".snd" else "little"
    start, size = (int.from_bytes(data[at : at + 4], order) for at in (4, 8))
    if size and not _unknown(size, 4):
        _check_size(len(data) - start, size, name)
        return data
    return data[:8] + max(len(data) - start, 0).to_bytes(4, order) + data[12:]


def _check_sphere(data: bytes, name: str) -> None:
    fields = dict(re.findall(rb"(\w+) -i (\d+)", data[:1024]))
    samples, size, channels = (
        int(fields.get(key, 1)) for key in (b"sample_count", b"sample_n_bytes", b"channel_count")
    )
    if b"shorten" not in data[:1024]:
        _check_size(len(data) - 1024, samples * size * channels, name)


def ogg_streams(data: bytes, name: str) -> list[bytes]:
    """The Ogg streams that follow each other in a file, each with an end (RFC 3533, section 6), which recorders leave
    out that are stopped, and some always (RFC 7845, section 4)."""
    streams, position = [], 0
    while (position := data.find(b"OggS", position)) >= 0:
        body = position + 27 + (data[position + 26] if position + 26 < len(data) else 0)
        end = body + sum(data[position + 27 : body])
        if position + 27 > len(data) or end > len(data):
            raise TruncatedError(f"{name}: truncated file, the last page of its Ogg stream is not whole.")
        page = bytearray(data[position:end])
        if not streams or (page[5] & 2 and not streams[-1][-1][5] & 2):
            streams.append([])
        streams[-1].append(page)
        position = end
    if not streams[-1][-1][5] & 4:
        logger.warning("%s: its Ogg stream has no end-of-stream page. If it was cut there, the rest is missing.", name)
    return [b"".join(_ended(pages)) for pages in streams]


def _ended(pages: list[bytearray]) -> list[bytearray]:
    """Pages of a stream of which the last one that holds something says that it is the last."""
    if pages[-1][5] & 4 and len(pages[-1]) > 28 or len({bytes(page[14:18]) for page in pages}) > 1:
        return pages
    end = None
    while len(pages) > 1 and (len(pages[-1]) <= 28 or pages[-1][6:14] == b"\xff" * 8):
        dropped = pages.pop()
        end = end if dropped[6:14] == b"\xff" * 8 else dropped[6:14]
    last = pages[-1]
    last[5] |= 4
    last[6:14] = end or last[6:14]
    last[22:26] = bytes(4)
    last[22:26] = _ogg_checksum(last).to_bytes(4, "little")
    return pages


def _ogg_checksum(page: bytes) -> int:
    """CRC-32 with the polynomial 0x04C11DB7, the high bit first."""
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
    return value
