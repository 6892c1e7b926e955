"""Answers to a row's own question: the rules by which they are right, and eval.py on a JSONL of questions."""

import json

import numpy as np
import pytest
import soundfile as sf

from audiophi.cli import eval as eval_script
from audiophi.data.example import AUDIO, Clip, Example, RowError
from audiophi.evaluation import answers, conditions
from audiophi.evaluation.answer_metrics import METRICS, PackageMissing, bleu
from audiophi.tasks import TASKS

TASK = TASKS["answer"]
KEYS = {
    "accuracy", "accuracy_ci95", "accuracy_by_kind", "accuracy_shuffled_audio", "accuracy_silence", "accuracy_text",
    "delta_text", "listening_gap", "unparsed", "never_stopped", "rows", "scores_by_kind", "rtf",
}  # fmt: skip


@pytest.mark.parametrize(
    "metric, answer, right, choices, score, parsed",
    [
        ("choice", "It is a dog.", ["dog"], ["dog", "cat"], 1, True),
        ("choice", "cat", ["dog"], ["dog", "cat"], 0, True),
        ("choice", "a dog or a cat", ["dog"], ["dog", "cat"], 0, False),  # names two
        ("choice", "a horse", ["dog"], ["dog", "cat"], 0, False),
        ("choice", "", ["dog"], ["dog", "cat"], 0, False),
        ("choice", "the engine idling", ["engine idling"], ["engine", "engine idling"], 1, True),  # the longest
        ("choice", "an engine", ["engine"], ["engine", "engine idling"], 1, True),
        ("choice", "man, no: woman", ["woman"], ["man", "woman"], 0, False),
        ("choice", "woman", ["man"], ["man", "woman"], 0, True),  # no part of a word
        ("choice", "B", ["(B) a man"], ["(A) a woman", "(B) a man"], 1, True),
        ("choice", "(b) a man", ["B"], ["(A) a woman", "(B) a man"], 1, True),
        ("choice", "a man", ["(B) a man"], ["(A) a woman", "(B) a man"], 1, True),
        ("exact", "The  BUS!", ["the bus", "bus"], [], 1, True),
        ("exact", "the bus stop", ["the bus"], [], 0, True),
        ("verbatim", "The Bus", ["the bus"], [], 0, True),
        ("verbatim", '{"a": 1}\nB', ['{"a": 1}\nB'], [], 1, True),
        ("written", "HELLO OLD WORD", ["HELLO OLD WORLD", "HI"], [], pytest.approx(2 / 3), True),
        ("written", "hello old world", ["HELLO OLD WORLD"], [], 0, True),
        ("written", "hello old world", ["hello, old, world"], [], pytest.approx(1 / 3), True),
        ("written", "so many words for one", ["One"], [], 0, True),
        ("written", "", ["a"], [], 0, True),
        ("number", "There are three of them.", ["3"], [], 1, True),
        ("number", "1,200", ["1200"], [], 1, True),
        ("number", "-2.50 degrees", ["-2.5"], [], 1, True),
        ("number", "3 or 4", ["3"], [], 0, False),
        ("number", "many", ["3"], [], 0, False),
        ("yes_no", "Yes, he does.", ["yes"], [], 1, True),
        ("yes_no", "yes and no", ["yes"], [], 0, False),
        ("yes_no", "nobody knows", ["no"], [], 0, False),
        ("contains", "I hear an old dog, barking", ["Old dog"], [], 1, True),
        ("contains", "a bold dog", ["old dog"], [], 0, True),
        ("f1", "a b", ["a b c d"], [], pytest.approx(2 / 3), True),
        ("f1", "x", ["a", "x"], [], 1, True),
    ],
)
def test_rules(metric, answer, right, choices, score, parsed):
    assert METRICS[metric](answer, right, choices) == (score, parsed)


def row(number=0, **values):
    messages = ({"role": "user", "content": [AUDIO, {"type": "text", "text": "What?"}]},)
    return Example("answer", number, f"row-{number}", "x", **{"messages": messages, "references": ("a",), **values})


