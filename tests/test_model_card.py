"""Model cards: what they say comes from the checkpoint, its recipe and metrics.json, and they say no more than that."""

import json
import re
import shutil
from pathlib import Path

import pytest
import soundfile as sf
import yaml
from huggingface_hub import ModelCard

from audiophi.cli import eval as eval_script
from audiophi.cli.main import main
from audiophi.publishing import model_card, template
from audiophi.publishing.card_files import collect, shorten
from audiophi.publishing.data_sources import About, describe_data
from audiophi.publishing.licences import COMPONENTS, HubAnswers, component_licence
from audiophi.publishing.model_card import make_card
from audiophi.publishing.template import CardError
from audiophi.tasks import TASKS
from tests.loopback_hub import LoopbackHub
from tests.stranger import run_stranger

SPEECH, CAPTION = TASKS["transcribe"].report, TASKS["caption"].report
ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
BASES = {
    "audio": {"id": "openai/whisper-tiny.en", "revision": "a" * 40},
    "text": {"id": "HuggingFaceTB/SmolLM2-135M-Instruct", "revision": None},
}


@pytest.fixture(scope="module")
def measured(checkpoint, tmp_path_factory, waveform):
    """{"speech", "caption"}: metrics.json files that eval.py wrote about the tiny checkpoint."""
    folder = tmp_path_factory.mktemp("measured")
    texts = ["red green blue", "yellow", "white black red", "blue blue"]
    rows = [
        {"audio": f"{i}.wav", "text": text, "label": ("rain", "dog")[i % 2], "id": str(i)}
        for i, text in enumerate(texts)
    ]
    (folder / "clips").mkdir()
    for i, row in enumerate(rows):
        sf.write(folder / "clips" / row["audio"], waveform(0.4 + 0.2 * i, seed=i), 16_000)
    (folder / "clips" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task in ("transcribe", "caption"):
        arguments = ["--model", checkpoint, "--data", str(folder / "clips"), "--output_dir", str(folder / task)]
        assert eval_script.main([*arguments, "--task", task, "--max_new_tokens", "5", "--device", "cpu"]) == 0
    return {"speech": folder / "transcribe" / "metrics.json", "caption": folder / "caption" / "metrics.json"}


@pytest.fixture
def published(checkpoint, tmp_path):
    """A copy of the tiny checkpoint that names components of the Hub instead of folders; its weights never load."""
    return with_bases(checkpoint, tmp_path / "tiny", BASES)


def with_bases(checkpoint, folder, bases):
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "base_components": bases}))
    return folder


def card_of(folder, **inputs):
    return make_card(folder, collect(folder, **inputs))


def about_file(folder, **about):
    (folder / "stated.yaml").write_text(yaml.safe_dump(about))
    return folder / "stated.yaml"


# ---- what a card says ------------------------------------------------------------------------------------------------


def test_a_card_without_results(published, tmp_path, make_tiny_model, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "curves.png").write_bytes(b"a picture")
    shutil.copyfile(RECIPES / "quickstart.yaml", run / "recipe.yaml")
    folder = shutil.move(published, run / "final")
    assert main(["card", str(folder)]) == 0 and "no results" in capsys.readouterr().out
    text = (folder / "README.md").read_text()
    card = ModelCard.load(folder / "README.md")
    header = card.data.to_dict()
    assert header["library_name"] == "transformers" and header["pipeline_tag"] == "audio-text-to-text"
    assert header["base_model"] == [base["id"] for base in BASES.values()]
    assert header["license"] == "apache-2.0" and header["language"] == ["en"]
    assert "automatic-speech-recognition" in header["tags"] and "audio-captioning" not in header["tags"]
    assert "model-index" not in header and card.data.eval_results is None
    assert "Nothing was measured" in text and "python eval.py --model" in text and "Template" not in text
    assert "a" * 40 in text and "not recorded" in text and "# quickstart\n" in text
    model, _ = make_tiny_model(adapter="mlp", readout="frames")
    adapter = sum(parameter.numel() for parameter in model.model.multi_modal_projector.parameters())
    assert f"`mlp`, stack 4, hidden_size 32 | {adapter / 1e6:.2f} M |" in text
    assert f"```yaml\n{(RECIPES / 'quickstart.yaml').read_text().rstrip()}\n```" in text and "<details>" in text
    assert "](curves.png)" in text and (folder / "curves.png").read_bytes() == b"a picture"
    assert not re.search(r"\{[a-z_]+\}", text.split("## Training")[0])


