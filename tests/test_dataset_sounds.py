"""Sounds with class labels: ESC-50's and UrbanSound8K's layouts, manifests, Parquet; and the captions made of them."""

import json

import datasets
import pytest

from audiophi.evaluation.caption_metrics import names_class
from audiophi.tasks.caption_templates import PHRASES, class_captions, class_name
from tests.layouts import load, read, tone, write_csv

ESC50 = list(PHRASES)[:50]
ESC10 = (
    *("dog bark", "rain", "sea waves", "baby cry", "clock tick"),
    *("person sneeze", "helicopter", "chainsaw", "rooster", "fire crackling"),
)
URBANSOUND8K = (
    *("air conditioner", "car horn", "children playing", "dog bark", "drilling"),
    *("engine idling", "gun shot", "jackhammer", "siren", "street music"),
)
INSTRUMENTS = list(PHRASES)[-10:]


@pytest.fixture
def esc50(tmp_path):
    root = tmp_path / "ESC-50-master"
    rows = []
    for number, (category, esc10) in enumerate((("dog", True), ("chirping_birds", False), ("sea_waves", True))):
        name = f"{number + 1}-1000-A-{number}.wav"
        tone(root / "audio" / name, number, rate=44_100)
        rows.append({"filename": name, "fold": number + 1, "target": number, "category": category, "esc10": esc10})
    write_csv(root / "meta" / "esc50.csv", rows)
    return root


@pytest.mark.parametrize("streaming", [False, True])
def test_esc50(esc50, streaming):
    rows = list(load(str(esc50), streaming=streaming))
    assert [row.label for row in rows] == ["dog", "chirping birds", "sea waves"]
    assert list(rows[2].references) == class_captions("sea_waves") and rows[2].reference == "Sea waves."
    assert {row.task for row in rows} == {"caption"} and len(read(rows[0])) == 12_800
    assert [row.id for row in load({"path": str(esc50), "filter": {"fold": [2]}})] == [
        "2-1000-A-1.wav"
    ]
    assert len(load({"path": str(esc50), "filter": {"esc10": ["True"]}})) == 2
    with pytest.raises(ValueError, match="folds instead of splits"):
        list(load(str(esc50), split="train", streaming=streaming))


def test_urbansound8k(tmp_path):
    rows = []
    for fold in (1, 10):
        name = f"100-{fold}-0-0.wav"
        tone(tmp_path / "audio" / f"fold{fold}" / name, fold)
        rows.append({"slice_file_name": name, "fsID": 100, "fold": fold, "classID": 2, "class": "children_playing"})
    write_csv(tmp_path / "metadata" / "UrbanSound8K.csv", rows)
    rows = load(str(tmp_path))
    assert [row.label for row in rows] == ["children playing"] * 2
    assert all(len(read(row)) == 12_800 for row in rows)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "parquet, class ids"])
@pytest.mark.parametrize("streaming", [False, True])
def test_any_data_with_a_label_column(tmp_path, kind, streaming):
    tone(tmp_path / "a.wav", 1)
    data = {"audio": ["a.wav"], "text": ["dog bark"], "kind": ["dog_bark"], "id": ["one"], "mood": ["glad"]}
    if kind == "jsonl":
        spec = tmp_path / "metadata.jsonl"
        spec.write_text(json.dumps({name: values[0] for name, values in data.items()}) + "\n")
    else:
        spec = tmp_path / "list.parquet"
        table = datasets.Dataset.from_dict(data)
        if "ids" in kind:
            table = table.class_encode_column("kind")
        table.to_parquet(spec)
    (row,) = load(str(spec), label_column="kind", task="caption", streaming=streaming)
    assert row.label == "dog bark" and list(row.references) == class_captions("dog bark")  # the text only repeats it
    assert row.task == "caption" and len(read(row)) == 12_800 and row.id == "one"
    (row,) = load(str(spec), label_column="mood", task="caption", streaming=streaming)
    assert row.label == "glad" and list(row.references) == ["dog bark"]  # a text of its own is a caption
    with pytest.raises(ValueError, match="no column 'klass'"):
        list(load(str(spec), label_column="klass", task="caption", streaming=streaming))


def test_given_captions_come_first(tmp_path):
    row = {"audio": "a.wav", "text": "x", "label": "rain", "captions": ["It rains.", " ", "Rain  falls."]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = load(str(tmp_path), task="caption")
    assert list(found.references) == ["It rains.", "Rain falls."] and found.reference == "It rains."


def test_a_question_and_silence_of_a_source(esc50):
    rows = load({"path": str(esc50), "instruction": "What is that?", "task": "caption", "speech": False})
    assert [row.task for row in rows] == ["caption"] * 3
    assert {row.messages[0]["content"][1]["text"] for row in rows} == {"What is that?"}
    assert {row.clips[0].transcript for row in rows} == {""}  # nobody speaks
    assert {row.clips[0].transcript for row in load(str(esc50))} == {None}  # that is not known
    with pytest.raises(ValueError, match="audio_folder is for clotho"):
        load({"path": str(esc50 / "audio"), "audio_folder": "x", "task": "caption"})


@pytest.mark.parametrize("classes", [ESC50, ESC10, URBANSOUND8K, INSTRUMENTS, {*ESC10, *URBANSOUND8K, *INSTRUMENTS}])
def test_captions_name_their_class_and_no_other_of_the_set(classes):
    for label in classes:
        captions = class_captions(label)
        assert len(set(captions)) == len(captions) >= 7
        for caption in captions:
            assert names_class(caption, label, list(classes)), (label, caption)
            assert all(word in caption.lower() for word in label.split()), (label, caption)
            assert caption[0].isupper() and caption.endswith(".")


def test_classes_of_other_sets_get_captions_too():
    assert class_name("Marimba_and-xylophone") == "marimba and xylophone"
    captions = class_captions("Tap_dance")
    assert "The sound of tap dance." in captions and all("tap dance" in caption.lower() for caption in captions)
