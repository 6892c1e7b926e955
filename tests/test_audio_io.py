"""Every form in which audio can come, and every refusal: load_audio."""

import base64
import functools
import http.server
import io
import sys
import threading

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audiophi.data.augment import speed_perturb
from processing import AudioError, load_audio

RATE = 16_000


def tone(seconds=1.0, rate=RATE, frequency=440.0):
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def encode(array, rate=RATE, format="WAV", subtype=None):
    buffer = io.BytesIO()
    soundfile.write(buffer, array, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def peak_frequency(waveform, rate=RATE):
    return np.argmax(np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))) * rate / len(waveform)


class FakeDecoder:
    """What `datasets` gives for a decoded Audio column: torchcodec's AudioDecoder."""

    def get_all_samples(self):
        samples = torch.from_numpy(np.stack([tone(), tone()]))
        return type("Samples", (), {"data": samples, "sample_rate": RATE})()


@pytest.mark.parametrize(
    "make",
    [
        lambda path, data: str(path),
        lambda path, data: path,
        lambda path, data: f"file://{path}",
        lambda path, data: data,
        lambda path, data: (tone(), RATE),
        lambda path, data: (tone().tolist(), RATE),
        lambda path, data: (torch.from_numpy(tone()), RATE),
        lambda path, data: {"path": str(path), "bytes": None},
        lambda path, data: {"path": "only/a/name.wav", "bytes": data},
        lambda path, data: {"path": None, "array": tone().astype(np.float64), "sampling_rate": RATE},
        lambda path, data: {"audio": tone(), "sampling_rate": RATE},
        lambda path, data: {"url": str(path)},
        lambda path, data: FakeDecoder(),
    ],
)
def test_every_form_of_input_gives_the_same_waveform(tmp_path, make):
    data = encode(tone(), subtype="FLOAT")
    path = tmp_path / "tone.wav"
    path.write_bytes(data)
    waveform = load_audio(make(path, data))
    assert waveform.dtype == np.float32 and waveform.shape == (RATE,)
    np.testing.assert_allclose(waveform, tone(), atol=1e-6)


def test_open_files_and_pairs_in_scipys_order(tmp_path):
    path = tmp_path / "clip.wav"
    path.write_bytes(encode(tone(), subtype="FLOAT"))
    expected = load_audio(path)
    with open(path, "rb") as file:
        np.testing.assert_array_equal(load_audio(file), expected)
    with pytest.raises(AudioError, match="clip.wav: cannot be read .*closed"):
        load_audio(file)
    np.testing.assert_array_equal(load_audio(io.BytesIO(path.read_bytes())), expected)
    for pair in ((RATE, tone()), [RATE, tone()], (np.int64(RATE), torch.from_numpy(tone()))):
        np.testing.assert_array_equal(load_audio(pair), tone())


def test_data_url():
    data = encode(tone(), subtype="FLOAT")
    url = "data:audio/wav;base64," + base64.b64encode(data).decode()
    np.testing.assert_array_equal(load_audio(url), load_audio(data))
    np.testing.assert_array_equal(load_audio({"url": url}), load_audio(data))
    with pytest.raises(AudioError) as caught:
        load_audio(url[:-2000])
    assert len(str(caught.value)) < 200


def test_http_url(tmp_path):
    (tmp_path / "tone.wav").write_bytes(encode(tone()))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        np.testing.assert_allclose(load_audio(f"{url}/tone.wav"), tone(), atol=1e-4)
        with pytest.raises(AudioError, match="missing.wav: cannot be downloaded"):
            load_audio(f"{url}/missing.wav")
        server.shutdown()


@pytest.mark.parametrize(
    "format, subtype, tolerance",
    [
        ("WAV", "PCM_16", 1e-4),
        ("FLAC", "PCM_16", 1e-4),
        ("OGG", "VORBIS", 0.1),
        ("OGG", "OPUS", 0.1),
        ("MP3", None, 0.1),
    ],
)
def test_file_formats(format, subtype, tolerance):
    waveform = load_audio(encode(tone(), format=format, subtype=subtype))
    assert abs(len(waveform) - RATE) <= 0.1 * RATE
    middle = slice(4000, 12000)
    assert np.abs(waveform[middle]).max() == pytest.approx(0.5, abs=tolerance)
    assert peak_frequency(waveform) == pytest.approx(440, abs=5)


