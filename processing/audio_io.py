"""Any audio input → one float32 waveform: mono, in [-1, 1], at the rate that the encoder was trained with.

    load_audio(source) -> np.ndarray (samples,)

`source` is a path, a http(s) or data URL, the bytes of a file, a file opened for reading bytes, an `(array, rate)` pair
(in this order or the other), an object of `datasets`' Audio feature (decoded or not), or a bare array together with
`source_rate`. Whatever cannot be heard as the sender meant it is
refused with an `AudioError` that names the input: an array without its rate (played at the wrong speed it would still
"work"), no samples, NaN or Inf, a file that is not audio, a file that ends before its header says it should.

A server that hands on what strangers send can switch URLs off: AUDIOPHI_ALLOW_URLS=0 in its environment. Paths are
always opened, so it has to send the bytes.
"""

import base64
import http.client
import io
import os
import stat
import time
import urllib.parse
import urllib.request
from fractions import Fraction
from functools import lru_cache

import numpy as np
import soundfile
import torch
import torchaudio

from .audio_containers import TruncatedError, flac_samples, mended, mp3_tag, with_flac_samples, without_id3

MAX_CHANNELS = 64
# What a header may claim before anything is decoded: 24 hours, and 8 GiB as float32 (3 hours at 192 kHz).
MAX_SECONDS = 24 * 3600
MAX_VALUES = 2**31
# Float samples lie in [-1, 1]; decoders and mixes go a little beyond. What is 40 dB beyond are integers of some format
# as floats, and would be heard as noise.
MAX_AMPLITUDE = 100.0
URL_TIMEOUT_S = 60
URL_MAX_BYTES = 2**31
URL_SLOWEST = 16_000  # bytes per second
UNKNOWN_LENGTH = 2**63 - 1  # what libsndfile takes for one
# Samples that a container's length may count and no decoder gives: AAC's priming is 2112.
MAX_CODEC_DELAY = 2400
# Largest numerator or denominator of a resampling ratio. The polyphase filter bank grows with it: 44,099 → 16,000 Hz
# taken literally needs gigabytes. The nearest such fraction plays odd rates at most 0.05 % too fast or too slow; usual
# rates are exact.
MAX_RATIO_TERM = 1000


class AudioError(ValueError):
    """Audio that cannot be used; the message names the input and says why."""


def load_audio(source, target_rate: int = 16000, source_rate: int | None = None, name: str | None = None) -> np.ndarray:
    """Read, check, mix down and resample one clip.

    Args:
        source: see the module's docstring.
        target_rate: Hz of the result.
        source_rate: Hz of `source`, for bare arrays only.
        name: how error messages call the input; by default its path, or what kind of thing it is.
    Returns:
        float32 array of shape (samples,), channels averaged.
    Raises:
        AudioError: the input is unreadable, incomplete, empty, not finite, or an array without its rate.
    """
    array, rate, name = read_source(source, source_rate, name)
    return resample(to_mono(array, name), rate, target_rate)


def read_source(source, source_rate: int | None = None, name: str | None = None) -> tuple[np.ndarray, int, str]:
    """Tell the input forms apart → (array as given by the source, rate in Hz, name for messages)."""
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        return *_read_path(path, name or path), name or path
    if callable(getattr(source, "read", None)):
        name = name or str(getattr(source, "name", type(source).__name__))
        try:
            data = source.read()
        except (OSError, ValueError) as error:  # closed
            raise AudioError(f"{name}: cannot be read ({error}).") from error
        if not isinstance(data, bytes):
            raise AudioError(f"{name}: opened as text. Open it for reading bytes.")
        return *decode_bytes(data, name), name
    if isinstance(source, (bytes, bytearray, memoryview)):
        name = name or f"{len(source)} bytes of audio"
        return *decode_bytes(bytes(source), name), name
    if isinstance(source, dict):
        return _read_dict(source, source_rate, name)
    if hasattr(source, "get_all_samples"):  # torchcodec's decoder, which `datasets` hands out for decoded audio
        samples = source.get_all_samples()
        return samples.data.numpy(), int(samples.sample_rate), name or "decoded audio of a datasets row"
    if isinstance(source, (tuple, list)) and len(source) == 2:
        first, second = source
        if _is_array(first) and np.ndim(second) == 0:
            return read_source(first, second, name)
        if _is_array(second) and np.ndim(first) == 0:  # the order of scipy.io.wavfile and gradio
            return read_source(second, first, name)
    if _is_array(source) or isinstance(source, (list, tuple)):
        if isinstance(source, torch.Tensor):
            source = source.detach().cpu()
            source = source.float() if source.dtype == torch.bfloat16 else source  # numpy has no bfloat16
        array = np.asarray(source)
        name = name or f"array of shape {array.shape}"
        return array, _check_rate(source_rate, name), name
    raise AudioError(
        f"{name or type(source).__name__}: not an audio input. Give a path, URL, bytes, (array, sampling_rate) or a "
        "datasets Audio."
    )