def test_a_row_says_how_it_is_scored(monkeypatch):
    assert answers.fields(row(), "A.")["metric"] == "exact" and answers.fields(row(), "A.")["correct"] == 1
    assert answers.fields(row(choices=("a", "b")), "b")["metric"] == "choice"
    assert answers.fields(row(metric="Verbatim"), "A")["correct"] == 0
    assert answers.fields(row(metric="wer", references=("a b",)), "a c")["substitutions"] == 1
    for wrong in ({"metric": "magic"}, {"metric": "choice"}):
        with pytest.raises(RowError, match=r"row-0: metric"):
            answers.fields(row(**wrong), "a")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PackageMissing, match="pip install sacrebleu"):
        answers.fields(row(metric="bleu"), "a")


def test_bleu_is_sacrebleus():
    pytest.importorskip("sacrebleu")
    assert bleu(
        ["the cat sat on the mat", "a dog"], [["the cat sat on the mat"], ["a dog", "one dog"]]
    ) == pytest.approx(100)


def prediction(example, hypothesis, **more):
    base = {"row": example.number, "id": example.id, "speaker": None, "seconds": 2.0, "clip_seconds": [2.0]}
    base |= {"reference": example.reference, "hypothesis": hypothesis, "hypothesis_align": None, "stopped": True}
    return {**base, "compute_seconds": 0.5, **answers.fields(example, hypothesis), **more}


def test_summary():
    examples = [
        row(0, references=("yes",), metric="yes_no", kind="speaker"),
        row(1, references=("yes",), metric="yes_no", kind="speaker"),
        row(2, references=("no",), metric="yes_no", kind="speaker"),
        row(3, references=("dog",), choices=("dog", "cat")),
        row(4, references=("red green",), metric="wer", kind="words"),
    ]
    own = [prediction(e, h) for e, h in zip(examples, ["yes", "no", "no", "bird", "red"], strict=True)]
    own.append({"row": 5, "id": "x", "error": "damaged", "readable": False})
    other = {
        "shuffled_audio": [prediction(e, "yes") for e in examples[:4]],
        "text": [prediction(examples[0], "yes"), prediction(examples[1], "yes")],
    }
    scores = answers.summarize(own, conditions=other)
    assert KEYS <= set(scores)
    assert scores["accuracy"] == 50 and scores["accuracy_shuffled_audio"] == 50 and scores["listening_gap"] == 0
    assert scores["accuracy_text"] == 100 and scores["delta_text"] == 50 and scores["accuracy_silence"] is None
    assert scores["unparsed"] == 25 and scores["rows"] == 5 and scores["never_stopped"] == 0
    assert scores["accuracy_by_kind"] == {
        "choice": {"accuracy": 0, "rows": 1, "chance": 100},
        "speaker": {"accuracy": pytest.approx(200 / 3), "rows": 3, "chance": pytest.approx(200 / 3)},
    }
    assert scores["scores_by_kind"] == {"words": {"wer": 50, "rows": 1}}
    low, high = scores["accuracy_ci95"]
    assert 0 <= low < 50 < high <= 100
    assert answers.summarize([])["accuracy"] is None and answers.rate_so_far(own) == "50.00"


# ---- other ways to ask -----------------------------------------------------------------------------------------------


def of_clips(number, names, reference, **more):
    clips = tuple(Clip({"bytes": None, "path": name}) for name in names)
    return row(number, clips=clips, references=(reference,), **more)


def paths(example):
    return [clip.audio["path"] for clip in example.clips]


def test_shuffled_audio_is_other_audio():
    """Rows share clips: the other row's is another clip, as many, and its answer differs where that can be."""
    rows = [of_clips(n, [f"{n // 2}.wav"], "ab"[n % 2]) for n in range(20)]
    rows += [of_clips(20, ["x.wav", "y.wav"], "a"), row(21, clips=())]
    own = [prediction(example, "a") for example in rows]
    plan = conditions.shuffled_audio(rows, own, TASK, 16_000)
    assert sorted(plan) == list(range(21)) and plan.unchanged == [21]
    for number in plan:
        assert not set(paths(plan[number])) & set(paths(rows[number]))
        assert len(plan[number].clips) == len(rows[number].clips) and plan[number].messages == rows[number].messages
        assert plan[number].reference == rows[number].reference
    answer_of = {"ab"[n % 2] for n in range(20)}
    assert answer_of == {"a", "b"}
    alone = [of_clips(n, ["same.wav"], "ab"[n % 2]) for n in range(2)]
    assert not conditions.shuffled_audio(alone, [prediction(e, "a") for e in alone], TASK, 16_000)


