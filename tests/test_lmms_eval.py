"""AudioPhi in lmms-eval: its own request objects and, with a task of ours, its own evaluation. Only where it is
installed (tools/lmms_eval_audiophi.py)."""

import json

import numpy as np
import pytest
import soundfile as sf

pytest.importorskip("lmms_eval", reason="lmms-eval is not among the test dependencies: it brings too much along")

from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.models import get_model  # noqa: E402

from tools.lmms_eval_audiophi import AudioPhi, register, settings_of  # noqa: E402

PROMPTS = ["Transcribe the speech.", "Who speaks, and where is he?", "What?", "Describe the sound."]
GREEDY = {"max_new_tokens": 6, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}


@pytest.fixture(scope="module")
def lm(checkpoint):
    register()
    assert get_model("audiophi") is AudioPhi
    return get_model("audiophi").create_from_arg_string(
        f"pretrained={checkpoint}", {"batch_size": "2", "max_batch_size": None, "device": "cpu"}
    )


def requests_of(lm, clips, settings, prompts=PROMPTS):
    """As lmms-eval makes them: clips by their number in a data set."""
    lm.task_dict["ours"] = {"test": [{"audio": clip} for clip in clips]}
    return [
        Instance(
            "generate_until",
            (prompt, {**settings[n % len(settings)]}, lambda doc: [doc["audio"]], n, "ours", "test"),
            n,
            {"task": "ours", "doc_id": n, "repeats": 1},
        )
        for n, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def clips(waveform):
    return [{"array": waveform(0.5 + 0.3 * n, n), "sampling_rate": 16_000, "path": f"gone/{n}.wav"} for n in range(4)]


def test_requests_are_answered_in_their_order(lm, clips):
    settings = [GREEDY, {**GREEDY, "max_new_tokens": 3}]
    answers = lm.generate_until(requests_of(lm, clips, settings))
    for n, (clip, prompt) in enumerate(zip(clips, PROMPTS, strict=True)):
        asked = {"max_new_tokens": settings[n % 2]["max_new_tokens"], "num_beams": 1, "do_sample": False}
        assert answers[n] == lm.pipe({"audio": [clip], "instruction": prompt}, **asked)["generated_text"] != ""
    assert len({*answers}) == 4


def test_an_answer_ends_where_the_benchmark_says(lm, clips):
    (whole,) = lm.generate_until(requests_of(lm, clips, [GREEDY], PROMPTS[:1]))
    end = whole[3:5]
    (cut,) = lm.generate_until(requests_of(lm, clips, [{**GREEDY, "until": ["", end]}], PROMPTS[:1]))
    assert cut == whole.split(end)[0] != whole


def test_what_a_benchmark_says_of_sampling():
    assert settings_of(GREEDY) == ({"max_new_tokens": 6, "num_beams": 1, "do_sample": False}, [])
    warm = {"temperature": 0.2, "top_p": 1.0, "until": "\n"}
    assert settings_of(warm) == ({"temperature": 0.2, "top_p": 1.0, "do_sample": True}, ["\n"])


def test_a_clip_that_cannot_be_read_costs_its_own_answer(lm, clips, capsys):
    from loguru import logger

    told = []
    sink = logger.add(told.append)
    answers = lm.generate_until(requests_of(lm, [clips[0], {"path": "gone/1.wav"}, *clips[2:]], [GREEDY]))
    logger.remove(sink)
    assert [bool(answer) for answer in answers] == [True, False, True, True]
    assert "1 of 4 answers are empty" in told[0] and "gone/1.wav" in told[0]


def test_a_task_is_asked_in_its_own_words(checkpoint, clips, waveform):
    lm = AudioPhi(checkpoint, task="transcribe", device="cpu", max_new_tokens=4)
    (answer,) = lm.generate_until(requests_of(lm, clips, [GREEDY], ["Please recognize the speech:"]))
    assert answer == lm.pipe(clips[0], task="transcribe", num_beams=1, max_new_tokens=4)["generated_text"]
    with pytest.raises(ValueError, match="task=sing: .* knows transcribe, caption"):
        AudioPhi(checkpoint, task="sing", device="cpu")
    with pytest.raises(TypeError, match="nbeams"):
        AudioPhi(checkpoint, device="cpu", nbeams=4)


def test_lmms_eval_runs_a_task_with_it(checkpoint, tmp_path, waveform):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    register()
    rows = []
    for n in range(3):
        sf.write(tmp_path / f"{n}.wav", waveform(0.6 + 0.2 * n, n), 16_000)
        rows.append({"file": str(tmp_path / f"{n}.wav"), "text": "red"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "utils.py").write_text(
        "import soundfile\n\n\ndef clips(doc):\n    samples, rate = soundfile.read(doc['file'])\n"
        "    return [{'array': samples, 'sampling_rate': rate}]\n\n\ndef asked(doc, kwargs=None):\n"
        "    return 'Transcribe the speech.'\n\n\ndef scored(doc, results):\n    return {'length': len(results[0])}\n\n"
        "def mean(values):\n    return sum(values) / len(values)\n"
    )
    (tmp_path / "ours.yaml").write_text(f"""
task: ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.clips
doc_to_text: !function utils.asked
doc_to_target: text
process_results: !function utils.scored
generation_kwargs: {{max_new_tokens: 6, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: length, aggregation: !function utils.mean, higher_is_better: true}}
""")
    results = simple_evaluate(
        model="audiophi",
        model_args=f"pretrained={checkpoint}",
        device="cpu",
        batch_size=2,
        tasks=["ours"],
        task_manager=TaskManager("ERROR", include_path=str(tmp_path), model_name="audiophi"),
    )
    pipe = AudioPhi(checkpoint, device="cpu").pipe
    answers = [pipe(row["file"], instruction="Transcribe the speech.", max_new_tokens=6) for row in rows]
    wanted = np.mean([len(answer["generated_text"]) for answer in answers])
    assert results["results"]["ours"]["length,none"] == pytest.approx(wanted) and wanted > 0