@settings(max_examples=30, deadline=None)
@given(rate=st.integers(4_000, 192_000), seconds=st.floats(0.2, 1.0))
def test_any_rate_keeps_duration_and_pitch(rate, seconds):
    samples = tone(seconds, rate)
    waveform = load_audio((samples, rate))
    assert len(waveform) == pytest.approx(len(samples) * RATE / rate, abs=2, rel=5e-4)
    assert peak_frequency(waveform) == pytest.approx(440, abs=1.5 / seconds + 1)


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000])
def test_usual_rates_are_exact(rate):
    assert len(load_audio((tone(10, rate), rate))) == 10 * RATE


def test_other_containers_go_to_torchcodec():
    encoders = pytest.importorskip("torchcodec.encoders", exc_type=Exception)
    encoder = encoders.AudioEncoder(torch.from_numpy(tone())[None], sample_rate=RATE)
    waveform = load_audio(encoder.to_tensor(format="mp4").numpy().tobytes())
    assert abs(len(waveform) - RATE) < 2000 and peak_frequency(waveform) == pytest.approx(440, abs=5)


def test_target_rate_other_than_16_khz():
    assert load_audio((tone(rate=8000), 8000), target_rate=48_000).shape == (48_000,)


@pytest.mark.parametrize("shape", ["channels first", "channels last"])
def test_channels_are_averaged(shape):
    stereo = np.stack([tone(), np.zeros(RATE, dtype=np.float32)], axis=0 if shape == "channels first" else 1)
    np.testing.assert_allclose(load_audio((stereo, RATE)), tone() / 2, atol=1e-6)


def test_stereo_file_and_single_channel_matrix():
    stereo = np.stack([tone(), -tone()], axis=1)
    assert np.abs(load_audio(encode(stereo))).max() < 1e-3
    np.testing.assert_array_equal(load_audio((tone()[None], RATE)), tone())


