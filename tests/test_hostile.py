"""Hostile clips and texts through every entry point: none hangs, none crashes without naming its input, none gives NaN.

Every entry point gets all of them together, as it would in a folder of somebody's data, and one summary that names each
case that failed.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers import pipeline

from audiophi.cli import eval as eval_script
from audiophi.cli.main import main as audiophi
from audiophi.training.recipe import recipe_from_dict
from audiophi.training.stages import run_recipe
from modeling_audiophi import AudioPhiForConditionalGeneration
from processing import AudioError, AudioPhiProcessor
from processing.plain_text import whole_characters
from tests.conftest import message
from tests.hostile import RATE, TEXTS, noise, time_limit, write_clips

PER_CLIP = 10  # seconds: far more than a clip takes, far less than a test run


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def loaded(checkpoint):
    model = AudioPhiForConditionalGeneration.from_pretrained(checkpoint).eval()
    return model, AudioPhiProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def rows(clips, tmp_path_factory):
    """Rows of a manifest: every clip with a good text, every text with a good clip; and for each whether it is
    usable."""
    folder = tmp_path_factory.mktemp("texts")
    listed, usable = [], {}
    for name, clip in clips.items():
        listed.append({"audio": clip.path, "text": "red green", "id": name})
        usable[name] = clip.usable
    for number, (name, (text, has_words)) in enumerate(TEXTS.items()):
        path = folder / f"{number}.wav"
        soundfile.write(path, noise(0.4, seed=number), RATE)
        listed.append({"audio": str(path), "text": text, "id": name})
        usable[name] = has_words
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    return folder / "metadata.jsonl", usable


def names(said: str, path: str) -> bool:
    """Whether a message names a file, as it is or as Python would write it."""
    return path in said or repr(path)[1:-1] in said


def failures_of(cases, run) -> list[str]:
    """`run(case)` for {name: case} → what went wrong, by name; what it returns is a complaint."""
    failed = []
    for name, case in cases.items():
        try:
            with time_limit(PER_CLIP, name):
                complaint = run(case)
        except Exception as error:  # whatever it is, it must not end the other cases
            complaint = f"{type(error).__name__}: {error}"
        if complaint:
            failed.append(f"{name[:60]!r}: {complaint[:300]}")
    return failed


def hear(processor, model, clip) -> str | None:
    """A clip through processor and model; a complaint, or None."""
    try:
        encoded = processor.encode_audio(clip.path)
    except AudioError as error:
        if not names(str(error), clip.path):
            return f"refused without its name: {error}"
        return "refused" if clip.usable else None
    if clip.usable is False:
        return "accepted"
    features = encoded[processor.feature_key]
    if not (torch.isfinite(features).all() and len(features)):
        return "features are not finite, or none"
    with torch.inference_mode():
        hidden = model.get_audio_features(**without_count(processor.pad_audio([encoded]))).pooler_output
    return None if torch.isfinite(hidden).all() else "the model's audio tokens are not finite"


def without_count(inputs):
    return {name: value for name, value in inputs.items() if name != "audio_num_windows"}


def test_processor_and_model_on_clips(clips, loaded):
    model, processor = loaded
    assert failures_of(clips, lambda clip: hear(processor, model, clip)) == []


def test_processor_on_texts(loaded):
    """As a question and as an answer, a text comes back from its ids as it was, and is no control token."""
    _, processor = loaded
    tokenizer = processor.tokenizer
    control = set(tokenizer.all_special_ids) | {processor.audio_token_id}
    clip = noise(0.3)

    def run(case):
        # Half a character cannot come back; U+FDD0 is what marks text, and is dropped.
        text = whole_characters(case[0]).replace("\ufdd0", "")
        chat = [*message([clip], text), {"role": "assistant", "content": f" {text}"}]
        ids = processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"][0].tolist()
        usual = [*message([clip], "a"), {"role": "assistant", "content": " a"}]
        expected = processor.apply_chat_template(usual, tokenize=True, return_dict=True)["input_ids"][0].tolist()
        if [i for i in ids if i in control] != [i for i in expected if i in control]:
            return "control tokens in the text"
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        answer = ids[[at for at, token in enumerate(ids) if token == end][0] :]
        said = tokenizer.decode(answer, clean_up_tokenization_spaces=False)
        return None if said == f"<|im_end|>\n<|im_start|>assistant\n {text}<|im_end|>\n" else f"became {said!r}"

    assert failures_of(TEXTS, run) == []


def test_pipeline_on_clips_and_questions(clips, loaded):
    model, processor = loaded
    pipe = pipeline("audio-text-to-text", model=model, processor=processor, device="cpu")
    good = {"array": noise(0.3), "sampling_rate": RATE}
    rows = [clip.path for clip in clips.values()]
    rows += [{"audio": good, "instruction": text} for text, _ in TEXTS.values()]
    with time_limit(120, "pipeline"):
        results = pipe(rows, batch_size=16, max_new_tokens=3)
    assert len(results) == len(rows)
    heard = dict(zip([*clips, *(f"text: {name}" for name in TEXTS)], results, strict=True))

    def run(name):
        error, clip = heard[name].get("error"), clips.get(name)
        if clip is None:  # too long a question is refused as such
            expected = "context" if TEXTS[name.removeprefix("text: ")][0].strip() else "must be a task or a text"
            return None if error is None or expected in error else error
        if error is None:
            return "accepted" if clip.usable is False else None
        return f"refused: {error}" if clip.usable else None if names(error, clip.path) else f"not named: {error}"

    assert failures_of({name: name for name in heard}, run) == []


def test_command_line(clips, checkpoint, tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    files = [clip.path for clip in clips.values()]
    options = ["--model", checkpoint, "--max_new_tokens", "3", "--batch_size", "16", "--device", "cpu"]
    # In the middle of the list a folder is searched, so the one among the clips is not given.
    files = [file for file in files if not Path(file).is_dir()]
    with time_limit(120, "audiophi"):
        assert audiophi(["transcribe", *files, "--output", str(out), *options]) == 1
    results = {row["file"]: row for row in map(json.loads, out.read_text(encoding="utf-8").split("\n")[:-1])}

    def run(clip):
        row = results[clip.path]
        return None if clip.usable is None or ("text" in row) == clip.usable else str(row)

    assert failures_of({name: clip for name, clip in clips.items() if clip.path in files}, run) == []
    assert all("text" in row or row["error"] for row in results.values())
    capsys.readouterr()


def test_command_line_on_a_name_that_is_not_utf_8(checkpoint, tmp_path, capsys):
    path = tmp_path / b"caf\xe9.wav".decode("utf-8", "surrogateescape")
    soundfile.write(open(path, "wb"), noise(), RATE, format="WAV")
    arguments = ["transcribe", str(path), "--model", checkpoint, "--max_new_tokens", "3", "--device", "cpu"]
    for _ in range(2):  # written, then known
        assert audiophi([*arguments, "--output", str(tmp_path / "out.jsonl")]) == 0
    (line,) = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["file"] == str(path)
    assert audiophi([*arguments, "--format", "json"]) == 0 and "caf\\udce9.wav" in capsys.readouterr().out


def test_eval(rows, checkpoint, tmp_path, capsys):
    manifest, usable = rows
    arguments = ["--model", checkpoint, "--data", str(manifest), "--output_dir", str(tmp_path), "--device", "cpu"]
    with time_limit(200, "eval.py"):
        assert eval_script.main([*arguments, "--max_new_tokens", "3"]) == 0, capsys.readouterr().err
    predictions = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().split("\n")[:-1]]
    by_name = {prediction["id"]: prediction for prediction in predictions}
    assert len(by_name) == len(usable)
    # It is the normaliser that says what words are; for training a text without any is none.
    wrong = {name: by_name[name] for name, good in usable.items() if good and "error" in by_name[name]}
    wrong |= {name: by_name[name] for name in usable if name not in TEXTS and usable[name] is False
              and "error" not in by_name[name]}  # fmt: skip
    assert wrong == {}
    assert all(names(p["error"], name) for name, p in by_name.items() if "error" in p)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    numbers = [value for value in metrics.values() if isinstance(value, float)]
    assert numbers and all(map(math.isfinite, numbers))


@pytest.fixture
def train(rows, tmp_path, tiny_whisper_dir, tiny_llm_dir):
    """train(*stages, **keys) -> (final weights, {id of a bad row: reason}, losses)."""

    def run(*stages, **keys):
        data = {"train": [{"path": str(rows[0])}], "max_bad_rows": 1.0, **keys.pop("data", {})}
        settings = {
            "name": "hostile",
            "components": {"audio": tiny_whisper_dir, "text": tiny_llm_dir},
            "adapter": {"type": "mlp", "stack": 2, "hidden_size": 32},
            "alignment": {"merges": 20},
            "data": data,
            "stages": list(stages),
            "cache_dir": str(tmp_path / "cache"),
            "output_dir": str(tmp_path / "out"),
            "logging_steps": 1,
            "report_to": [],
            **keys,
        }
        with time_limit(200, "training"):
            weights = load_file(run_recipe(recipe_from_dict(settings)) / "model.safetensors")
        lines = (tmp_path / "out" / "bad_rows.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        entries = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
        return (
            weights,
            {row["id"]: row["reason"] for row in map(json.loads, lines)},
            [entry["loss"] for entry in entries if "loss" in entry],
        )

    return run


ALIGN = {"name": "align", "loss": "align", "epochs": 1, "batch_size": 16, "warmup": 0.0}
LM = {**ALIGN, "name": "lm", "loss": "both"}
TOO_LONG = {"ten thousand characters", "one word of ten thousand letters"}


@pytest.mark.parametrize("how", ["cached", "streaming"])
def test_train(rows, train, how):
    _, usable = rows
    keys = {"cached": {}, "streaming": {"data": {"streaming": True}}}[how]
    steps = {} if how == "cached" else {"steps": 6, "epochs": None}
    weights, bad, losses = train(
        {**ALIGN, **steps}, {**LM, **steps}, text_case="keep" if how == "cached" else "lower", **keys
    )
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert losses and all(map(math.isfinite, losses))
    # Kept as it is, any mark is a word; without marks and emoji some texts have none.
    wordless = {"empty", "blank"} if how == "cached" else {name for name in TEXTS if not TEXTS[name][1]}
    expected = {name for name, good in usable.items() if good is False and name not in TEXTS} | wordless | TOO_LONG
    if how == "cached":
        expected |= {"ten thousand emoji"}
    either = {name for name, good in usable.items() if good is None}
    assert set(bad) - either == expected
    assert all(reason for reason in bad.values())
    refused = {name for name in expected if name not in TEXTS}
    assert all(names(bad[name], name) for name in refused)
    assert all("context" in bad[name] for name in TOO_LONG)


def test_lengths_that_a_manifest_makes_up(train, tmp_path):
    path = tmp_path / "good.wav"
    soundfile.write(path, noise(0.5), RATE)
    lengths = [1e18, -3, 0, "abc", "nan", float("nan"), float("inf"), None, "", True, [1], "0.5"]
    rows = [{"audio": str(path), "text": "red", "id": str(n), "duration": value} for n, value in enumerate(lengths)]
    manifest = tmp_path / "lengths.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, bad, losses = train({**LM, "steps": 2, "epochs": None}, data={"train": [{"path": str(manifest)}]})
    assert bad == {} and all(map(math.isfinite, losses))


@pytest.mark.parametrize(
    "content, said",
    [
        (b"\xff\xfe\x00\x01", "data.jsonl"),
        (b"not json\n", "line 1 is not JSON"),
        (b"[1, 2]\n", "item 1 is not a JSON object"),
        (b"", "holds no rows"),
        (b'{"audio": 5, "text": "a"}\n', "row 1 names its audio by 5"),
        (b'{"audio": "a\\ud83d.wav", "text": "a"}\n', "is not UTF-8"),
        (b'{"sound": "a.wav", "text": "a"}\n', "no column looks like audio"),
        (b'{"audio": "http://127.0.0.1:9/a.wav", "text": "a"}\n', "allow_urls: true"),
    ],
)
def test_hostile_manifests_are_named(content, said, checkpoint, tmp_path, capsys):
    manifest = tmp_path / "data.jsonl"
    manifest.write_bytes(content)
    arguments = ["--model", checkpoint, "--data", str(manifest), "--output_dir", str(tmp_path / "out")]
    assert eval_script.main(arguments) == 1
    error = capsys.readouterr().err
    assert said in error and "data.jsonl" in error


ENCODERS = ["wav2vec2", "wav2vec2_layer", "hubert", "wavlm", "w2v_bert", "languagebind", "ast", "clap", "fused_clap"]


@pytest.mark.faults
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_on_clips(encoder, clips, make_tiny_model, request):
    model, processor = make_tiny_model(adapter="mlp", audio=request.getfixturevalue(f"tiny_{encoder}_dir"))
    assert failures_of(clips, lambda clip: hear(processor, model, clip)) == []


@pytest.mark.faults
@pytest.mark.parametrize("readout", ["collapse", "mixed"])
def test_every_readout_on_clips(readout, clips, make_tiny_model):
    model, processor = make_tiny_model(adapter="mlp", readout=readout)
    pipe = pipeline("audio-text-to-text", model=model, processor=processor, device="cpu")
    results = pipe([clip.path for clip in clips.values()], batch_size=16, max_new_tokens=3)
    heard = dict(zip(clips, results, strict=True))
    wrong = {
        name for name, clip in clips.items() if clip.usable is not None and clip.usable == ("error" in heard[name])
    }
    assert wrong == set()


@pytest.fixture(scope="module")
def three_hours(tmp_path_factory):
    """A FLAC of three hours at 8 kHz."""
    path = tmp_path_factory.mktemp("long") / "three_hours.flac"
    with soundfile.SoundFile(path, "w", 8000, 1) as file:
        second = (0.1 * np.sin(2 * np.pi * 300 * np.arange(8000) / 8000)).astype(np.float32)
        for _ in range(3 * 60):
            file.write(np.tile(second, 60))
    return path


@pytest.mark.faults
def test_three_hours_through_every_entry_point(three_hours, checkpoint, loaded, train, tmp_path, capsys):
    model, processor = loaded
    waveform = processor.load_audio(three_hours)
    assert len(waveform) == 3 * 3600 * RATE and np.isfinite(waveform).all()
    pipe = pipeline("audio-text-to-text", model=model, processor=processor, device="cpu")
    result = pipe(str(three_hours), chunk_length_s=2, batch_size=64, max_new_tokens=1, return_timestamps=True)
    assert result["chunks"][-1]["timestamp"][1] == 3 * 3600 and len(result["chunks"]) >= 3 * 1800
    with pytest.raises(ValueError, match="context is 512: shorten the audio"):  # a caption hears all of it at once
        pipe(str(three_hours), instruction="caption", max_new_tokens=1)
    options = ["--model", checkpoint, "--max_new_tokens", "1", "--device", "cpu"]
    assert audiophi(["caption", str(three_hours), *options]) == 1 and "context" in capsys.readouterr().err
    good = tmp_path / "good.wav"
    soundfile.write(good, noise(0.5), RATE)
    manifest = tmp_path / "long.jsonl"
    rows = [{"audio": str(path), "text": "red", "id": Path(path).stem} for path in (three_hours, good)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = ["--data", str(manifest), "--output_dir", str(tmp_path / "eval"), "--batch_size", "2"]
    assert eval_script.main([*options, *out]) == 1 and "context is 512" in capsys.readouterr().err
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["unscored_rows"] == 1 and metrics["utterances"] == 1
    _, bad, losses = train({**LM, "steps": 2, "epochs": None}, data={"train": [{"path": str(manifest)}]})
    assert set(bad) == {"three_hours"} and "context" in bad["three_hours"] and all(map(math.isfinite, losses))
