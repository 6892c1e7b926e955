"""The demo's parts, on a tiny checkpoint: what streams, what it refuses and how, what it draws."""

import threading
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import soundfile as sf
from transformers import AutoProcessor, pipeline

from audiophi import app
from audiophi.cli.main import main
from audiophi.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
RATE = 16_000
ASK = "Transcribe the speech."


@pytest.fixture(scope="module")
def pipe(make_tiny_model):
    """A pipeline whose checkpoint decodes with beams and the alignment head; `heard` on it lists results."""
    model, processor = make_tiny_model(readout="collapse")
    settings = {"num_beams": 2, "length_penalty": 0.0, "ctc_weight": 0.5}
    model.generation_config.update(suppress_tokens=None)
    model.generation_config.tasks = {"transcribe": settings, "caption": {}}
    return pipeline("audio-text-to-text", model=model, processor=processor, device="cpu", max_new_tokens=8)


@pytest.fixture(scope="module")
def page(pipe):
    """(function behind the button, function behind a change of the audio)"""
    blocks = app.build(pipe, "tiny", longest=3)
    assert blocks.analytics_enabled is False
    return [next(fn.fn for fn in blocks.fns.values() if fn.api_name == name) for name in ("ask", "show")]


def test_the_draft_streams_and_the_beams_answer(pipe, waveform):
    """Over the three pieces of a recording that is longer than the window."""
    clip = waveform(5.0, seed=3)
    greedy = pipe((clip, RATE), num_beams=1, length_penalty=1.0)["generated_text"]
    best = pipe((clip, RATE))["generated_text"]
    assert greedy.split() != best.split()  # or this test could not tell them apart
    steps = list(app.answer(pipe, clip, ASK))
    drafts = [words for words, status, _ in steps if status.startswith("Draft: ")]
    assert len(drafts) > 3 and all(later.startswith(words) for words, later in zip(drafts, drafts[1:], strict=False))
    assert drafts[-1].split() == greedy.split()
    assert steps[-1][0] == best and steps[-1][1].startswith("Done (2 beams): 5.0 s of audio")
    *_, last = app.answer(pipe, clip, ASK, search=False)
    assert last[0].split() == greedy.split() and last[1].startswith("Done (greedy)")


def test_the_words_of_a_transcript_have_their_times(pipe, page, make_tiny_model, waveform, tmp_path):
    """Those that the pipeline finds, of what stands in the answer; none of other answers."""
    clip = waveform(2.9, seed=3)
    sf.write(tmp_path / "clip.wav", clip, RATE, subtype="FLOAT")
    for search in (True, False):
        steps = list(page[0](str(tmp_path / "clip.wav"), ASK, search))
        how = {} if search else {"num_beams": 1, "length_penalty": 1.0}
        wanted = pipe((clip, RATE), return_timestamps="word", **how)
        assert steps[-1][3] == [(chunk["text"], *chunk["timestamp"], None) for chunk in wanted["chunks"]]
        assert [word for word, *_ in steps[-1][3]] == steps[-1][0].split() != []
        assert all(0 <= start < end <= 2.9 for _, start, end, _ in steps[-1][3])
        assert steps[0][3] is None
    *_, last = app.answer(pipe, clip, "Describe the sound.")
    assert last[0] and last[2] == []
    model, processor = make_tiny_model(align=False)
    *_, last = app.answer(pipeline("audio-text-to-text", model=model, processor=processor, max_new_tokens=8), clip, ASK)
    assert last[0] and last[2] == []


def test_doubtful_words_are_marked():
    times = [("the", 0.0, 0.2, 97), ("garlic", 0.2, 0.6, 31)]
    assert app.doubtful(times) == [("the", None), ("garlic", "doubtful")]
    assert app.doubtful([("the", 0.0, 0.2, None)]) is None and app.doubtful([]) is None and app.doubtful(None) is None