@pytest.mark.parametrize("dtype, full", [("int16", 2**15), ("int32", 2**31), ("int8", 2**7)])
def test_signed_integers_are_scaled_by_their_range(dtype, full):
    samples = np.array([0, full // 2, -full], dtype=dtype)
    np.testing.assert_allclose(load_audio((samples, RATE)), [0.0, 0.5, -1.0], atol=1e-6)


@pytest.mark.parametrize("kind", ["list", "int64", "int32", "torch"])
def test_16_bit_samples_in_a_wider_type_are_scaled_as_such(kind):
    samples = (tone() * 2**15).astype(np.int16)
    expected = load_audio((samples, RATE))
    assert 0.2 < np.abs(expected).max() <= 1
    wide = {"list": samples.tolist(), "torch": torch.tensor(samples.tolist())}.get(kind)
    wide = samples.astype(kind) if wide is None else wide
    np.testing.assert_array_equal(load_audio({"array": wide, "sampling_rate": RATE}), expected)


def test_quiet_samples_of_32_bits_stay_quiet():
    """Dither of a 24-bit converter, as libsndfile reads it: the low byte is empty."""
    dither = np.random.default_rng(0).integers(-3, 4, size=RATE).astype(np.int32) * 256
    assert np.abs(load_audio((dither, RATE))).max() < 1e-6
    assert not load_audio((np.zeros(5, dtype=np.int64), RATE)).any()


def test_unsigned_integers_are_centred():
    np.testing.assert_allclose(load_audio((np.array([128, 192, 0], dtype=np.uint8), RATE)), [0.0, 0.5, -1.0])


@pytest.mark.parametrize(
    "source, message",
    [
        (tone(), r"array of shape \(16000,\): no sampling rate given"),
        (torch.zeros(5), r"array of shape \(5,\): no sampling rate given"),
        ({"array": tone()}, "no sampling rate given"),
        ((tone(), 0), "0 is not a sampling rate"),
        ((tone(), -16000), "-16000 is not a sampling rate"),
        ((tone(), float("nan")), "nan is not a sampling rate"),
        ((np.zeros(0, dtype=np.float32), RATE), "empty audio"),
        ((np.array([0.0, np.nan]), RATE), "1 of 2 samples are NaN or Inf"),
        ((np.array([[0.0, np.inf], [0.0, 0.0]]), RATE), "samples are NaN or Inf"),
        ((np.zeros((2, 3, 4)), RATE), r"shape \(2, 3, 4\)"),
        ((np.zeros((100, 100)), RATE), r"shape \(100, 100\)"),
        ((np.zeros(4, dtype=complex), RATE), "complex128 are not audio"),
        ((np.array(["a"]), RATE), "are not audio"),
        ((tone() * np.float32(24_000), RATE), r"samples of up to .*e\+0\d are not audio. Scale them into \[-1, 1\]"),
        ((np.array([2**20, 3]), RATE), "int64 samples of up to 1048576 do not say what is full scale"),
        ((np.zeros(5), None), "no sampling rate given"),
        ((0, tone()), "0 is not a sampling rate"),
        (io.StringIO("text"), "StringIO: opened as text"),
        ("data:audio/wav;base64," + "!" * 10_000, r"data:audio/wav;base64 of 10000 characters: not a data URL"),
        ("data:audio/wav,RIFF", "not in base64"),
        (b"", "empty file"),
        (b"this is text and no audio file", "30 bytes of audio: not"),
        ({"type": "audio"}, "none of path, url, bytes, array or audio"),
        (object(), "object: not an audio input"),
        (7, "int: not an audio input"),
        ("no/such/file.wav", "no/such/file.wav: cannot be read"),
    ],
)
def test_bad_input_is_refused_by_name(source, message):
    with pytest.raises(AudioError, match=message):
        load_audio(source)


def test_folder_text_file_and_empty_recording_are_refused_by_name(tmp_path):
    (tmp_path / "notes.wav").write_text("not audio at all")
    (tmp_path / "silent.wav").write_bytes(encode(np.zeros(0)))
    for name, message in (("", "is a folder"), ("notes.wav", "not"), ("silent.wav", "empty audio")):
        with pytest.raises(AudioError, match=f"{name}: .*{message}"):
            load_audio(tmp_path / name)


def test_nan_in_a_file_is_refused(tmp_path):
    samples = tone()
    samples[7] = np.nan
    (tmp_path / "nan.wav").write_bytes(encode(samples, subtype="FLOAT"))
    with pytest.raises(AudioError, match="nan.wav: 1 of 16000 samples are NaN or Inf"):
        load_audio(tmp_path / "nan.wav")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize(
    "format, subtype", [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)]
)
def test_truncated_files_are_refused_by_name(tmp_path, format, subtype, share):
    # Noise, because a compressed tone is so small that its file is almost only header.
    data = encode(0.3 * np.random.default_rng(0).normal(size=3 * RATE).clip(-3, 3), format=format, subtype=subtype)
    path = tmp_path / "cut.audio"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(AudioError, match="cut.audio: .*truncated"):
        load_audio(path)


def test_wav_of_unknown_length_from_a_pipe_is_read():
    data = bytearray(encode(tone()))
    for position in (4, data.index(b"data") + 4):
        data[position : position + 4] = b"\xff\xff\xff\xff"
    assert len(load_audio(bytes(data))) == RATE


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_speed_perturbation_changes_duration_and_pitch(factor):
    faster = speed_perturb(tone(), factor)
    assert len(faster) == pytest.approx(RATE / factor, abs=2)
    assert peak_frequency(faster) == pytest.approx(440 * factor, abs=2)
    np.testing.assert_array_equal(speed_perturb(tone(), 1.0), tone())
    with pytest.raises(ValueError, match="speed factor 9"):
        speed_perturb(tone(), 9)


def hiss(seconds=2.0, seed=0):
    """Noise, because a compressed tone is so small that its file is almost only header."""
    return 0.3 * np.random.default_rng(seed).normal(size=int(seconds * RATE)).clip(-3, 3)


def patched(data, *changes):
    """`data` with bytes of (position, new) in place of its own."""
    data = bytearray(data)
    for position, new in changes:
        data[position : position + len(new)] = new
    return bytes(data)


def mp3(samples, mode="VARIABLE", tag=True):
    """MP3; without a `tag` as writers to a pipe leave it: no frame says how many there are."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", RATE, 1, format="MP3", bitrate_mode=mode, compression_level=0.5) as file:
        file.write(samples)
    data = buffer.getvalue()
    at = max(data.find(b"Xing", 0, 200), data.find(b"Info", 0, 200))
    assert at > 0
    return data if tag else data[data.index(data[:2], at) :]


def ogg_pages(data):
    """Where the pages of an Ogg file begin."""
    pages, position = [], 0
    while position < len(data):
        pages.append(position)
        body = position + 27 + data[position + 26]
        position = body + sum(data[position + 27 : body])
    return pages


def test_mp3_that_does_not_say_its_length_is_heard_to_its_end():
    """libsndfile guesses one by the first frame's bit rate and the file's size: a quiet beginning, and half is lost."""
    samples = np.concatenate([hiss(1.0), hiss(2.0) * 1e-3])
    id3 = b"ID3\x03\x00\x00\x00\x01\x1c\x20" + bytes(20_000)
    for data in (mp3(samples, tag=False), mp3(samples, "CONSTANT", tag=False), id3 + mp3(samples, tag=False),
                 mp3(samples, tag=False) + b"TAG" + bytes(125), mp3(samples[::-1], tag=False)):  # fmt: skip
        assert len(load_audio(data)) == pytest.approx(3 * RATE, abs=2500)


def test_mp3s_that_were_joined_are_heard_to_the_end_of_the_last():
    whole = load_audio(mp3(hiss()))
    assert len(whole) == 2 * RATE  # a length that is said is kept, without what the encoder put before and behind
    for parts in ((mp3(hiss()), mp3(hiss(1.0))), (mp3(hiss()), mp3(hiss(1.0), tag=False))):
        assert len(load_audio(b"".join(parts))) == pytest.approx(3 * RATE, abs=6000)


def test_flac_is_heard_to_its_end_whatever_its_header_says():
    data, expected = encode(hiss(), format="FLAC"), load_audio(encode(hiss(), format="FLAC"))
    head = int.from_bytes(data[18:26], "big") >> 36 << 36
    for announced in (0, RATE // 2):
        said = patched(data, (18, (head | announced).to_bytes(8, "big")))
        np.testing.assert_array_equal(load_audio(said), expected)
    with pytest.raises(AudioError, match="32000 of the 40000 samples"):
        load_audio(patched(data, (18, (head | 40_000).to_bytes(8, "big"))))


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_without_its_last_flag_is_heard(subtype, caplog):
    from processing.audio_containers import _ogg_checksum

    data = encode(hiss(), format="OGG", subtype=subtype)
    expected, last = load_audio(data), ogg_pages(data)[-1]

    def with_checksum(page):
        return patched(page, (22, _ogg_checksum(patched(page, (22, bytes(4)))).to_bytes(4, "little")))

    assert with_checksum(data[last:]) == data[last:]
    no_flag = data[:last] + with_checksum(patched(data[last:], (5, b"\x00")))
    np.testing.assert_array_equal(load_audio(no_flag), expected)
    assert "no end-of-stream page" in caplog.text
    # An end that is a page of its own, without a packet.
    end = patched(data[last : last + 27], (5, b"\x04"), (26, b"\x00"))
    np.testing.assert_array_equal(load_audio(no_flag + with_checksum(end)), expected)
    # Cut at the end of a page, as by a signal.
    assert 0 < len(load_audio(data[:last])) < len(expected)


def test_chained_ogg_streams_are_heard_one_behind_the_other():
    parts = [encode(hiss(1.0), format="OGG", subtype="OPUS"), encode(hiss(0.5), format="OGG", subtype="VORBIS")]
    parts.append(encode(tone(1.0, 24_000), 24_000, format="OGG", subtype="VORBIS"))
    whole, alone = load_audio(b"".join(parts)), [load_audio(part) for part in parts]
    assert len(whole) == pytest.approx(2.5 * RATE, abs=3)
    np.testing.assert_allclose(whole[: len(alone[0])], alone[0], atol=1e-6)
    assert peak_frequency(whole[-RATE // 2 :]) == pytest.approx(440, abs=5)
    with pytest.raises(AudioError, match="truncated"):
        load_audio(b"".join(parts)[:-100])


SIZES = {  # format: (kind of the samples' chunk, where its size is behind that, bytes, order)
    "WAV": (b"data", 4, 4, "little"),
    "WAVEX": (b"data", 4, 4, "little"),
    "AIFF": (b"SSND", 4, 4, "big"),
    "AU": (b".snd", 8, 4, "big"),
    "W64": (b"data", 16, 8, "little"),
    "RF64": (b"ds64", 16, 8, "little"),
    "CAF": (b"data", 4, 8, "big"),
}


@pytest.mark.parametrize("format", SIZES)
def test_sizes_that_a_stopped_writer_left_are_those_of_the_file(format):
    data = encode(tone(), format=format, subtype="PCM_16")
    expected = load_audio(data)
    kind, behind, width, order = SIZES[format]
    at = data.index(kind) + behind
    outer = [(4, bytes(4))] if format in ("WAV", "WAVEX", "AIFF") else []
    if format == "AIFF":
        outer.append((22, bytes(4)))  # the number of samples
    for size in (0, 2 ** (8 * width) - 1):
        left = patched(data, (at, size.to_bytes(width, order)), *outer)
        heard = load_audio(left)
        np.testing.assert_array_equal(heard[: len(expected)], expected, err_msg=f"size {size}")
        assert len(heard) - len(expected) <= 8  # what stands behind the samples
    with pytest.raises(AudioError, match="truncated"):
        load_audio(data[: len(data) // 2])


def test_wav_of_an_empty_recording_with_chunks_behind_it_is_empty():
    data = encode(np.zeros(0))
    data += b"LIST" + (1000).to_bytes(4, "little") + bytes(range(250)) * 4
    with pytest.raises(AudioError, match="empty audio"):
        load_audio(patched(data, (4, (len(data) - 8).to_bytes(4, "little"))))


@pytest.mark.parametrize("excess", [1, 8, 36, 44])
def test_a_header_counted_among_the_samples_is_no_loss(excess):
    data = encode(tone())
    at = data.index(b"data") + 4
    assert len(load_audio(patched(data, (at, (2 * RATE + excess).to_bytes(4, "little"))))) == RATE


def test_cut_sphere_files_are_refused():
    data = encode(tone(), format="NIST", subtype="PCM_16")
    assert len(load_audio(data)) == RATE
    with pytest.raises(AudioError, match="truncated file, 15488 of the 32000 bytes"):
        load_audio(data[: len(data) // 2])


class Codec:
    """What stands for torchcodec where it is not installed: 1 s of what its metadata say are `seconds`."""

    def __init__(self, seconds=1.0, problem=None):
        self.seconds, self.problem = seconds, problem

    def AudioDecoder(self, data):
        if self.problem:
            raise RuntimeError(f"{self.problem}\nat a line of C++")
        samples = type("Samples", (), {"data": torch.from_numpy(tone())[None], "sample_rate": RATE})()
        metadata = type("Metadata", (), {"duration_seconds": self.seconds})()
        return type("Decoder", (), {"metadata": metadata, "get_all_samples": lambda self: samples})()


def foreign():
    """Files in codecs that libsndfile lacks, in containers that it knows, and in one that it does not."""
    wav, ogg = encode(tone()), encode(hiss(), format="OGG", subtype="OPUS")
    at = wav.index(b"fmt ") + 8
    return {
        "G.722 in WAV": patched(wav, (at, (0x028F).to_bytes(2, "little"))),
        "AAC in WAV": patched(wav, (at, b"\xff\x00")),
        "Speex in Ogg": ogg.replace(b"OpusHead", b"Speex   ").replace(b"OpusTags", b"Speex   "),
        "WebM": b"\x1a\x45\xdf\xa3" + bytes(500),
        "AVI": b"RIFF\x00\x10\x00\x00AVI LIST" + bytes(500),
    }


@pytest.mark.parametrize("kind", foreign())
def test_what_libsndfile_lacks_goes_to_torchcodec_from_any_container(kind, monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "torchcodec.decoders", None)
        with pytest.raises(AudioError, match="of a kind for which torchcodec and FFmpeg have to be installed"):
            load_audio(foreign()[kind])
    monkeypatch.setitem(sys.modules, "torchcodec", Codec())
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", Codec())
    np.testing.assert_array_equal(load_audio(foreign()[kind]), tone())
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", Codec(seconds=1.4))
    with pytest.raises(AudioError, match="1.00 of 1.40 s could be decoded"):
        load_audio(foreign()[kind])
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", Codec(problem="moov atom not found"))
    with pytest.raises(AudioError, match=r"torchcodec: moov atom not found; libsndfile"):
        load_audio(foreign()[kind])
