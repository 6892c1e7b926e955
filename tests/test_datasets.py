"""load_examples and stream_examples on every kind of source, good and bad rows."""

import io
import json
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from audiophi.data.dataset_files import audio_files
from audiophi.data.dataset_streams import stream_examples
from audiophi.data.datasets import load_examples
from audiophi.data.example import RowError
from processing import AudioError, load_audio
from tests.layouts import load, read

ROWS = [("a", "one", "s1"), ("b", "two", "s1"), ("c", "three", "s2"), ("d", "four", "s3")]


def wav(index=0, samples=800):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(samples + index, 0.1), 16_000, format="WAV")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Four clips a.wav … d.wav below audio/, the n-th with 800 + n samples."""
    (tmp_path / "audio").mkdir()
    for index, (name, _, _) in enumerate(ROWS):
        (tmp_path / "audio" / f"{name}.wav").write_bytes(wav(index))
    return tmp_path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def manifest_rows(audio="audio", text="text"):
    return [
        {
            audio: f"audio/{n}.wav",
            text: t,
            "speaker": s,
            "id": n,
            "seconds": 0.05,
            "split": "train" if n < "c" else "test",
        }
        for n, t, s in ROWS
    ]


def check(rows, names="abcd"):
    expected = [row for row in ROWS if row[0] in names]
    assert [(row.id, row.reference, row.speaker) for row in rows] == expected
    assert [row.task for row in rows] == ["transcribe"] * len(expected)
    assert all(row.clips[0].transcript == row.reference for row in rows)
    for row, (name, _, _) in zip(rows, expected, strict=True):
        assert len(read(row)) == 800 + "abcd".index(name)


@pytest.fixture(autouse=True)
def without_torchcodec(monkeypatch):
    """`datasets` wants torchcodec for its Audio type; it is no dependency of this project."""
    for name in ("torchcodec", "torchcodec.encoders", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(datasets.config, "TORCHCODEC_AVAILABLE", False)


@pytest.fixture(params=[False, True], ids=["table", "streaming"])
def streaming(request):
    return request.param


def test_jsonl(folder, streaming):
    spec = write_jsonl(folder / "list.jsonl", manifest_rows())
    rows = load(spec, streaming)
    check(rows)
    assert rows[0].clips[0].seconds == 0.05


@pytest.mark.parametrize("suffix, separator", [("csv", ","), ("tsv", "\t")])
def test_csv_with_settable_columns(folder, streaming, suffix, separator):
    lines = [("clip", "said", "speaker", "id"), *((f"audio/{n}.wav", t, s, n) for n, t, s in ROWS)]
    path = folder / f"list.{suffix}"
    path.write_text("\n".join(separator.join(line) for line in lines))
    check(load(str(path), audio_column="clip", text_column="said", streaming=streaming))


@pytest.mark.parametrize("embedded", [True, False], ids=["bytes", "paths"])
def test_parquet(folder, streaming, embedded):
    rows = {
        "audio": [
            {"bytes": wav(i) if embedded else None, "path": f"audio/{n}.wav"} for i, (n, _, _) in enumerate(ROWS)
        ],
        "transcription": [t for _, t, _ in ROWS],
        "speaker_id": [int(s[1:]) for _, _, s in ROWS],
        "id": [n for n, _, _ in ROWS],
    }
    datasets.Dataset.from_dict(rows).to_parquet(folder / "train.parquet")
    found = load(str(folder / "train.parquet"), streaming)
    assert [row.speaker for row in found] == ["1", "1", "2", "3"] and [row.reference for row in found][3] == "four"
    assert len(read(found[2])) == 802
    assert len(list(load(str(folder), split="train", streaming=streaming))) == 4
    filtered = load({"path": str(folder), "filter": {"speaker_id": 1}, "limit": 1}, streaming=streaming)
    assert [row.id for row in filtered] == ["a"]
    with pytest.raises(ValueError, match="no Parquet file of split 'dev'"):
        load(str(folder), split="dev")


def test_parquet_without_ids_is_named_by_its_paths(folder, streaming):
    rows = {"file_name": ["audio/a.wav", "audio/b.wav"], "text": ["one", "two"], "split": ["x", "y"]}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "list.parquet")
    table = load(str(folder / "list.parquet"), streaming=streaming)
    assert [(row.id, row.speaker) for row in table] == [("audio/a.wav", None), ("audio/b.wav", None)]
    assert len(read(table[1])) == 801
    assert [
        row.reference for row in load(str(folder / "list.parquet"), split="y", streaming=streaming)
    ] == ["two"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_audiofolder_with_metadata(folder, streaming, kind):
    rows = [{"file_name": f"audio/{n}.wav", "transcription": t, "speaker": s, "id": n} for n, t, s in ROWS]
    if kind == "jsonl":
        write_jsonl(folder / "metadata.jsonl", rows)
    else:
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        (folder / "metadata.csv").write_text("\n".join(lines))
    check(load(str(folder), streaming=streaming))


def test_audio_files_in_label_folders(tmp_path, streaming):
    for split in ("train", "test"):
        for label in ("dog_bark", "rain"):
            (tmp_path / split / label).mkdir(parents=True)
            (tmp_path / split / label / "1.wav").write_bytes(wav())
    rows = load(str(tmp_path), streaming, split="test", task="caption")
    assert [(row.id, row.label) for row in rows] == [("test/dog_bark/1.wav", "dog bark"), ("test/rain/1.wav", "rain")]
    assert len(load(str(tmp_path), streaming, task="caption")) == 4
    # A folder's name is no transcript.
    with pytest.raises(ValueError, match="no column looks like text .* Columns: 'audio', 'label', 'id'. Pass text_col"):
        list(load(str(tmp_path), streaming, task="transcribe"))


def test_librispeech_tree(tmp_path, streaming):
    for split, speaker in (("dev-clean", 84), ("test-clean", 61)):
        chapter = tmp_path / "LibriSpeech" / split / str(speaker) / "121"
        chapter.mkdir(parents=True)
        (chapter / f"{speaker}-121.trans.txt").write_text(f"{speaker}-121-0000 GO\n{speaker}-121-0001 STAY HERE\n")
        for number in range(2):
            soundfile.write(chapter / f"{speaker}-121-000{number}.flac", np.zeros(800), 16_000)
    rows = list(load(str(tmp_path / "LibriSpeech"), split="dev-clean", streaming=streaming))
    assert [(row.id, row.reference, row.speaker) for row in rows] == [
        ("84-121-0000", "GO", "84"),
        ("84-121-0001", "STAY HERE", "84"),
    ]
    assert len(read(rows[0])) == 800
    assert len(list(load(str(tmp_path), streaming=streaming))) == 4
    with pytest.raises(ValueError, match="no folder 'dev-other'"):
        list(load(str(tmp_path), split="dev-other", streaming=streaming))


def test_split_filter_exclude_and_limit(folder, streaming):
    spec = write_jsonl(folder / "list.jsonl", manifest_rows())
    check(load(spec, split="test", streaming=streaming), "cd")
    check(load({"path": spec, "filter": {"speaker": ["s1", "s3"]}}, streaming=streaming), "abd")
    check(load({"path": spec, "exclude": {"speaker": "s1"}, "limit": 1}, streaming=streaming), "c")


def test_sources_without_weights_come_one_after_the_other(folder):
    spec = write_jsonl(folder / "list.jsonl", manifest_rows())
    parts = [{"path": spec, "split": "train"}, {"path": spec, "split": "test"}, {"path": spec, "split": "train"}]
    assert [row.id for row in stream_examples(parts)] == list("abcdab")


def test_weights_are_shares_of_a_stream(tmp_path):
    big = write_jsonl(tmp_path / "big.jsonl", [{"audio": "x.wav", "text": "big", "id": str(i)} for i in range(90)])
    small = write_jsonl(tmp_path / "small.jsonl", [{"audio": "y.wav", "text": "small"} for i in range(10)])
    mixture = [{"path": big, "weight": 3}, {"path": small}]
    drawn = [row.reference for row in stream_examples(mixture, seed=1)]
    assert {"big", "small"} == set(drawn) and 0.6 < drawn.count("big") / len(drawn) < 0.9
    assert drawn == [row.reference for row in stream_examples(mixture, seed=1)]
    assert drawn != [row.reference for row in stream_examples(mixture, seed=2)]
    assert drawn.count("big") >= 90 and drawn.count("small") >= 10  # until every one has been read


def test_hub_data_set(monkeypatch, streaming):
    """LibriSpeech's columns, without a network: what `datasets` would return."""
    asked = []

    def hub(name, config, split, streaming):
        asked.append((name, config, split))
        rows = {
            "file": ["84-1.flac"],
            "audio": [{"bytes": wav(), "path": "84-1.flac"}],
            "text": ["GO"],
            "speaker_id": [84],
            "chapter_id": [1],
            "id": ["84-1"],
        }
        table = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(sampling_rate=16_000))
        return table.to_iterable_dataset() if streaming else table

    monkeypatch.setattr(datasets, "load_dataset", hub)
    rows = load("openslr/librispeech_asr:clean:train.100", streaming)
    assert asked == [("openslr/librispeech_asr", "clean", "train.100")]
    assert [(row.id, row.speaker, row.reference) for row in rows] == [("84-1", "84", "GO")]
    assert len(read(rows[0])) == 800
    list(load("openslr/librispeech_asr:other", split="test", streaming=streaming))
    assert asked[1] == ("openslr/librispeech_asr", "other", "test")