def test_closing_the_page_stops_the_model(pipe, waveform):
    """Between two words, and while the beams search."""
    heard = []

    class Spy:
        """The pipeline, noting how many words each call wrote."""

        def __getattr__(self, name):
            return getattr(pipe, name)

        def __call__(self, clip, **settings):
            # Many different words, without an end.
            ends = pipe.engine.arguments()["generation_config"].eos_token_id
            more = {"max_new_tokens": 250, "suppress_tokens": ends, "no_repeat_ngram_size": 1}
            heard.append(pipe(clip, **more, **settings))
            return heard[-1]

    def tokens(result):
        return len(pipe.tokenizer.encode(result["generated_text"]))

    clip, threads = waveform(1.0), threading.active_count()
    steps = app.answer(Spy(), clip, "Go on.")
    next(words for words, *_ in steps if words)
    steps.close()
    assert threading.active_count() == threads and len(heard) == 1 and tokens(heard[0]) < 200
    steps = app.answer(Spy(), clip, ASK)  # a free question is answered without beams
    next(words for words, status, _ in steps if status.startswith("Draft complete"))
    steps.close()
    assert threading.active_count() == threads and len(heard) == 3
    assert tokens(heard[1]) > 200 > tokens(heard[2])


def test_what_cannot_be_heard_is_said_by_its_name(pipe, page, waveform, tmp_path):
    ask, show = page
    files = {
        "notes.wav": (b"no audio", "notes.wav: not a"),
        "empty.mp3": (b"", "empty.mp3: empty file"),
        "long.wav": (waveform(3.2), "long.wav: 3 s is too long, this demo takes 3 s"),
        "none.wav": (np.zeros(0, dtype=np.float32), "none.wav: empty audio"),
    }
    for name, (content, message) in files.items():
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else sf.write(path, content, RATE)
        for refused in (lambda path=path: show(str(path)), lambda path=path: list(ask(str(path), ASK, True))):
            with pytest.raises(gr.Error) as error:
                refused()
            assert error.value.message.startswith(message) and str(tmp_path) not in error.value.message
            assert not error.value.print_exception
    sf.write(tmp_path / "good.wav", waveform(0.5), RATE)
    for path, instruction, message in (
        (None, ASK, "nothing to hear yet"),
        (tmp_path / "good.wav", "  ", "instruction is empty"),
        (tmp_path / "good.wav", None, "instruction is empty"),
    ):
        with pytest.raises(gr.Error, match=message):
            list(ask(path and str(path), instruction, True))
    *_, last = ask(str(tmp_path / "good.wav"), ASK, True)
    assert last[1].startswith("Done") and show(None) is None


def test_errors_of_the_server_are_not_blamed_on_the_input():
    with pytest.raises(RuntimeError, match="a bug"), app.readable():
        raise RuntimeError("a bug")


def test_long_recordings_are_refused_before_they_are_decoded(pipe, tmp_path, monkeypatch):
    sf.write(tmp_path / "hours.flac", np.zeros(60 * RATE, dtype=np.int16), RATE)
    monkeypatch.setattr(pipe.processor, "load_audio", lambda path: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="hours.flac: 60 s is too long"):
        app.read(pipe, str(tmp_path / "hours.flac"), longest=59)
    # Where libsndfile cannot tell how long a file is, once it is decoded.
    (tmp_path / "film.webm").write_bytes(b"not for libsndfile")
    monkeypatch.setattr(pipe.processor, "load_audio", lambda path: np.zeros(60 * RATE, dtype=np.float32))
    with pytest.raises(ValueError, match="film.webm: 60 s is too long"):
        app.read(pipe, str(tmp_path / "film.webm"), longest=59)