def test_the_transcript_is_read_instead_of_heard():
    rows = [of_clips(0, ["a.wav", "b.wav"], "a", transcript="red  green"), of_clips(1, ["a.wav"], "a")]
    two = [{"role": "user", "content": [AUDIO, {"type": "text", "text": "and"}, AUDIO, {"type": "text", "text": "?"}]}]
    rows[0] = Example(**{**vars(rows[0]), "messages": tuple(two)})
    plan = conditions.text(rows, [prediction(example, "a") for example in rows], TASK, 16_000)
    assert list(plan) == [0] and plan[0].clips == ()
    (turn,) = plan[0].messages
    assert [item["text"] for item in turn["content"]] == ['Transcript: "red green"\n', "and", "?"]
    assert rows[0].messages == tuple(two)


# ---- eval.py ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def questions(tmp_path, waveform):
    rows = []
    for number in range(6):
        sf.write(tmp_path / f"{number}.wav", waveform(0.3 + 0.1 * number, seed=number), 16_000)
        asked = {
            "instruction": "Is it a dog or a cat?",
            "choices": ["dog", "cat"],
            "answer": ("dog", "cat")[number % 2],
        }
        if number > 3:
            asked = {"instruction": "How many?", "metric": "number", "answer": str(number)}
        rows.append({"audio": f"{number}.wav", "kind": "animal", "transcript": f"word {number}", **asked})
    rows.append({**rows[0], "metric": "bleu", "kind": "translation", "answer": "ein Hund"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


def run_eval(checkpoint, data, out, *more):
    arguments = ["--task", "answer", "--model", checkpoint, "--data", str(data), "--output_dir", str(out)]
    return eval_script.main([*arguments, "--max_new_tokens", "4", "--batch_size", "3", "--device", "cpu", *more])


def read(out):
    lines = (out / "predictions.jsonl").read_text().splitlines()
    return json.loads((out / "metrics.json").read_text()), [json.loads(line) for line in lines]


def test_eval_writes_every_key(checkpoint, questions, tmp_path, capsys):
    assert run_eval(checkpoint, questions, tmp_path / "out") == 0
    metrics, predictions = read(tmp_path / "out")
    assert KEYS <= set(metrics) and metrics["rows"] == 7
    assert metrics["accuracy_by_kind"]["animal"]["rows"] == 6 and "bleu" in metrics["scores_by_kind"]["translation"]
    assert None not in [metrics[f"accuracy_{name}"] for name in ("shuffled_audio", "silence", "text")]
    assert metrics["listening_gap"] == pytest.approx(metrics["accuracy"] - metrics["accuracy_shuffled_audio"])
    for name in ("shuffled_audio", "silence", "text"):
        asked = [json.loads(line) for line in (tmp_path / "out" / f"predictions_{name}.jsonl").read_text().splitlines()]
        assert sorted(p["row"] for p in asked) == list(range(7))
        assert all(p["seconds"] == 0 for p in asked) == (name == "text")
    assert sorted(p["row"] for p in predictions) == list(range(7))
    printed = capsys.readouterr().out
    assert "listening gap" in printed and "accuracy by kind" in printed and "chance" in printed


class Fake:
    """Answers by `rule` (example, waveforms)."""

    sampling_rate, with_alignment = 16_000, False

    def __init__(self, rule):
        self.rule = rule

    def __call__(self, rows):
        return [{"hypothesis": self.rule(*row), "hypothesis_align": None, "stopped": True} for row in rows]


def test_a_model_that_ignores_the_audio_has_no_gap(checkpoint, questions, tmp_path, monkeypatch):
    def deaf(example, waveforms):
        return "dog" if example.choices else "4"

    monkeypatch.setattr(eval_script, "load_listener", lambda args: Fake(deaf))
    assert run_eval(checkpoint, questions, tmp_path / "out") == 0
    metrics, _ = read(tmp_path / "out")
    assert metrics["accuracy"] == metrics["accuracy_shuffled_audio"] == metrics["accuracy_silence"] == 50
    assert metrics["listening_gap"] == metrics["delta_text"] == 0


def test_a_model_that_hears_has_one(checkpoint, questions, tmp_path, monkeypatch):
    def hears(example, waveforms):
        number = round((len(waveforms[0]) / 16_000 - 0.3) * 10) if waveforms and waveforms[0].any() else 9
        return ("dog", "cat")[number % 2] if example.choices else str(number)

    monkeypatch.setattr(eval_script, "load_listener", lambda args: Fake(hears))
    assert run_eval(checkpoint, questions, tmp_path / "out") == 0
    metrics, _ = read(tmp_path / "out")
    assert metrics["accuracy"] == 100 and metrics["listening_gap"] > 50


def test_the_cascade_is_a_baseline(checkpoint, questions, tmp_path, monkeypatch):
    seen = []

    class Recogniser:
        sampling_rate = 16_000

        def __init__(self, *_):
            pass

        def __call__(self, rows):
            return [{"hypothesis": "said", "hypothesis_align": None, "stopped": None} for _ in rows]

    def note(self, rows):
        seen.extend(example.messages[-1]["content"][0].get("text") for example, clips in rows if not clips)
        return [{"hypothesis": "cat", "hypothesis_align": None, "stopped": True} for _ in rows]

    monkeypatch.setattr("audiophi.evaluation.baseline.BaselineListener", Recogniser)
    monkeypatch.setattr("audiophi.evaluation.loop.Listener.__call__", note)
    assert run_eval(checkpoint, questions, tmp_path / "out", "--baseline", "some/recogniser") == 0
    metrics, _ = read(tmp_path / "out")
    assert seen[-7:] == ['Transcript: "said"\n'] * 7
    assert metrics["baseline"]["accuracy"] == metrics["accuracy"] and metrics["baseline"]["model"] == "some/recogniser"


def test_forgetting(make_tiny_model, questions, tmp_path):
    import torch

    texts = [{"instruction": f"Say {word}.", "answer": word} for word in ("red", "blue")]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    lora = {"text": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}}
    model, processor = make_tiny_model(adapter="mlp", lora=lora)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 3)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    options = ["--forgetting", str(tmp_path / "texts.jsonl")]
    assert run_eval(str(tmp_path / "model"), questions, tmp_path / "out", *options) == 0
    metrics, _ = read(tmp_path / "out")
    found = metrics["forgetting"]
    assert found["rows"] == 2 and {"accuracy", "accuracy_before", "delta"} <= set(found)

    def heard(name):
        lines = (tmp_path / "out" / name).read_text().splitlines()
        return {p["row"]: p["hypothesis"] for p in map(json.loads, lines)}

    assert heard("predictions_forgetting.jsonl") != heard("predictions_forgetting_before.jsonl")