def test_hub_data_set_without_a_split_names_the_choices(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: {"train": None, "test": None})
    with pytest.raises(ValueError, match="choose a split, .* of train, test"):
        load("org/name")


@pytest.mark.parametrize("number", ["a0001", "arctic-12", "7"])
def test_the_number_of_a_sentence_is_no_question(tmp_path, number):
    """CMU ARCTIC's prompts have numbers, and a column `prompt` usually asks something."""
    soundfile.write(tmp_path / "a.wav", np.zeros(1600), 16_000)
    rows = [{"audio": "a.wav", "text": "Author of the danger trail.", "prompt": text} for text in (number, "2+2=?")]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_examples({"path": str(tmp_path)})
    with pytest.raises(RowError, match=f"question would be '{number}'.*instruction_column.*(task)"):
        found[0]
    assert found[1].task == "answer"
    assert load_examples({"path": str(tmp_path), "task": "transcribe"})[0].reference == "Author of the danger trail."


def test_bad_rows_cost_themselves(folder, streaming):
    (folder / "audio" / "noise.wav").write_text("no audio")
    rows = [
        {"audio": "audio/a.wav", "text": "one", "id": "good"},
        {"audio": "audio/missing.wav", "text": "one", "id": "missing"},
        {"audio": "audio/noise.wav", "text": "one", "id": "noise"},
        {"audio": "audio/b.wav", "id": "no-text"},
        {"audio": "audio/b.wav", "text": "  ", "id": "blank"},
        {"text": "one", "id": "no-audio"},
        {"audio": "audio/b.wav", "text": float("nan"), "id": "nan"},
        {"audio": "audio/b.wav", "text": ["a", "b"], "id": "list"},
    ]
    found, bad = load(write_jsonl(folder / "list.jsonl", rows), streaming), {}
    for given, row in zip(rows, found, strict=True):
        if isinstance(row, RowError):
            bad[given["id"]] = str(row)
            continue
        try:
            read(row)
        except AudioError as error:
            bad[given["id"]] = str(error)
    assert set(bad) == {row["id"] for row in rows} - {"good"}
    assert "missing.wav" in bad["missing"] and "no-text: has no text" in bad["no-text"]
    assert "no audio" in bad["no-audio"] and "nan: has no text" in bad["nan"] and "no text but list" in bad["list"]