def test_the_picture_shows_when_and_how_high():
    """A second of 1 kHz, then a louder one of 3 kHz."""
    time_axis = np.arange(RATE) / RATE
    tones = [scale * np.sin(2 * np.pi * pitch * time_axis) for scale, pitch in ((0.2, 1000), (0.6, 3000))]
    figure = app.picture(np.concatenate(tones).astype(np.float32), RATE)
    top, bottom = figure.axes
    (image,) = bottom.images
    left, right, low, high = image.get_extent()
    assert (left, right, low, high) == (0, 2, 0, 8)
    level = np.asarray(image.get_array())
    columns = (np.array([0.5, 1.5]) / 2 * level.shape[1]).astype(int)
    assert level[:, columns].argmax(axis=0) / (level.shape[0] - 1) * high == pytest.approx([1, 3], abs=0.05)
    assert image.get_clim()[1] - image.get_clim()[0] == app.DECIBELS
    envelope = top.collections[0].get_paths()[0].vertices
    assert envelope[envelope[:, 0] < 0.95][:, 1].max() == pytest.approx(0.2, abs=0.01)
    assert envelope[:, 1].max() == pytest.approx(0.6, abs=0.01)
    for length in (1, 10, 700):  # nothing is too short, silence neither
        app.picture(np.zeros(length, dtype=np.float32), RATE).canvas.draw()


def test_the_page_says_how_it_answers(pipe, make_tiny_model):
    said = app.explanation(pipe, 600)
    assert "2 beams" in said and "alignment head" in said and "longer than 2 s" in said and "600 s" in said
    model, processor = make_tiny_model(align=False)
    plain = pipeline("audio-text-to-text", model=model, processor=processor, device="cpu")
    said = app.explanation(plain, 60)
    assert "without beams" in said and "alignment head" not in said and "draft" not in said


def test_the_page_offers_the_known_instructions(pipe):
    assert offered(app.build(pipe, "tiny")) == {
        words for task in pipe.processor.tasks.values() for words in task["instructions"]
    }
    assert app.beams(pipe, "transcribe the speech") == 2 and app.beams(pipe, "Who speaks?") == 1


def offered(page):
    """The instructions that a page has to be clicked at."""
    _, instructions = [block for block in page.blocks.values() if isinstance(block, gr.components.Dataset)]
    return {sample[0] for sample in instructions.samples}


def test_the_released_checkpoint_offers_what_it_was_trained_on(pipe):
    """In no words that are recognised but were kept for tests, and every kind of question about one clip."""
    processor = AutoProcessor.from_pretrained(ROOT / "checkpoints" / "audiophi-tiny")
    found = offered(app.build(With(pipe, processor=processor), "audiophi-tiny"))
    assert found >= {*TASKS["transcribe"].wordings} and not found & {*TASKS["transcribe"].test_wordings}
    questions = {"What is the last word?", "Is the speaker a man or a woman?", "Is this dog bark or chainsaw?"}
    assert found >= questions


class With:
    """A pipeline with something else in it."""

    def __init__(self, pipe, **others):
        self.pipe = pipe
        vars(self).update(others)

    def __getattr__(self, name):
        return getattr(self.pipe, name)


def test_the_samples_can_be_heard(pipe):
    """In the page, and by the model; there is speech and there are sounds."""
    assert {Path(path).stem for path in app.SAMPLES} >= {"man", "woman", "clock", "rain"}
    assert sum(Path(path).stat().st_size for path in app.SAMPLES) < 200_000
    for path in app.SAMPLES:
        assert np.abs(app.read(pipe, path)).max() > 0.1


def test_the_alignments_own_reading_is_beside_the_answer(page, pipe, waveform, tmp_path):
    """Whatever it hears, cut into the same pieces; of a model without a head nothing."""
    path = tmp_path / "long.wav"
    sf.write(path, waveform(2.9), RATE)  # two pieces
    heard = app.reading(pipe, app.read(pipe, path), ASK)
    prompts = pipe.preprocess(str(path), instruction=ASK)["prompts"]
    assert len(prompts) == 2 and heard
    for prompt in prompts:
        assert pipe.engine([prompt], with_alignment=True)[0].heard[0] in heard
    *steps, last = page[0](str(path), ASK, True)
    assert last[2] == app.compared(heard, last[0]) and {parts for _, _, parts, *_ in steps} == {None}
    assert app.compared("the cat sat", "a cat sat down") == [
        ("the", "alignment alone"), ("a", "answer alone"), ("cat sat", None), ("down", "answer alone"),
    ]  # fmt: skip


def test_a_model_that_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["demo", "--model", str(tmp_path / "missing")])
    assert f"audiophi demo: {tmp_path}/missing: " in capsys.readouterr().err
