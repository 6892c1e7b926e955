"""`pipeline("audio-text-to-text")`: every form of input, batches, pieces, streaming, errors that cost one row."""

import base64
import copy
import io
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile as sf
import torch
from transformers import GenerationConfig, TextIteratorStreamer, pipeline
from transformers.dynamic_module_utils import get_imports, get_relative_import_files
from transformers.pipelines.pt_utils import KeyDataset

from modeling_audiophi import AudioTextToTextPipeline, pipeline_rows_audiophi
from modeling_audiophi.chunks_audiophi import split_at_pauses
from modeling_audiophi.pipeline_rows_audiophi import is_one_input
from tests.conftest import PROCESSOR_TASKS

RATE = 16_000
SHORT = {"max_new_tokens": 5}
TRANSCRIBE, OTHER = PROCESSOR_TASKS["transcribe"]["instructions"]
CAPTION = PROCESSOR_TASKS["caption"]["instructions"][0]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def parts(make_tiny_model):
    """A model whose alignment head and beams take part in transcripts, and its processor."""
    model, processor = make_tiny_model(readout="collapse")
    model.generation_config.update(suppress_tokens=None)
    decoding = {"num_beams": 2, "length_penalty": 0.0, "ctc_weight": 0.5, "no_repeat_ngram_size": 4}
    model.generation_config.tasks["transcribe"] = decoding
    return model, processor