@pytest.mark.parametrize(
    "spec, options, message",
    [
        ({"path": "LIST", "wieght": 2}, {}, "unknown keys wieght"),
        ({"weight": 2}, {}, "no path"),
        ("LIST", {"audio_column": "clip"}, "no column 'clip'. Columns: audio, text"),
        ("LIST", {"text_column": "words"}, "no column 'words'"),
        ("LIST", {"split": "dev"}, "no rows are left after split='dev'"),
        ({"path": "LIST", "filter": {"mood": "glad"}}, {}, "filter on 'mood'"),
        ("BROKEN", {}, "broken.jsonl: line 2 is not JSON"),
        ("NUMBERS", {}, "line 1 is not a JSON object"),
        ("STRANGE", {}, "no column looks like audio .* Columns: foo"),
        ("EMPTY", {}, "holds no audio files"),
        ({"path": "LIST", "task": "trascribe"}, {}, "did you mean 'transcribe'"),
        ("no/such/list.jsonl", {}, "no such file or folder"),
        ("./nowhere", {}, "no such file or folder"),
    ],
)
def test_bad_specifications_are_refused_by_name(folder, spec, options, message):
    (folder / "empty").mkdir()
    (folder / "broken.jsonl").write_text('{"audio": "a"}\n{"audio": \n')
    (folder / "numbers.jsonl").write_text("7\n")
    names = {
        "LIST": write_jsonl(folder / "list.jsonl", manifest_rows()),
        "BROKEN": str(folder / "broken.jsonl"),
        "NUMBERS": str(folder / "numbers.jsonl"),
        "STRANGE": write_jsonl(folder / "strange.jsonl", [{"foo": 1}]),
        "EMPTY": str(folder / "empty"),
    }

    def fill(value):
        if isinstance(value, list):
            return [fill(item) for item in value]
        if isinstance(value, dict):
            return {key: names.get(item, item) if key == "path" else item for key, item in value.items()}
        return names.get(value, value)

    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(fill(spec), **options)


