"""Clotho in its released layout."""

import pytest

from tests.layouts import CLOTHO_SOUNDS, clotho_captions, load, read, write_clotho


@pytest.fixture
def clotho(tmp_path):
    return write_clotho(tmp_path / "clotho", ("development", "evaluation"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("prefix", ["", "clotho:"])
def test_all_captions_and_the_splits_own_audio(clotho, streaming, prefix):
    rows = list(load(f"{prefix}{clotho}", split="evaluation", streaming=streaming))
    assert [row.id for row in rows] == [f"{name}.wav" for name in CLOTHO_SOUNDS]
    assert [list(row.references) for row in rows] == [clotho_captions(10 + number) for number in range(4)]
    assert [row.reference for row in rows] == [list(row.references)[0] for row in rows]
    assert {row.task for row in rows} == {"caption"} and {row.label for row in rows} == {None}
    for number, row in enumerate(rows):  # the same file names are in development, with other audio
        assert "/evaluation/" in row.clips[0].audio["path"]
        assert len(read(row)) == pytest.approx(16_000 * (1.0 + 0.2 * number), abs=2)


def test_without_a_split_all_are_there_to_filter_by(clotho):
    assert len(load(str(clotho))) == 8
    rows = load({"path": str(clotho), "filter": {"split": "development"}})
    assert [list(row.references)[0] for row in rows] == [clotho_captions(number)[0] for number in range(4)]


def test_a_csv_alone_with_audio_elsewhere_under_changed_names(clotho, tmp_path):
    elsewhere = tmp_path / "flat"
    elsewhere.mkdir()
    for file in (clotho / "evaluation").iterdir():
        file.rename(elsewhere / file.name.replace(" ", "_"))
    table = clotho / "clotho_captions_evaluation.csv"
    rows = load({"path": str(table), "audio_folder": str(elsewhere)})
    assert len(rows) == 4 and [len(read(row)) > 0 for row in rows] == [True] * 4
    with pytest.raises(FileNotFoundError, match="audio_folder .*nowhere is no folder"):
        load({"path": str(table), "audio_folder": str(tmp_path / "nowhere")})


def test_a_copy_that_is_not_utf8(clotho):
    table = clotho / "clotho_captions_evaluation.csv"
    lines = table.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].rstrip() + b',"\xb3\xaa, \xb5\xa5"\r\n'  # a translation in a code page
    table.write_bytes(b"".join(lines))
    rows = load(str(clotho), split="evaluation")
    assert [list(row.references) for row in rows] == [clotho_captions(10 + number) for number in range(4)]


def test_what_is_not_there_is_named(clotho, tmp_path):
    with pytest.raises(ValueError, match="no clotho_captions_validation.csv; splits here: development, evaluation"):
        load(str(clotho), split="validation")
    with pytest.raises(ValueError, match="has not the files of clotho"):
        load(f"clotho:{clotho}/evaluation")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(f"clotho:{tmp_path}/nowhere")
    with pytest.raises(ValueError, match="no column looks like text"):
        load(str(clotho), task="transcribe")


def test_metadata_comes_first_unless_the_kind_is_named(clotho):
    (clotho / "metadata.jsonl").write_text('{"audio": "evaluation/03 Whales Slowing Down.wav", "text": "WHALES"}\n')
    rows = load(str(clotho))
    assert [(row.reference, row.task) for row in rows] == [("WHALES", "transcribe")]
    assert len(load(f"clotho:{clotho}")) == 8