@pytest.fixture(scope="module")
def pipe(parts):
    model, processor = parts
    return pipeline("audio-text-to-text", model=model, processor=processor, device="cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory, waveform):
    """Four clips of 0.4 to 1 s, the second no audio at all."""
    folder = tmp_path_factory.mktemp("clips")
    paths = [folder / f"clip{index}.wav" for index in range(4)]
    for index, path in enumerate(paths):
        sf.write(path, waveform(0.4 + 0.2 * index, seed=index), RATE, subtype="FLOAT")
    paths[1].write_text("this is not audio")
    return [str(path) for path in paths]


def chat(*clips, text="Transcribe the speech."):
    return [
        {"role": "user", "content": [*({"type": "audio", "path": c} for c in clips), {"type": "text", "text": text}]}
    ]


def spy_on_generate(monkeypatch, pipe):
    """The generation configs and input shapes of all calls."""
    seen, generate = [], pipe.model.generate

    def spied(**kwargs):
        seen.append((kwargs["generation_config"], kwargs))
        return generate(**kwargs)

    monkeypatch.setattr(pipe.model, "generate", spied)
    return seen


def test_every_form_of_a_clip_gives_the_same_words(pipe, files):
    data = Path(files[0]).read_bytes()
    array, _ = sf.read(io.BytesIO(data), dtype="float32")
    expected = pipe(files[0], **SHORT)
    assert isinstance(pipe, AudioTextToTextPipeline) and set(expected) == {"generated_text"}
    assert expected["generated_text"]
    forms = [
        *(Path(files[0]), f"file://{files[0]}", data, (array, RATE), {"bytes": data, "path": None}),
        *({key: array, "sampling_rate": RATE} for key in ("array", "raw", "audio")),
        *({"audio": files[0]}, {"audio": [files[0]]}, chat(files[0])),
    ]
    assert all(is_one_input(form) for form in forms)
    assert pipe(forms, batch_size=4, **SHORT) == [expected] * len(forms)
    assert pipe(array, sampling_rate=RATE, **SHORT) == pipe(audio=files[0], text=TRANSCRIBE, **SHORT)
    assert pipe(text=chat(files[0]), **SHORT) == expected


def test_batches_give_what_single_inputs_give_and_a_bad_file_costs_its_row(pipe, files):
    rows = [files[0], {"audio": files[2], "instruction": "caption"}, files[1], chat(files[2], files[3], text="Same?"),
            {"audio": [files[0], files[3]]}, files[3]]  # fmt: skip
    rows.append([{"role": "user", "content": "Who are you?"}])
    alone = [pipe(row, **SHORT) for index, row in enumerate(rows) if index != 2]
    for batch_size in (1, 3):
        results = pipe(rows, batch_size=batch_size, **SHORT)
        assert results[2]["generated_text"] is None and files[1] in results[2]["error"]
        assert results[:2] + results[3:] == alone
    assert len({result["generated_text"] for result in alone}) > 3
    with pytest.raises(ValueError, match="clip1.wav"):
        pipe(files[1])
    with pytest.raises(ValueError, match="rate"):
        pipe(np.zeros(RATE, dtype=np.float32))


def test_data_sets_and_generators_stream(pipe, files):
    taken = []

    def generator():
        for file in files:
            taken.append(file)
            yield file

    expected = pipe(files, **SHORT)
    results = iter(pipe(generator(), batch_size=2, **SHORT))
    assert next(results) == expected[0] and len(taken) == 2
    assert list(results) == expected[1:]
    # The reference text of a data set must not become the instruction; a broken file must not break the data set.
    rows = datasets.Dataset.from_dict({"audio": files, "text": ["the reference"] * 4})
    rows = rows.cast_column("audio", datasets.Audio(sampling_rate=RATE))
    for source in (rows, KeyDataset(rows, "audio"), rows.to_iterable_dataset()):
        results = pipe(source, batch_size=3, **SHORT)
        assert list(results) == expected
    assert len(pipe(rows, **SHORT)) == 4 and pipe([], **SHORT) == []


def test_a_prompt_beyond_the_context_costs_its_row_only(make_tiny_model, files, waveform):
    model, processor = make_tiny_model(readout="frames")
    small = pipeline("audio-text-to-text", model=model, processor=processor, device="cpu", **SHORT)
    long = {"array": waveform(50), "sampling_rate": RATE}
    results = small([files[0], long, files[3]], batch_size=3, chunk_length_s=0)
    assert "context" in results[1]["error"] and results[0] == small(files[0]) and results[2] == small(files[3])
    with pytest.raises(ValueError, match="context"):
        small(long, chunk_length_s=0)


def test_the_files_that_ship_import_only_each_other():
    file = ROOT / "modeling_audiophi" / "pipeline_audiophi.py"
    shipped = [Path(name) for name in get_relative_import_files(str(file))]
    assert {"chunks_audiophi.py", "engine_audiophi.py", "pipeline_rows_audiophi.py"} <= {path.name for path in shipped}
    for path in (file, *shipped):
        assert path.parent == file.parent and "processing" not in get_imports(str(path))


def test_tasks_ask_their_wording_and_bring_their_own_decoding(pipe, files, monkeypatch):
    seen = spy_on_generate(monkeypatch, pipe)

    def asked(inputs, **kwargs):
        seen.clear()
        pipe(inputs, max_new_tokens=2, **kwargs)
        text = pipe.tokenizer.decode(seen[0][1]["input_ids"][0], skip_special_tokens=True)
        config = seen[0][0]
        decoding = (config.ctc_weight, config.no_repeat_ngram_size or 0, config.num_beams or 1)
        return text.removeprefix("user\n").split("\nassistant")[0], decoding

    transcript, plain = (0.5, 4, 2), (0.0, 0, 1)
    assert asked(files[0]) == asked(files[0], task="transcribe") == (TRANSCRIBE, transcript)
    assert asked(files[0], instruction="transcribe", ctc_weight=0.25) == (TRANSCRIBE, (0.25, 4, 2))
    assert asked(files[0], instruction=OTHER) == (OTHER, transcript)
    assert asked(files[0], instruction="transcribe THE speech") == ("transcribe THE speech", transcript)
    assert asked(files[0], instruction="caption") == asked(files[0], task="caption") == (CAPTION, plain)
    assert asked(files[0], instruction="How many?") == ("How many?", plain)
    assert asked(files[0], instruction="Schreib auf!", task="transcribe") == ("Schreib auf!", transcript)
    assert asked(files[0], instruction="caption", task="transcribe") == (CAPTION, transcript)
    assert asked({"audio": files[0], "text": "the reference"}) == (TRANSCRIBE, transcript)
    assert asked({"audio": files[0], "task": "caption"}, task="transcribe") == (CAPTION, plain)
    assert asked({"audio": files[0], "task": "transcribe", "instruction": "Was?"}) == ("Was?", transcript)
    assert asked({"instruction": "Who are you?"}) == ("Who are you?", plain)
    assert asked(chat(files[0]))[1] == asked(chat(files[0], files[2]))[1] == transcript
    first = [*chat(files[0]), {"role": "assistant", "content": "words"}]
    assert asked([*first, *chat(files[2])])[1] == transcript
    assert asked([*first, {"role": "user", "content": TRANSCRIBE}])[1] == plain  # of what?
    assert asked([*first, {"role": "user", "content": "Why?"}], task="transcribe")[1] == transcript
    assert asked(chat(files[0], text="Why?"), task="caption")[1] == plain


def test_what_is_no_rows_fault(pipe, files):
    for wrong, message in (
        ({"task": "translate"}, "unknown task 'translate'; this model knows: transcribe, caption"),
        ({"instruction": " "}, "instruction must be"),
        ({"instruction": 3}, "instruction must be"),
        ({"chunk_length_s": "30"}, "chunk_length_s='30'"),
        ({"chunk_length_s": 0.1}, "chunk_length_s"),
        ({"return_timestamps": "words"}, "return_timestamps='words'"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(files, **wrong)
    result = pipe([files[0], {"audio": files[0], "task": "translate"}], **SHORT)
    assert result[0]["generated_text"] and "unknown task" in result[1]["error"]


def test_a_model_without_tasks_wants_an_instruction(parts, files):
    model, processor = parts
    processor = copy.copy(processor)
    processor.tasks = {}
    bare = pipeline("audio-text-to-text", model=model, processor=processor, device="cpu", **SHORT)
    with pytest.raises(ValueError, match="give an instruction"):
        bare(files[0])
    assert bare(files[0], instruction="What?")["generated_text"] is not None


def test_malformed_rows_cost_only_themselves(pipe, files):
    def user(content):
        return [{"role": "user", "content": content}]

    rows = [
        files[0], user(None), user([{"audio": files[0]}]), user([{"type": "text", "content": "hi"}]), user(["hi"]),
        {"array": torch.zeros(16_000).bfloat16(), "sampling_rate": RATE}, None, 5, {"audio": None}, {},
        {"audio": files[0], "instruction": 5}, {"audio": np.zeros(RATE), "sampling_rate": "x"}, [{"role": "user"}],
        user([{"type": "audio"}]), user([{"type": "audoi", "path": files[0]}]), chat(files[0]),
    ]  # fmt: skip
    results = pipe(rows, batch_size=4, **SHORT)
    assert results[0] == results[-1] == pipe(files[0], **SHORT)
    assert results[5] == pipe((RATE, np.zeros(RATE, np.float32)), **SHORT), "bfloat16 is only unusual"
    for row, result in zip(rows[1:5] + rows[6:-1], results[1:5] + results[6:-1], strict=True):
        assert result["generated_text"] is None and len(result["error"]) > 10, row


def test_open_files_columns_and_openais_audio(pipe, files):
    data = Path(files[0]).read_bytes()
    expected = pipe(files[0], **SHORT)
    with open(files[0], "rb") as file:
        assert pipe(file, **SHORT) == expected
    assert pipe(io.BytesIO(data), **SHORT) == expected
    array, _ = sf.read(files[0], dtype="float32")
    assert pipe((RATE, array), **SHORT) == expected
    text, encoded = {"type": "text", "text": TRANSCRIBE}, base64.b64encode(data).decode()
    for item in ({"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}},
                 {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{encoded}"}}):  # fmt: skip
        assert pipe([{"role": "user", "content": [item, text]}], **SHORT) == expected
    rows = datasets.Dataset.from_dict({"audio": files}).cast_column("audio", datasets.Audio(sampling_rate=RATE))
    every = pipe(files, **SHORT)
    assert list(pipe(rows["audio"], **SHORT)) == every
    assert list(pipe(rows.to_iterable_dataset()["audio"], **SHORT)) == every
    with pytest.raises(ValueError, match=r"turn 1 .*type 'speech' is not understood"):
        pipe([{"role": "user", "content": [{"type": "speech", "path": files[0]}]}])


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_rows_are_read_by_other_processes(pipe, files, monkeypatch, start):
    """Also where processes begin empty, as on macOS and Windows: what they get must be picklable."""
    expected, loader, workers = pipe(files, **SHORT), pipeline_rows_audiophi.DataLoader, []

    def started(*args, **kw):
        workers.append(kw["num_workers"])
        return loader(*args, **kw, multiprocessing_context=start)

    monkeypatch.setattr(pipeline_rows_audiophi, "DataLoader", started)
    assert pipe(files, num_workers=1, batch_size=2, **SHORT) == expected and workers == [1]


def test_generation_arguments(pipe, parts, files, monkeypatch):
    seen = spy_on_generate(monkeypatch, pipe)
    pipe(files[0], max_new_tokens=3, generate_kwargs={"num_beams": 1, "length_penalty": 1.0, "min_new_tokens": 3})
    config = seen[-1][0]
    assert (config.max_new_tokens, config.num_beams, config.min_new_tokens) == (3, 1, 3) and config.ctc_weight == 0.5
    assert parts[1].end_token_id in config.eos_token_id and parts[0].generation_config.max_new_tokens is None
    pipe(files[0], generation_config=GenerationConfig(max_new_tokens=2))
    assert seen[-1][0].max_new_tokens == 2 and seen[-1][0].num_beams == 2  # what it leaves open is the task's
    pipe(files[0], generation_config=GenerationConfig(num_beams=1, max_new_tokens=2))
    assert seen[-1][0].num_beams == 1
    several = pipe(files[0], num_beams=3, num_return_sequences=3, **SHORT)
    assert len(several["alternatives"]) == 3 and several["alternatives"][0] == several["generated_text"]
    with pytest.raises(TypeError, match="max_new_token"):
        pipe(files, max_new_token=3)
    with pytest.raises(ValueError, match="ctc_weight"):  # not a row's fault
        pipe(files, ctc_weight=2.0)
    with pytest.raises(ValueError, match="only one"):
        pipe(files[0], text="What?", instruction="caption")
    with pytest.raises(ValueError, match="once"):
        pipe(files[0], audio=files[0])


def test_a_last_turn_of_the_assistant_is_continued(pipe, files, monkeypatch):
    seen = spy_on_generate(monkeypatch, pipe)
    turns = [*chat(files[0]), {"role": "assistant", "content": [{"type": "text", "text": "The quick"}]}]
    assert pipe(turns, **SHORT) == pipe([turns, files[2]], batch_size=2, **SHORT)[0]
    assert pipe.tokenizer.decode(seen[0][1]["input_ids"][0]).endswith("assistant\nThe quick")
    with pytest.raises(ValueError, match="role"):
        pipe([*chat(files[0]), {"content": "no role"}])


def test_cuts_are_at_pauses():
    speech = np.random.default_rng(0).normal(size=5 * RATE).astype(np.float32)
    for second in (1.5, 2.8, 4.0):
        speech[int((second - 0.15) * RATE) : int((second + 0.15) * RATE)] = 0
    pieces = split_at_pauses(speech, RATE, 2.0)
    assert [start for start, _ in pieces] == [0, *(end for _, end in pieces[:-1])] and pieces[-1][1] == len(speech)
    assert [end / RATE for _, end in pieces[:-1]] == pytest.approx([1.5, 2.8, 4.0], abs=0.1)
    assert split_at_pauses(speech, RATE, 5.0) == [(0, len(speech))]
    for total in (2.01, 2.6, 7.9, 61.0):
        for signal in (np.zeros(int(total * RATE), np.float32), np.resize(speech, int(total * RATE))):
            lengths = [end - start for start, end in split_at_pauses(signal, RATE, 2.0)]
            assert sum(lengths) == len(signal) and min(lengths) >= RATE // 2 - 1 and max(lengths) <= 2 * RATE


def test_recordings_longer_than_the_window_are_transcribed_in_pieces(pipe, waveform, tmp_path):
    """The tiny Whisper's window is 2 s."""
    long = waveform(5.0, seed=5)
    result = pipe((long, RATE), return_timestamps=True, **SHORT)
    pieces = [(int(a * RATE), int(b * RATE)) for a, b in (chunk["timestamp"] for chunk in result["chunks"])]
    assert len(pieces) > 2 and pieces[0][0] == 0 and pieces[-1][1] == len(long)
    texts = [pipe((long[a:b], RATE), **SHORT)["generated_text"] for a, b in pieces]
    assert [chunk["text"] for chunk in result["chunks"]] == texts and len(set(texts)) > 1
    assert result["generated_text"] == " ".join(filter(None, texts))
    both = pipe([(long, RATE), (long[:RATE], RATE)], batch_size=4, return_timestamps=True, **SHORT)
    assert both[0] == result and both[1]["chunks"][0]["timestamp"] == (0.0, 1.0)
    whole = pipe((long, RATE), chunk_length_s=0, return_timestamps=True, **SHORT)
    assert [chunk["timestamp"] for chunk in whole["chunks"]] == [(0.0, 5.0)] and whole["chunks"][0]["text"]
    assert "chunks" not in pipe((long, RATE), instruction="caption", return_timestamps=True, **SHORT)
    asked = pipe((long, RATE), instruction="transcribe the speech", return_timestamps=True, **SHORT)
    assert len(asked["chunks"]) == len(pieces)
    same = pipe((long, RATE), instruction=TRANSCRIBE, task="caption", return_timestamps=True, **SHORT)
    assert "chunks" not in same


@pytest.mark.parametrize("seconds", [1.0, 5.0])
def test_streaming_gives_the_same_words(pipe, waveform, seconds):
    """Also over several pieces, of which the reader notices nothing."""
    streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    clip, results = (waveform(seconds, seed=3), RATE), []
    thread = threading.Thread(target=lambda: results.append(pipe(clip, streamer=streamer, **SHORT)))
    thread.start()
    streamed = list(streamer)
    thread.join()
    assert results[0] == pipe(clip, num_beams=1, length_penalty=1.0, **SHORT)
    assert "".join(streamed).split() == results[0]["generated_text"].split() and len(streamed) > 1


def test_a_streamer_always_ends(pipe, files):
    streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True, timeout=60)
    with pytest.raises(ValueError, match="clip1.wav"):
        pipe(files[1], streamer=streamer)
    assert list(streamer) == [""]
    for clips, wrong, message in ((files, {}, "one input"), (files[0], {"task": "sing"}, "sing")):
        streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True, timeout=60)
        with pytest.raises(ValueError, match=message):
            pipe(clips, streamer=streamer, **wrong)
        assert list(streamer) == [""]


def test_any_to_any_works_too(parts, files):
    model, processor = parts
    theirs = pipeline("any-to-any", model=model, processor=processor, device="cpu")
    theirs.model.generation_config.eos_token_id = processor.end_token_id
    result = theirs(text=chat(files[0]), return_full_text=False, **SHORT)
    ours = pipeline("audio-text-to-text", model=model, processor=processor, device="cpu")
    assert result[0]["generated_text"].strip() == ours(files[0], **SHORT)["generated_text"]


def test_the_pipeline_for_recognisers_names_the_right_one(checkpoint):
    with pytest.raises(LookupError) as error:
        pipeline("automatic-speech-recognition", model=checkpoint)
    assert checkpoint in str(error.value) and 'pipeline("audio-text-to-text")' in str(error.value)


def test_a_saved_pipeline_loads_without_remote_code(pipe, parts, files, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = pipeline("audio-text-to-text", model=str(tmp_path), device="cpu", **SHORT)
    assert type(loaded) is AudioTextToTextPipeline and loaded(files[0]) == pipe(files[0], **SHORT)
    assert (tmp_path / "processor_config.json").is_file()
    config = (tmp_path / "config.json").read_text()
    assert '"impl": "pipeline_audiophi.AudioTextToTextPipeline"' in config and "AutoModelForMultimodalLM" in config


@pytest.mark.slow
def test_the_checkpoint_hears_real_speech():
    clips = sorted(ROOT.parent.glob("shared/data/librispeech_devclean_12spk/dev-clean/84/121550/*.mp3"))
    if not clips:
        pytest.skip("no LibriSpeech beside the repository")
    from audiophi.evaluation.metrics import count_errors, word_error_rate

    said = dict(line.split(" ", 1) for line in next(clips[0].parent.glob("*.trans.txt")).read_text().splitlines())
    pipe = pipeline("audio-text-to-text", model=str(ROOT / "checkpoints" / "audiophi-tiny"), max_new_tokens=160)
    with torch.inference_mode():
        heard = pipe([str(clip) for clip in clips[:3]], batch_size=3)
    counts = [count_errors(said[clip.stem], row["generated_text"]) for clip, row in zip(clips, heard, strict=False)]
    assert word_error_rate(counts) < 45