def test_results_are_those_of_metrics_json(published, measured):
    files = [measured["speech"], measured["caption"]]
    card = card_of(published, metrics=files)
    results = {(result.task_type, result.metric_type): result for result in card.data.eval_results}
    for task, file in ((SPEECH, files[0]), (CAPTION, files[1])):
        metrics = json.loads(file.read_text())
        section = card.text.split(f"### {task.name}")[1].split("###")[0]
        for label, key in task.rows:
            found = results.get((task.type, key))
            assert (found is None) == (metrics[key] is None), key
            if found is not None:
                assert found.metric_value == metrics[key] and found.dataset_name == "clips"
                assert f"| {label} | {metrics[key]:.2f}" in section
    wer = results[SPEECH.type, "wer"]
    metrics = json.loads(files[0].read_text())
    low, high = metrics["wer_ci95"]
    assert wer.metric_args == {"ci95": [low, high], "normalizer": metrics["normalizer"]}
    assert f"({low:.2f} to {high:.2f})" in card.text and "4 utterances" in card.text and "9 words" in card.text
    assert "`python eval.py --task caption --model tiny --data clips --max_new_tokens 5`" in card.text
    index = card.data.to_dict()["model-index"]
    assert [result["task"]["type"] for result in index[0]["results"]] == [SPEECH.type, CAPTION.type]
    assert str(ModelCard(str(card))) == str(card)


def test_what_the_llm_never_wrote_is_a_dash(published, measured, tmp_path):
    """A model without an alignment head has no error rate of it."""
    metrics = {**json.loads(measured["speech"].read_text()), "wer_align": None}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    card = card_of(published, metrics=[tmp_path / "metrics.json"])
    assert "alignment head alone, % | – |" in card.text
    assert "wer_align" not in {result.metric_type for result in card.data.eval_results}