def test_an_llm_tuned_in_full_is_as_before(make_tiny_model):
    import torch

    from audiophi.evaluation.forgetting import as_before

    model, _ = make_tiny_model(adapter="mlp")
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    with torch.no_grad():
        for weight in model.model.language_model.parameters():
            weight.add_(0.5)
    changed = model(input_ids=ids).logits
    model.config.tuned = {**model.config.tuned, "text": "full"}
    with as_before(model):
        assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-5)
    assert torch.equal(model(input_ids=ids).logits, changed) and not torch.allclose(changed, before)


def test_rows_that_cannot_be_used(checkpoint, questions, tmp_path, capsys):
    with open(questions, "a") as file:
        file.write(json.dumps({"audio": "0.wav", "instruction": "What?", "answer": "x", "metric": "magic"}) + "\n")
        file.write(json.dumps({"audio": "0.wav", "answer": "x"}) + "\n")
    assert run_eval(checkpoint, questions, tmp_path / "out") == 0
    metrics, _ = read(tmp_path / "out")
    assert metrics["rows"] == 7 and metrics["unreadable_rows"] == 2
    assert "magic" in capsys.readouterr().err
    arguments = ["--model", checkpoint, "--data", str(questions), "--output_dir", str(tmp_path / "other")]
    assert eval_script.main(arguments) == 1 and "add --task answer" in capsys.readouterr().err
    assert not (tmp_path / "other").exists() and np.isfinite(metrics["accuracy"])