def test_bad_mixtures_are_refused(folder):
    spec = write_jsonl(folder / "list.jsonl", manifest_rows())
    for parts, message in (([], "empty list"), ([{"path": spec, "weight": 0}, {"path": spec}], "above 0")):
        with pytest.raises(ValueError, match=message):
            list(stream_examples(parts))


def test_columns_that_nobody_uses_are_said(folder, caplog):
    rows = [{**row, "translation": "eins"} for row in manifest_rows()]
    load(write_jsonl(folder / "list.jsonl", rows))
    assert "not used: 'translation'" in caplog.text


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_in_the_folder_of_each_split(folder, streaming, kind, monkeypatch):
    """As `datasets` documents it; the folders' names are no transcripts."""
    for split, names in (("train", "ab"), ("test", "cd")):
        (folder / "set" / split).mkdir(parents=True)
        rows = [{"file_name": f"{n}.wav", "transcription": t} for n, t, _ in ROWS if n in names]
        for row in rows:
            index = "abcd".index(row["file_name"][0])
            (folder / "set" / split / row["file_name"]).write_bytes(wav(index))
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        if kind == "csv":
            (folder / "set" / split / "metadata.csv").write_text("\n".join(lines))
        else:
            write_jsonl(folder / "set" / split / "metadata.jsonl", rows)
    monkeypatch.chdir(folder)
    found = list(load("set", streaming))
    assert [(row.reference, len(read(row))) for row in found] == [
        ("three", 802), ("four", 803), ("one", 800), ("two", 801)
    ]  # fmt: skip
    assert [row.reference for row in load(str(folder / "set"), streaming, split="train")] == ["one", "two"]
    with pytest.raises(ValueError, match="no folder 'dev' with metadata"):
        list(load(str(folder / "set"), streaming, split="dev"))


def test_common_voice(folder, streaming):
    """A sentence that begins with a quote is one row, and the audio is in clips/."""
    (folder / "audio").rename(folder / "clips")
    sentences = ['"Yes, he said.', "no", '"Quite" so', '"All of it"']
    lines = [f"s{n}\t{name}.wav\t{said}" for n, (name, said) in enumerate(zip("abcd", sentences, strict=True))]
    (folder / "train.tsv").write_text("\n".join(["client_id\tpath\tsentence", *lines]))
    rows = list(load(str(folder / "train.tsv"), streaming))
    assert [row.reference for row in rows] == ['"Yes, he said.', "no", '"Quite" so', "All of it"]
    assert [len(read(row)) for row in rows] == [800, 801, 802, 803]
    (folder / "train.tsv").write_text('path\tsentence\na.wav\t"He said ""no"""\n')  # as pandas writes it
    assert [row.reference for row in load(str(folder / "train.tsv"), streaming)] == ['He said "no"']


@pytest.mark.parametrize(
    "content, message",
    [
        ('a.wav,"Yes\nb.wav,"No\nc.wav,so\n', "cannot be read behind line 3 .*expected after"),
        ('a.wav,"Yes\nb.wav,he said"\nc.wav,so\n', "a quote swallows the rows before line 3"),
        ('a.wav,"Yes\nb.wav,No\n', "cannot be read behind line 3 .*unexpected end"),
        ("a.wav,yes\nb.wav\n", r"line 3 has 1 values for 2 columns \(audio, text\)"),
        ("a.wav,yes, he said\n", "line 2 has 3 values for 2 columns .* have to be quoted"),
        ("", "holds no rows"),
    ],
)
def test_tables_that_would_be_read_as_something_else_are_refused(tmp_path, content, message):
    path = tmp_path / "list.csv"
    path.write_text("audio,text\n" + content)
    with pytest.raises(ValueError, match=f"list.csv: {message}"):
        load(str(path))


def test_csv_as_it_should_be(folder, streaming):
    """Quoted commas, quotes and lines; a space behind the comma; LJSpeech's | is named."""
    path = folder / "list.csv"
    path.write_text('file_name, text\naudio/a.wav, "one, ""two""\nthree, four"\n\naudio/b.wav,five\n')
    rows = list(load(str(path), streaming))
    assert [row.reference for row in rows] == ['one, "two"\nthree, four', "five"] and len(read(rows[1])) == 801
    path.write_text("LJ001-0001|Printing, in the only sense|Printing, in the only sense\n")
    with pytest.raises(ValueError, match=r"is separated by \|"):
        list(load(str(path), streaming))