def test_nothing_of_this_machine_is_published(published, measured, checkpoint, tmp_path, tmp_path_factory):
    recipe = yaml.safe_load((RECIPES / "quickstart.yaml").read_text())
    recipe["data"]["train"] = [{"path": str(tmp_path / "somewhere" / "LibriSpeech"), "split": "train-clean-100"}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    folder = with_bases(checkpoint, tmp_path / "local", json.loads((Path(checkpoint) / "config.json").read_text())[
        "base_components"])  # fmt: skip
    options = ["--metrics", *map(str, measured.values()), "--recipe", str(tmp_path / "recipe.yaml")]
    assert main(["card", str(folder), *options]) == 0
    written = [folder / "README.md", *(folder / "card").iterdir()]
    assert len(written) == 5
    for file in written:
        assert str(tmp_path_factory.getbasetemp()) not in file.read_text(), file
    header = ModelCard.load(folder / "README.md").data
    assert header.datasets == ["openslr/librispeech_asr"] and header.base_model is None
    assert (header.license, header.license_name) == ("other", "unknown-parts")
    assert shorten("see https://a.b/c/d, {path: /x/y/z, other: ../a/b, kind: clotho:/x/y}") == (
        "see https://a.b/c/d, {path: z, other: ../a/b, kind: clotho:y}"
    )


def test_on_which_clips_the_decoding_was_chosen(published, tmp_path, capsys):
    """As long as the checkpoint decodes so: who changes its settings, chose them otherwise."""
    run = tmp_path / "run"
    run.mkdir()
    folder = Path(shutil.move(published, run / "final"))
    chosen = {"ctc_weight": 0.85, "lm_prior_weight": 0.2}
    data = [
        {"path": f"{tmp_path}/data/synthetic_speech", "split": "dev", "clips": 60},
        {"path": "openslr/librispeech_asr", "split": None, "clips": 1040},
    ]
    tried = [{**chosen, "error_rate": rate} for rate in (12.345, 17.0)]
    (run / "decoding.json").write_text(json.dumps({"clips": 1100, "data": data, "chosen": chosen, "tried": tried}))
    assert main(["card", str(folder)]) == 0 and "How it decodes" not in (folder / "README.md").read_text()

    saved = json.loads((folder / "generation_config.json").read_text())
    saved["tasks"] = {"transcribe": {**chosen, "draft_tokens": 16}}
    (folder / "generation_config.json").write_text(json.dumps(saved))
    assert main(["card", str(folder)]) == 0
    text = (folder / "README.md").read_text()
    assert (
        "(`ctc_weight` 0.85, `lm_prior_weight` 0.2) was chosen on 1,100 development clips (60 of synthetic speech, "
        "dev, 1,040 of LibriSpeech): of 2 settings that were tried the one with the fewest word errors there, 12.35 %"
    ) in text
    kept = folder / "card" / "decoding.json"
    assert str(tmp_path) not in kept.read_text()
    (run / "decoding.json").unlink()  # from what is kept
    assert main(["card", str(folder), "--check"]) == 0
    (folder / "README.md").write_text(text.replace("1,100 development", "9,100 development"))
    capsys.readouterr()
    assert main(["card", str(folder), "--check"]) == 1 and "+How it decodes" in capsys.readouterr().out
    # With two ears also what the alignment counts, as long as it does.
    weighed = {"hear_ctc_weight": 0.02, "hear_lm_weight": 0.1}
    trials = [{**weighed, "hear_lm_weight": 0.0, "error_rate": 3.0}, {**weighed, "error_rate": 3.21}]
    kept.write_text(json.dumps({"ears": {"clips": 36, "domains": 2, "chosen": weighed, "tried": trials}}))
    assert "How it decodes" not in card_of(folder).text and "two ears" not in card_of(folder).text
    (folder / "generation_config.json").write_text(json.dumps({**saved, **weighed}))
    text = card_of(folder).text
    assert "(`hear_ctc_weight` 0.02, `hear_lm_weight` 0.1) was found on 36 development clips: of 2 pairs" in text
    assert "standard error, 3.21 % (the mean over 2 sources). A figure on these clips flatters." in text
    # What a run wrote before it said of which data.
    kept.write_text(json.dumps({"clips": 5, "chosen": chosen, "tried": tried}))
    assert "was chosen on 5 development clips: of 2 settings" in card_of(folder).text


# ---- what a card cannot say ------------------------------------------------------------------------------------------


def changed(measured, tmp_path, task="speech", drop=(), **values):
    metrics = {key: value for key, value in json.loads(measured[task].read_text()).items() if key not in drop}
    (tmp_path / "changed.json").write_text(json.dumps({**metrics, **values}))
    return tmp_path / "changed.json"


@pytest.mark.parametrize(
    "task, key",
    [("speech", "wer_shuffled_audio"), ("speech", "listening_gap"), ("speech", "wer_ci95"), ("speech", "checkpoint"),
     ("caption", "cider_d_shuffled"), ("caption", "label_accuracy"), ("caption", "listening_gap_of")],
)  # fmt: skip
def test_what_metrics_json_lacks_is_named_with_the_command_that_makes_it(published, measured, tmp_path, task, key):
    command = "--task caption --model" if task == "caption" else "python eval.py --model"
    with pytest.raises(CardError, match=f"'{key}'.*{command}.*--output_dir OUT"):
        card_of(published, metrics=[changed(measured, tmp_path, task, drop=[key])])


def test_changed_or_foreign_metrics_are_refused(published, measured, tmp_path):
    wrong = {
        "listening_gap 99.0 is not": {"listening_gap": 99.0},
        "is null": {"wer": None},
        "other weights": {"checkpoint": {"weights": "0", "generation": "0"}},
    }
    for message, values in wrong.items():
        with pytest.raises(CardError, match=message):
            card_of(published, metrics=[changed(measured, tmp_path, **values)])
    with pytest.raises(CardError, match="same data"):
        card_of(published, metrics=[measured["speech"], changed(measured, tmp_path)])
    settings = json.loads((published / "generation_config.json").read_text())
    (published / "generation_config.json").write_text(json.dumps({**settings, "transformers_version": "99"}))
    card_of(published, metrics=[measured["speech"]])
    (published / "generation_config.json").write_text(json.dumps({**settings, "num_beams": 7}))
    with pytest.raises(CardError, match="decoding settings"):
        card_of(published, metrics=[measured["speech"]])
    (tmp_path / "list.json").write_text("[]")
    for path in (tmp_path / "list.json", tmp_path / "missing.json"):
        with pytest.raises(CardError, match=path.name):
            card_of(published, metrics=[path])


def test_the_template_asks_only_for_what_there_is(published, tmp_path, monkeypatch):
    (tmp_path / "template.md").write_text(
        template.template_path().read_text() + "\nAccuracy on the moon: {moon_accuracy}\n"
    )
    monkeypatch.setattr(model_card, "template_path", lambda: tmp_path / "template.md")
    with pytest.raises(CardError, match="moon_accuracy"):
        card_of(published)


def test_check_finds_what_was_written_into_a_card(published, measured, capsys):
    assert main(["card", str(published), "--metrics", str(measured["speech"]), "--recipe",
                 str(RECIPES / "quickstart.yaml")]) == 0  # fmt: skip
    assert main(["card", str(published), "--check"]) == 0
    card = published / "README.md"
    text = card.read_text()
    wer = f"{json.loads(measured['speech'].read_text())['wer']:.2f}"
    card.write_text(text.replace(f"word error rate, % | {wer}", "word error rate, % | 1.00"))
    capsys.readouterr()
    assert main(["card", str(published), "--check"]) == 1
    said = capsys.readouterr().out
    assert "-| word error rate, % | 1.00" in said and f"+| word error rate, % | {wer}" in said
    card.write_text(re.sub(r"license: [\w.-]+", "license: mit", text))
    assert main(["card", str(published), "--check"]) == 1 and "-license: mit" in capsys.readouterr().out
    # Written again from what is kept beside it, without being told anything anew.
    assert main(["card", str(published)]) == 0 and card.read_text() == text
    (published / "model.safetensors").write_bytes((published / "model.safetensors").read_bytes()[:-4] + b"\0\0\0\1")
    assert main(["card", str(published), "--check"]) == 1 and "other weights" in capsys.readouterr().err


def test_wrong_inputs_are_named(published, tmp_path, capsys):
    (tmp_path / "wrong.yaml").write_text("name: x\nsteps: 3\n")
    (tmp_path / "about.yaml").write_text("licence: mit\nlimit: [x]\n")
    for option, file, said in (
        ("--recipe", "wrong.yaml", "steps"), ("--recipe", "no.yaml", "no.yaml"), ("--about", "about.yaml", "limits"),
        ("--about", "no.yaml", "no.yaml"), ("--curves", "no.png", "no.png"),
    ):  # fmt: skip
        assert main(["card", str(published), option, str(tmp_path / file)]) == 1
        assert said in capsys.readouterr().err and not (published / "README.md").exists()
    (published / "model.safetensors").unlink()
    assert main(["card", str(published)]) == 1 and "no *.safetensors" in capsys.readouterr().err
    assert main(["card", str(tmp_path)]) == 1


# ---- licences and data ----------------------------------------------------------------------------------------------


def test_the_projects_own_recipes(published, checkpoint, tmp_path):
    """XEUS and Clotho are non-commercial, whatever else is free; two recipes, one after the other, are one training."""
    xeus = with_bases(checkpoint, tmp_path / "xeus", {"audio": {"id": "espnet/xeus", "revision": None},
                                                      "text": {"id": "microsoft/phi-2", "revision": None}})  # fmt: skip
    header = card_of(xeus, recipes=[RECIPES / "phi2_xeus_librispeech.yaml"]).data
    assert header.license == "cc-by-nc-sa-4.0" and header.datasets == ["openslr/librispeech_asr"]
    card = card_of(published, recipes=[RECIPES / "phi2_languagebind_clotho.yaml"])
    assert (card.data.license, card.data.license_name) == ("other", "non-commercial-see-licences")
    assert "audio-captioning" in card.data.tags and 'task="caption"' in card.text
    card = card_of(published, recipes=[RECIPES / "qwen2_whisper_common_voice_de.yaml"])
    assert card.data.language == ["de"] and "Common Voice" in card.text
    text = (RECIPES / "audiophi_tiny.yaml").read_text()
    again = tmp_path / "again.yaml"
    again.write_text(text.replace("name: audiophi_tiny\n", "name: again\ninit_from: outputs/audiophi_tiny/final\n"))
    pair = [RECIPES / "audiophi_tiny.yaml", again]
    assert "It goes on from" not in card_of(published, recipes=pair).text
    assert "It goes on from `outputs/audiophi_tiny/final`" in card_of(published, recipes=pair[1:]).text
    known = {pattern: licence.id for pattern, licence in COMPONENTS}
    assert known["espnet/xeus"] == "cc-by-nc-sa-4.0" and component_licence("microsoft/wavlm-large").id == "cc-by-sa-3.0"


def test_tasks_that_ask_alike_are_named_once(published):
    """Five tasks make questions, and each was an answer of its own in the card."""
    text = card_of(published, recipes=[RECIPES / "audiophi_tiny.yaml"]).text
    assert text.count("answers to questions about audio") == 1 and text.count("an answer to any question") == 1
    assert "| at most 1,400 steps, in 45 minutes |" in text


def test_what_the_author_states(published, tmp_path):
    recipe = yaml.safe_load((RECIPES / "quickstart.yaml").read_text())
    recipe["data"]["train"] = [{"path": "recordings/mine"}, {"path": "copy/of_libri"}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    sources = {"mine": {"title": "my recordings", "licence": "cc-by-nc-4.0", "language": ["de"]},
               "copy/of_libri": {"dataset": "openslr/librispeech_asr", "title": "a part of LibriSpeech"}}  # fmt: skip
    stated = {"name": "Ohr", "limits": ["It knows one voice."], "sources": sources, "tags": ["tiny"]}
    card = card_of(published, recipes=[tmp_path / "recipe.yaml"], about=about_file(tmp_path, **stated))
    assert card.data.license == "cc-by-nc-4.0" and card.data.language == ["de", "en"] and "tiny" in card.data.tags
    assert card.data.datasets == ["openslr/librispeech_asr"] and "# Ohr\n" in card.text
    assert (
        "- It knows one voice." in card.text and "| a part of LibriSpeech | `copy/of_libri` | cc-by-4.0 |" in card.text
    )
    with pytest.raises(ValueError, match="licence mit.*my recordings"):
        card_of(published, recipes=[tmp_path / "recipe.yaml"],
                about=about_file(tmp_path, **stated, licence="mit"))  # fmt: skip


@pytest.mark.parametrize(
    "path, title, licence",
    [
        ("../data/librispeech_devclean_12spk", "LibriSpeech", "cc-by-4.0"),
        ("openslr/librispeech_asr:clean:train.100", "LibriSpeech", "cc-by-4.0"),
        ("ESC-50-master/meta/esc50.csv", "ESC-50", "cc-by-nc-3.0"),
        ("clotho:somewhere/clotho", "Clotho", None),
        ("UrbanSound8K", "UrbanSound8K", "cc-by-nc-3.0"),
        ("my_speech/metadata.jsonl", "metadata.jsonl", None),
    ],
)
def test_data_sets_are_recognised_by_name(path, title, licence):
    found = describe_data(path, About(), HubAnswers())
    assert (found.title, found.licence.id) == (title, licence)
    assert (found.licence.kind == "unknown") == (found.by == "not known") == (title == "metadata.jsonl")


# ---- the Hub's own tools ---------------------------------------------------------------------------------------------

VALIDATE = """
import sys
from huggingface_hub import ModelCard
from audiophi.publishing.licences import HubAnswers, component_licence

card = ModelCard.load("generated/README.md")
card.validate()
for key, value in {"license": "free", "base_model": ["a folder"], "pipeline_tag": 3, "license_name": None}.items():
    broken = ModelCard(str(card))
    setattr(broken.data, key, value)
    broken.data.license = "other" if key == "license_name" else broken.data.license
    try:
        broken.validate()
        raise SystemExit(f"a card with {key} {value} was taken")
    except ValueError as error:
        assert key in str(error), error
answers = HubAnswers()
assert str(component_licence("acme/stated", answers=answers)) == "cc-by-nc-4.0"
assert component_licence("acme/bare", answers=answers).kind == "unknown"
assert answers.dataset("acme/stated") == "cc-by-nc-4.0" and answers.models == {"acme/stated": "cc-by-nc-4.0"}

from modeling_audiophi import AudioPhiForConditionalGeneration
from processing import AudioPhiProcessor
from audiophi.cli.main import main

names = ("acme/tiny-whisper", "acme/tiny-llm")
processor = AudioPhiProcessor.from_components(*names)
model = AudioPhiForConditionalGeneration.from_components(
    *names, adapter={"type": "mlp", "hidden_size": 32}, audio_token_id=processor.audio_token_id)
processor.match_model(model.config)
model.save_pretrained("model")
processor.save_pretrained("model")
assert main(["push", "model", "acme/phi"]) == 0
"""


def test_the_hubs_own_tools_take_it(published, measured, tiny_whisper_dir, tiny_llm_dir, tmp_path):
    """`card.validate()`, licences from model infos, and `audiophi push`, by the unmodified client over HTTP."""
    options = ["--metrics", *map(str, measured.values()), "--recipe", str(RECIPES / "quickstart.yaml")]
    (tmp_path / "stranger").mkdir()
    assert main(["card", str(published), *options, "--output", str(tmp_path / "stranger/generated/README.md")]) == 0
    stated = tmp_path / "stated"
    stated.mkdir()
    (stated / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    with LoopbackHub({"hf_writer": "acme"}) as hub:
        commits = [hub.add_folder("acme/tiny-whisper", tiny_whisper_dir), hub.add_folder("acme/tiny-llm", tiny_llm_dir)]
        hub.add_folder("acme/stated", stated)
        run_stranger(
            VALIDATE, tmp_path / "stranger", preamble=f"import sys; sys.path.insert(0, {str(ROOT)!r})\n",
            HF_ENDPOINT=hub.url, HF_TOKEN="hf_writer",
        )  # fmt: skip
        files = hub.files("acme/phi")
        assert {"README.md", "card/card.json", "model.safetensors", "tokenizer.json"} <= set(files)
        text = files["README.md"].decode()
        assert 'model="acme/phi"' in text and all(commit in text for commit in commits)
        assert "license_name: unknown-parts" in text
        # transformers' push reads the card and writes it again: nothing of it may get lost.
        first = next(c for c in hub.repositories["acme/phi"].commits.values() if "README.md" in c)
        assert first["README.md"].read() == files["README.md"] and "model.safetensors" not in first
