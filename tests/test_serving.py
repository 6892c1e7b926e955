"""`audiophi serve`: OpenAI's client and curl against a real socket, on a tiny random model."""

import base64
import io
import json
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile as sf
from transformers import pipeline

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

from audiophi import serving  # noqa: E402
from audiophi.cli.main import main  # noqa: E402

RATE = 16_000
QUESTION = "Who speaks?"


def wav(samples) -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, samples, RATE, format="WAV")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pipe(make_tiny_model):
    model, processor = make_tiny_model(readout="collapse")
    processor.tasks = {"transcribe": {"instructions": ["Transcribe the speech."], "in_pieces": True}}
    model.generation_config.max_new_tokens = 6
    return pipeline("audio-text-to-text", model=model, processor=processor)


@pytest.fixture(scope="module")
def address(pipe):
    config = uvicorn.Config(serving.application(serving.Served("org/tiny", pipe)), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=5)


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def chat(audio: bytes, text=QUESTION):
    sound = {"type": "input_audio", "input_audio": {"data": base64.b64encode(audio).decode(), "format": "wav"}}
    return [{"role": "user", "content": [sound, {"type": "text", "text": text}]}]


def test_chats_are_answered_as_by_the_pipeline(client, pipe, waveform):
    clips = [wav(waveform(1.0, seed)) for seed in (1, 2)]
    expected = [pipe({"audio": clip, "instruction": QUESTION})["generated_text"] for clip in clips]
    assert expected[0] and client.models.list().data[0].id == "org/tiny"
    with ThreadPoolExecutor(2) as pool:  # at once
        asked = [pool.submit(client.chat.completions.create, model="org/tiny", messages=chat(clip)) for clip in clips]
        assert [one.result().choices[0].message.content for one in asked] == expected
    link = {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64," + base64.b64encode(clips[0]).decode()}}
    turn = {"role": "user", "content": [link, {"type": "text", "text": QUESTION}]}
    answer = client.chat.completions.create(model="tiny", messages=[turn])
    assert answer.choices[0].message.content == expected[0] and answer.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(model="org/tiny", messages=chat(clips[0]), stream=True)
    pieces = [chunk.choices[0].delta.content for chunk in stream]
    assert "".join(piece for piece in pieces if piece).strip() == expected[0]
    short = client.chat.completions.create(model="org/tiny", messages=chat(clips[0]), max_tokens=1)
    assert len(short.choices[0].message.content) < len(expected[0])


def test_files_are_transcribed_in_every_form(client, pipe, waveform):
    """The recording is longer than the tiny Whisper's window of 2 s."""
    audio = wav(waveform(5.0, seed=5))
    expected = pipe(audio, return_timestamps="word")
    ask = client.audio.transcriptions.create
    assert ask(model="org/tiny", file=("a.wav", audio)).text == expected["generated_text"] != ""
    told = ask(model="org/tiny", file=("a.wav", audio), response_format="verbose_json",
               timestamp_granularities=["word"])  # fmt: skip
    assert [word.word for word in told.words] == [chunk["text"] for chunk in expected["chunks"]]
    assert (told.words[-1].start, told.words[-1].end) == expected["chunks"][-1]["timestamp"] and told.duration == 5.0
    srt = ask(model="org/tiny", file=("a.wav", audio), response_format="srt")
    assert srt.startswith("1\n00:00:00,") and ask(model="org/tiny", file=("a.wav", audio), response_format="text")
    events = list(ask(model="org/tiny", file=("a.wav", audio), stream=True))
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text.split() == expected["generated_text"].split()
    assert "".join(event.delta for event in events[:-1]) == events[-1].text


def test_what_cannot_be_used_is_named_by_a_4xx(client, waveform):
    for streamed in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            client.audio.transcriptions.create(model="org/tiny", file=("broken.wav", b"no audio"), stream=streamed)
        assert b"broken.wav" in refused.value.response.read()
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="org/tiny", messages=chat(b"no audio"), stream=streamed)
        assert b"audio" in refused.value.response.read()
    good = wav(waveform(0.5))
    with pytest.raises(openai.NotFoundError, match="other"):
        client.chat.completions.create(model="other", messages=chat(good))
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model="org/tiny", messages=[])
    with pytest.raises(openai.BadRequestError, match="numbers"):
        client.chat.completions.create(model="org/tiny", messages=chat(good), max_tokens="many")
    with pytest.raises(openai.BadRequestError, match="yaml"):
        client.audio.transcriptions.create(model="org/tiny", file=("a.wav", good), response_format="yaml")
    with pytest.raises(openai.NotFoundError, match="served here"):
        client.responses.create(model="org/tiny", input="hello")
    assert client.audio.transcriptions.create(model="org/tiny", file=("a.wav", good)).text is not None  # still there


def test_curl_is_enough(address, waveform, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (tmp_path / "a.wav").write_bytes(wav(waveform(0.5)))

    def curl(*arguments):
        done = subprocess.run(["curl", "-s", *arguments], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    url = f"{address}/v1/audio/transcriptions"
    assert set(curl(url, "-F", f"file=@{tmp_path / 'a.wav'}", "-F", "model=org/tiny")) == {"text"}
    assert curl(f"{address}/health") == {"status": "ok"}
    (tmp_path / "bad.wav").write_bytes(np.zeros(10).tobytes())
    assert "bad.wav" in curl(url, "-F", f"file=@{tmp_path / 'bad.wav'}", "-F", "model=org/tiny")["error"]["message"]


def test_a_model_that_is_none_ends_before_anything_is_served(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(tmp_path)])
    assert ended.value.code == 1 and "config.json" in capsys.readouterr().err