def test_librispeech_with_suffixes_in_capitals(tmp_path, streaming):
    (tmp_path / "dev-clean" / "84" / "1").mkdir(parents=True)
    (tmp_path / "dev-clean" / "84" / "1" / "84-1.trans.txt").write_text("84-1-0000 GO\n")
    (tmp_path / "dev-clean" / "84" / "1" / "84-1-0000.FLAC").write_bytes(wav())
    assert [len(read(row)) for row in load(str(tmp_path), streaming)] == [800]


def test_rows_with_other_keys_than_the_first(folder, streaming):
    rows = [
        {"audio": "audio/a.wav", "text": "one"},
        {"file_name": "audio/b.wav", "sentence": "two"},
        {"path": "audio/a.wav", "transcript": "three"},
    ]
    spec = write_jsonl(folder / "list.jsonl", rows)
    found = list(load(spec, streaming))
    assert [(row.reference, len(read(row))) for row in found] == [("one", 800), ("two", 801), ("three", 800)]
    named = list(load(spec, streaming, text_column="text"))
    assert named[0].reference == "one" and "has no text" in str(named[1])


def test_an_unknown_text_column_is_missed_before_anything_is_read(folder, streaming):
    for name in ("sentences", "target", "normalized_transcript"):
        spec = write_jsonl(folder / "list.jsonl", [{"audio": "audio/a.wav", name: "one"}])
        with pytest.raises(ValueError, match=f"no column looks like text .* Columns: 'audio', '{name}'. Pass text_co"):
            list(load(spec, streaming))


@pytest.mark.parametrize("kind", ["large_string", "large_binary", "binary"])
def test_parquet_as_pandas_3_and_polars_write_it(folder, streaming, kind):
    audio = ["audio/a.wav", "audio/b.wav"] if kind == "large_string" else [wav(0), wav(1)]
    table = pa.table(
        {"audio": pa.array(audio, getattr(pa, kind)()), "text": pa.array(["one", "two"], pa.large_string())}
    )
    pq.write_table(table, folder / "list.parquet")
    rows = list(load(str(folder / "list.parquet"), streaming))
    assert [(row.reference, len(read(row))) for row in rows] == [("one", 800), ("two", 801)]


def test_broken_parquet_is_named(tmp_path, streaming):
    pq.write_table(pa.table({"audio": ["a.wav"], "text": ["one"]}), tmp_path / "whole.parquet")
    content = (tmp_path / "whole.parquet").read_bytes()
    for broken in (b"", content[: len(content) // 2], b"no Parquet"):
        (tmp_path / "list.parquet").write_bytes(broken)
        with pytest.raises(ValueError, match="list.parquet: cannot be read as Parquet"):
            list(load(str(tmp_path / "list.parquet"), streaming))
    pq.write_table(pa.table({"audio": ["a.wav"], "text": ["one"]}).slice(1), tmp_path / "list.parquet")
    with pytest.raises(ValueError, match="list.parquet: holds no rows"):
        load(str(tmp_path / "list.parquet"))


def test_paths_of_every_form(folder, streaming, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    (folder / "audio" / "b.wav").rename(folder / "audio" / "b c.wav")
    places = ["~/audio/a.wav", f"file://{folder}/audio/b%20c.wav", "file://~/audio/c.wav", str(folder / "audio/d.wav")]
    spec = write_jsonl(folder / "list.jsonl", [{"audio": place, "text": "one"} for place in places])
    assert [len(read(row)) for row in load(spec, streaming)] == [800, 801, 802, 803]
    assert len(load_audio("~/audio/a.wav")) == 800


def test_hidden_files_are_no_data_and_every_suffix_is(tmp_path):
    suffixes = ["opus", "OGA", "aif", "AIFF", "au", "caf", "w64", "mp2", "weba", "mka", "mov", "3gp", "amr", "wma"]
    names = [f"{letter}.{suffix}" for letter, suffix in zip("abcdefghijklmn", suffixes, strict=True)]
    hidden = ["._a.opus", ".trash/old.wav", "__MACOSX/x.wav", "sub/.hidden/y.wav", "notes.txt"]
    for name in (*names, *hidden):
        (tmp_path / "rec" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "rec" / name).write_bytes(b"x")
    assert [file.name for file in audio_files(tmp_path / "rec")] == names
