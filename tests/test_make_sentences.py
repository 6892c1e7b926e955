"""The sentences for synthetic speech: every wanted word comes as often as asked for."""

import json
import sys
import types
from collections import Counter

import pytest

import make_sentences as maker

RANKED = ["the", "hen", "of", "turban", "a", "zzyzx", "garden"]


@pytest.fixture
def wordnet(tmp_path):
    folder = tmp_path / "wordnet"
    folder.mkdir()
    for part in ("noun", "verb", "adj", "adv"):
        (folder / f"index.{part}").write_text("  licence\n" + {"noun": "hen n 1\nturban n 1\n"}.get(part, ""))
        gloss = '0001 05 n 01 hen 0 000 | the female of a bird (any); "the hen sat in a garden"; "x y"'
        (folder / f"data.{part}").write_text("  licence | the turban of the hen\n" + gloss + "\n")
    return folder


@pytest.fixture(autouse=True)
def word_ranks(monkeypatch):
    module = types.SimpleNamespace(top_n_list=lambda language, number: RANKED[:number])
    monkeypatch.setitem(sys.modules, "wordfreq", module)


def test_definitions_and_examples_are_sentences(wordnet):
    lemmas, sentences = maker.read_wordnet(wordnet)
    assert lemmas == {"hen", "turban"}
    assert sentences == ["the female of a bird", "the hen sat in a garden"]


def test_every_word_is_there_as_often_as_wanted(wordnet, tmp_path, capsys):
    known = tmp_path / "known.jsonl"
    known.write_text("\n".join(json.dumps({"text": "HEN OF"}) for _ in range(4)))
    out = tmp_path / "out.txt"
    assert maker.main([str(out), "--known", str(known), "--wordnet", str(wordnet), "--words", "7"]) == 0
    counts = Counter(word for line in out.read_text().splitlines() for word in maker.WORD.findall(line.lower()))
    wanted = maker.WANTED[0][1]
    assert counts["turban"] == wanted and counts["hen"] == wanted - 4  # only what the known texts lack
    assert counts["garden"] == counts["the"] == wanted
    assert counts["zzyzx"] == 0  # neither in WordNet nor in any text
    again = tmp_path / "again.txt"
    maker.main([str(again), "--known", str(known), "--wordnet", str(wordnet), "--words", "7"])
    assert again.read_text() == out.read_text()


def test_mistakes_are_named(tmp_path, wordnet, capsys):
    with pytest.raises(SystemExit):
        maker.main([str(tmp_path / "out.txt"), "--wordnet", str(tmp_path / "nowhere")])
    assert "wordnet-base" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(SystemExit):
        maker.main([str(tmp_path / "out.txt"), "--wordnet", str(wordnet), "--known", str(tmp_path / "empty.txt")])
    assert "empty.txt has no texts" in capsys.readouterr().err


def test_a_recipe_gives_the_texts_of_the_sources_that_exist(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "ONE HEN", "speaker": "1"}) + "\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: r\ncomponents: {audio: a, text: b}\nalignment: {merges: null}\n"
        "stages: [{name: align, loss: align, epochs: 1, batch_size: 1}]\n"
        f"data: {{train: [{{path: {tmp_path}/a.jsonl}}, {{path: {tmp_path}/later}}]}}\n"
    )
    assert maker.read_texts(recipe) == ["ONE HEN"]
