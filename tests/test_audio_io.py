"""Every form in which audio can come, and every refusal: load_audio."""

import base64
import functools
import http.server
import io
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