def decode_bytes(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """Decode a whole audio file held in memory → (float32 array (samples,), channels averaged; rate).

    libsndfile reads WAV, FLAC, Ogg (Vorbis, Opus) and MP3; other containers (m4a, mp4, webm) and codecs go to
    torchcodec where it is installed.
    """
    if not data:
        raise AudioError(f"{name}: empty file (0 bytes).")
    try:
        parts = [_decode_part(part, name) for part in mended(without_id3(data), name)]
    except TruncatedError as error:
        raise AudioError(str(error)) from error
    rate = parts[0][1]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([resample(np.asarray(array, np.float32), own, rate) for array, own in parts]), rate


class _Forward(soundfile.SoundFile):
    """A file that is only read on: soundfile seeks behind every read, where libsndfile cannot seek in all it reads."""

    def seekable(self):
        return False


class _EndlessBytes(io.BytesIO):
    """Bytes whose end nobody finds by seeking. Of MP3 without a length of its own libsndfile guesses one, by the size
    of the file, and stops there; like this it reads on."""

    sought_end = False

    def seek(self, offset, whence=0):
        self.sought_end = whence == 2 and offset == 0
        return UNKNOWN_LENGTH if whence == 2 else super().seek(offset, whence)

    def tell(self):
        return UNKNOWN_LENGTH if self.sought_end else super().tell()


def _decode_part(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """What libsndfile, or else torchcodec, makes of a file → (float32 (samples,), rate)."""
    announced, endless = 0, False
    if data[:4] == b"fLaC":
        announced, endless = flac_samples(data), True
        data = with_flac_samples(data, 0)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, channels, is_mp3 = file.samplerate, file.channels, file.format == "MP3"
            announced = announced if endless else file.frames
            _check_header(announced, channels, rate, name)
            tag, whole = mp3_tag(data) if is_mp3 else (0, True)
            if is_mp3 and (tag < 0 or not whole):
                announced, endless = 0, True
            if not endless:
                array = file.read(announced, dtype="float32", always_2d=True)  # said, because GSM cannot seek
        if endless:
            if is_mp3 and tag >= 0:
                data = data[:tag] + bytes(4) + data[tag + 4 :]
            with _Forward(_EndlessBytes(data) if is_mp3 else io.BytesIO(data)) as file:
                array = _read_on(file, name)
    except MemoryError as error:
        raise AudioError(f"{name}: {announced} samples do not fit into memory. Cut it into shorter files.") from error
    except soundfile.LibsndfileError as error:
        return _decode_with_torchcodec(data, name, error.error_string)  # the message would name a buffer in memory
    if len(array) < announced:
        raise AudioError(f"{name}: truncated file, {len(array)} of the {announced} samples that its header announces.")
    return _mix(array, 1), rate


def _read_on(file: soundfile.SoundFile, name: str) -> np.ndarray:
    """All samples of a file of unknown length: float32 (samples, channels)."""
    blocks, total = [np.zeros((0, file.channels), np.float32)], 0
    while len(block := file.read(1 << 18, dtype="float32", always_2d=True)):
        blocks.append(block)
        total += len(block)
        _check_header(total, file.channels, file.samplerate, name)
    return np.concatenate(blocks)


def to_mono(array: np.ndarray, name: str) -> np.ndarray:
    """Any sample type and layout → float32 (samples,), integers scaled by their type's range, channels averaged.

    Raises AudioError for arrays that are empty, not numeric, not finite, or of a shape without an axis of channels.
    """
    array = np.asarray(array)
    if array.size == 0:
        raise AudioError(f"{name}: empty audio (no samples).")
    if array.dtype == bool or not (np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)):
        raise AudioError(f"{name}: samples of type {array.dtype} are not audio.")
    if array.ndim not in (1, 2) or (array.ndim == 2 and min(array.shape) > MAX_CHANNELS):
        raise AudioError(f"{name}: shape {array.shape} is not (samples,), (channels, samples) or (samples, channels).")
    if np.issubdtype(array.dtype, np.unsignedinteger):
        half = (np.iinfo(array.dtype).max + 1) / 2
        array = (array.astype(np.float64) - half) / half
    elif np.issubdtype(array.dtype, np.integer):
        array = array.astype(np.float64) / _full_scale(array, name)
    if array.ndim == 2:
        array = _mix(array, int(np.argmin(array.shape)))
    finite = np.isfinite(array)
    if not finite.all():
        raise AudioError(f"{name}: {int((~finite).sum())} of {array.size} samples are NaN or Inf.")
    if (peak := max(array.max(), -array.min())) > MAX_AMPLITUDE:
        raise AudioError(f"{name}: samples of up to {peak:.3g} are not audio. Scale them into [-1, 1].")
    return np.ascontiguousarray(array, dtype=np.float32)


def _full_scale(array: np.ndarray, name: str) -> float:
    """What 1.0 is in signed integers: their type's range, or 2¹⁵ for 16-bit samples in a wider type, as lists of JSON
    become. Those use the low bits; what has wide samples, and is as quiet, has none there."""
    peak = max(int(array.max()), -int(array.min()))
    if array.dtype.itemsize > 2 and peak <= 2**15 and (array % 256).any():
        return 2.0**15
    if array.dtype.itemsize > 4 and peak > 0:
        raise AudioError(
            f"{name}: {array.dtype} samples of up to {peak} do not say what is full scale. Scale them into [-1, 1]."
        )
    return -float(np.iinfo(array.dtype).min)


def _mix(array: np.ndarray, axis: int) -> np.ndarray:
    """The average over the axis of channels."""
    if array.shape[axis] == 1:
        return np.squeeze(array, axis)
    with np.errstate(invalid="ignore"):  # Inf beside -Inf: refused afterwards, by name
        return array.mean(axis=axis, dtype=np.float64)


def resample(waveform: np.ndarray, rate: int, target_rate: int) -> np.ndarray:
    """Band-limited resampling of float32 (samples,) with torchaudio."""
    ratio = Fraction(int(rate), int(target_rate))
    if ratio == 1:
        return waveform
    if ratio > 1:
        ratio = 1 / (1 / ratio).limit_denominator(MAX_RATIO_TERM)
    else:
        ratio = ratio.limit_denominator(MAX_RATIO_TERM)
    if ratio == 1:
        return waveform
    return _resampler(ratio.numerator, ratio.denominator)(torch.from_numpy(waveform)).numpy()


@lru_cache(maxsize=16)
def _resampler(rate: int, target_rate: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(rate, target_rate)


def _is_array(value) -> bool:
    return isinstance(value, (np.ndarray, torch.Tensor)) or (
        isinstance(value, list) and len(value) > 0 and np.ndim(value[0]) == 0 and not isinstance(value[0], (str, bytes))
    )


def _check_rate(rate, name: str) -> int:
    if rate is None:
        raise AudioError(f"{name}: no sampling rate given. Pass (array, sampling_rate) or sampling_rate=…")
    if (
        isinstance(rate, bool)
        or not isinstance(rate, (int, float, np.integer, np.floating))
        or not 100 <= rate <= 10**7
    ):
        raise AudioError(f"{name}: {rate!r} is not a sampling rate in Hz.")
    return round(float(rate))


def _read_path(path: str, name: str) -> tuple[np.ndarray, int]:
    if path.startswith("data:"):
        head, _, data = path.partition(",")
        name = f"{head[:60]} of {len(data)} characters" if name == path else name
        try:
            if not head.endswith(";base64"):
                raise ValueError("it is not in base64")
            return decode_bytes(base64.b64decode("".join(data.split()), validate=True), name)
        except ValueError as error:
            if isinstance(error, AudioError):
                raise
            raise AudioError(f"{name}: not a data URL of audio ({error}).") from error
    if path.startswith(("http://", "https://")):
        return decode_bytes(_download(path, name), name)
    path = local_path(path)
    try:
        check_file(path, name)
        with open(path, "rb") as file:
            return decode_bytes(file.read(), name)
    except AudioError:
        raise
    except OSError as error:
        raise AudioError(f"{name}: cannot be read ({error.strerror or error}).") from error
    except ValueError as error:  # a NUL, or half a character
        raise AudioError(f"{name!r}: cannot be the name of a file ({error}).") from error


def local_path(path: str) -> str:
    """A path with ~ as the user's folder, also of a file:// URL."""
    if path.startswith("file://"):
        path = urllib.parse.unquote(path.removeprefix("file://").removeprefix("localhost"))
    return os.path.expanduser(path)


def check_file(path: str, name: str | None = None) -> None:
    """AudioError for what is no file: reading a pipe that nobody writes to, or a device, never ends. What the shell
    hands over as /dev/stdin or /dev/fd/N is a file to whoever wrote the command. OSError for what is not there."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not (stat.S_ISFIFO(mode) and path.startswith(("/dev/fd/", "/dev/stdin"))):
        raise AudioError(
            f"{name or path}: is {'a folder' if stat.S_ISDIR(mode) else 'a device or pipe'}, not an audio file."
        )


def _download(url: str, name: str) -> bytes:
    """What is behind a URL. AudioError where URLs are switched off, for errors, and for what never ends."""
    if os.environ.get("AUDIOPHI_ALLOW_URLS") == "0":
        raise AudioError(f"{name}: URLs are switched off (AUDIOPHI_ALLOW_URLS=0). Give the file itself.")
    start, parts, size = time.monotonic(), [], 0
    try:
        with urllib.request.urlopen(url, timeout=URL_TIMEOUT_S) as response:
            while part := response.read1(1 << 20):
                parts.append(part)
                size += len(part)
                # A socket's own timeout starts again with every byte.
                if size > URL_MAX_BYTES or time.monotonic() - start > URL_TIMEOUT_S + size / URL_SLOWEST:
                    raise AudioError(
                        f"{name}: gave up after {size} bytes and {time.monotonic() - start:.0f} s: it is too large or "
                        "comes too slowly. Download it yourself and give the file."
                    )
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        raise AudioError(f"{name}: cannot be downloaded ({error}).") from error
    return b"".join(parts)


def _read_dict(source: dict, source_rate: int | None, name: str | None) -> tuple[np.ndarray, int, str]:
    """`datasets` Audio ({"path", "bytes"} or {"array", "sampling_rate"}), transformers' pipelines ({"raw",
    "sampling_rate"}) and the audio items of chat messages."""
    rate = source.get("sampling_rate", source_rate)
    path = source.get("path") or source.get("url")
    name = name or path
    for key in ("array", "raw", "audio"):
        if source.get(key) is not None:
            return read_source(source[key], rate, name)
    if source.get("bytes") is not None:
        return read_source(source["bytes"], name=name)
    if path:
        return read_source(path, name=name)
    raise AudioError(
        f"{name or 'audio item'}: has none of path, url, bytes, array or audio (keys: {sorted(map(str, source))})."
    )


def _check_header(frames: int, channels: int, rate: int, name: str) -> None:
    """Refuse what a damaged header claims, before memory is taken for it."""
    if channels > MAX_CHANNELS:
        raise AudioError(f"{name}: {channels} channels are not audio; at most {MAX_CHANNELS} are averaged.")
    if frames / _check_rate(rate, name) > MAX_SECONDS or frames * channels > MAX_VALUES:
        raise AudioError(
            f"{name}: its header announces {frames} samples of {channels} channels at {rate} Hz "
            f"({frames / rate / 3600:.3g} hours). It is damaged, or has to be cut into shorter files."
        )


def _decode_with_torchcodec(data: bytes, name: str, reason: str) -> tuple[np.ndarray, int]:
    """What libsndfile cannot read for that `reason`. AudioError also where less comes out than the file is long."""
    try:
        from torchcodec.decoders import AudioDecoder
    except (ImportError, OSError, RuntimeError):
        raise AudioError(
            f"{name}: not audio that libsndfile can decode ({reason.strip('. ')}). It is damaged or truncated, or of a "
            "kind for which torchcodec and FFmpeg have to be installed (WAV, FLAC, Ogg and MP3 mostly are not)."
        ) from None
    try:
        decoder = AudioDecoder(data)
        samples = decoder.get_all_samples()
    except (RuntimeError, ValueError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AudioError(
            f"{name}: not audio that can be decoded (torchcodec: {why.strip('. ')}; libsndfile: {reason.strip('. ')})."
        ) from error
    rate, heard = _check_rate(int(samples.sample_rate), name), samples.data.shape[-1]
    announced = round((decoder.metadata.duration_seconds or 0) * rate)
    if heard + MAX_CODEC_DELAY < announced:
        raise AudioError(
            f"{name}: {heard / rate:.2f} of {announced / rate:.2f} s could be decoded. Convert it to WAV or FLAC; "
            "if it is no longer then, it is truncated."
        )
    return _mix(samples.data.numpy(), 0), rate
