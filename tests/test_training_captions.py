"""Training with captions: what is drawn for a row, what the losses get, and the recipes on official layouts."""

import json
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from audiophi.data.alignment_text import AlignmentTokenizer, normalise_transcript
from audiophi.data.collator import AudioPhiCollator
from audiophi.tasks import TASKS
from audiophi.tasks.caption_templates import TEMPLATES
from audiophi.training.bad_rows import BadRows
from audiophi.training.batches import Draw
from audiophi.training.corpus import Corpus, TrainingSet
from audiophi.training.recipe import RecipeError, Source, load_recipe, recipe_from_dict
from audiophi.training.stage_data import teaching_alignment
from audiophi.training.stages import run_recipe
from audiophi.training.streams import StreamingSet
from modeling_audiophi import AudioPhiForConditionalGeneration
from modeling_audiophi.alignment_audiophi import NO_TARGET
from tests.layouts import clotho_captions, tone, write_clotho, write_common_voice, write_csv, write_librispeech

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
INSTRUCTIONS = {"caption": ["Describe the sound.", "What is that?"]}


@pytest.fixture(scope="module")
def librispeech(tmp_path_factory):
    splits = ("train-clean-100", "train-clean-360", "train-other-500", "dev-clean")
    return write_librispeech(tmp_path_factory.mktemp("data") / "LibriSpeech", splits)


@pytest.fixture(scope="module")
def clotho(tmp_path_factory):
    return write_clotho(tmp_path_factory.mktemp("data") / "clotho", ("development", "validation", "evaluation"))


@pytest.fixture(scope="module")
def esc50(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "ESC-50"
    rows = []
    for number, category in enumerate(("dog", "rain", "sea_waves", "dog")):
        tone(root / "audio" / f"{number}.wav", number)
        rows.append({"filename": f"{number}.wav", "fold": 1 + number % 2, "category": category})
    write_csv(root / "meta" / "esc50.csv", rows)
    return root


def told(item):
    """What the user asks, and what the assistant says."""
    return item["messages"][-2]["content"][-1]["text"], item["messages"][-1]["content"]


def test_one_caption_is_drawn_per_epoch(clotho, make_tiny_model, tmp_path):
    corpus = Corpus([Source(path=str(clotho), split="development")], BadRows(tmp_path / "bad.jsonl", 0))
    _, processor = make_tiny_model()

    def drawn(seed, number, epochs):
        rows = TrainingSet(corpus, processor, None, INSTRUCTIONS, seed, text_case="keep")
        return [told(rows[Draw(number, epoch, 1.0)]) for epoch in range(epochs)]

    first = drawn(0, 1, 100)
    assert first[:9] == drawn(0, 1, 9)
    counts = Counter(text.strip() for _, text in first)
    assert set(counts) == set(clotho_captions(1)) and min(counts.values()) > 5
    assert len(set(first)) == 10, "caption and instruction go together"
    assert first[:20] != drawn(1, 1, 20) and {text for _, text in drawn(0, 2, 9)} <= {
        f" {caption}" for caption in clotho_captions(2)
    }


def test_the_instruction_is_the_sources_or_the_tasks(librispeech, esc50, make_tiny_model, tmp_path):
    sources = [
        Source(path=str(librispeech), split="dev-clean"),
        Source(path=str(esc50), task="caption", instruction="Name the animal."),
    ]
    corpus = Corpus(sources, BadRows(tmp_path / "bad.jsonl", 0))
    rows = TrainingSet(corpus, make_tiny_model()[1], None, INSTRUCTIONS)
    asked = {told(rows[Draw(0, epoch, 1.0)])[0] for epoch in range(40)}
    assert asked == set(TASKS["transcribe"].wordings)
    assert {told(rows[Draw(6, epoch, 1.0)])[0] for epoch in range(9)} == {"Name the animal."}


def test_a_mixture_trains_each_task_with_its_own_words(librispeech, clotho, make_tiny_model, tmp_path):
    sources = [Source(path=str(librispeech), split="dev-clean"), Source(path=str(clotho), split="development")]
    corpus = Corpus(sources, BadRows(tmp_path / "bad.jsonl", 0))
    assert len(corpus) == 10 and len(list(corpus.texts())) == 3, "captions are no alignment targets"
    assert len(list(corpus.texts(sounds=True))) > 3
    _, processor = make_tiny_model()
    rows = TrainingSet(corpus, processor, None, {"transcribe": ["Write."]})
    examples = [rows[Draw(number, 0, 1.0)] for number in (0, 6)]
    collate = AudioPhiCollator(processor, mode="align", align_tokenizer=AlignmentTokenizer(processor.tokenizer))
    assert told(examples[0])[0] == "Write." and told(examples[1])[0] == "Describe the sound."
    assert examples[1]["sounds"] in clotho_captions(0)
    targets = collate(examples)["align_labels"]
    assert (targets[0] >= 0).any() and targets[1, 0] == NO_TARGET, "who knows whether somebody speaks in it"
    collate.learn_sounds = True
    batch, words = collate(examples), collate.align_tokenizer.encode(normalise_transcript(examples[1]["sounds"]))
    assert torch.equal(batch["align_labels"], targets)
    assert batch["sound_labels"][1].tolist() == words and not (batch["sound_labels"][0] >= 0).any()


def test_sounds_are_aligned_to_their_captions_words(esc50, librispeech, tiny_whisper_dir, tiny_llm_dir, tmp_path):
    def recipe(**keys):
        stage = {"name": "sounds", "loss": "align", "steps": 40}
        stage |= {"batch_size": 4, "learning_rate": 1e-2, "data": [{"path": str(esc50), "speech": False}]}
        return recipe_from_dict(
            {
                "name": "sounds",
                "components": {"audio": tiny_whisper_dir, "text": tiny_llm_dir},
                "adapter": {"type": "conv_mlp", "stack": 2, "hidden_size": 32, "kernel_size": 3, "num_layers": 1},
                "alignment": {"merges": None},
                "readout": "mixed",
                "data": {"train": [{"path": str(librispeech), "split": "dev-clean"}]},
                "cache_dir": str(tmp_path / "cache"),
                "output_dir": str(tmp_path / "run"),
                "stages": [stage],
                **keys,
            }
        )

    final = run_recipe(recipe())
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    losses = [entry["sound_loss"] for entry in history if "sound_loss" in entry]
    assert losses[-1] < max(losses) - 0.25  # none at first, the alignment hears words everywhere
    model = AudioPhiForConditionalGeneration.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    known = {tokenizer.decode([token]).strip() for token in model.model.alignment.vocab_ids.tolist()}
    assert {"rain"} <= known or {"r", "a", "i", "n"} <= known, "the captions' words are scored"
    with pytest.raises(RecipeError, match="they are frozen"):
        tune = {"adapter": "frozen", "readout": "full"}
        recipe(readout="collapse", stages=[{"name": "a", "loss": "align", "tune": tune, "steps": 1, "batch_size": 1}])


def test_audio_without_speech_is_to_be_transcribed_as_nothing(librispeech, esc50, make_tiny_model, tmp_path):
    sources = [
        Source(path=str(librispeech), split="dev-clean"),
        Source(path=str(esc50), task="no_speech"),
        Source(path=str(esc50)),
    ]
    corpus = Corpus(sources, BadRows(tmp_path / "bad.jsonl", 0))
    assert [corpus.example(row).task for row in corpus.rows[6:]] == ["no_speech"] * 4 + ["caption"] * 4
    run = types.SimpleNamespace(say=print)
    assert len(teaching_alignment(run, corpus, sounds=False, described=False)) == 10
    assert len(teaching_alignment(run, corpus, sounds=True, described=False)) == 14
    assert len(teaching_alignment(run, corpus, sounds=False, described=True)) == 14
    captions = sum(len(corpus.example(row).references) for row in corpus.rows[10:])
    assert captions >= 4 * len(TEMPLATES) and len(list(corpus.texts(sounds=True))) > len(TEMPLATES)
    _, processor = make_tiny_model()
    rows = TrainingSet(corpus, processor, None, {"transcribe": ["Write."]})
    examples = [rows[Draw(number, 0, 1.0)] for number in (0, 6)]
    assert told(examples[1])[0] == "Write." and examples[1]["transcripts"] == [""]
    batch = AudioPhiCollator(processor, mode="both", align_tokenizer=AlignmentTokenizer(processor.tokenizer))(examples)
    assert (batch["align_labels"][0] >= 0).any() and not (batch["align_labels"][1] >= 0).any()
    labels = batch["labels"][1]
    assert labels[labels >= 0].tolist() == [processor.tokenizer.eos_token_id], "the end is all there is to say"


def test_the_development_set_needs_words(settings, esc50):
    data = {"train": [{"path": str(esc50)}], "eval": [{"path": str(esc50), "task": "no_speech"}]}
    with pytest.raises(RecipeError, match="no_speech is for training only"):
        recipe_from_dict(settings({"name": "lm", "loss": "lm"}, data=data))


@pytest.fixture
def settings(tmp_path, tiny_whisper_dir, tiny_llm_dir):
    def make(*stages, **keys):
        return {
            "name": "tiny",
            "components": {"audio": tiny_whisper_dir, "text": tiny_llm_dir},
            "adapter": {"type": "mlp", "stack": 2, "hidden_size": 32},
            "stages": [{"batch_size": 4, "steps": 2, **stage} for stage in stages],
            "cache_dir": str(tmp_path / "cache"),
            "output_dir": str(tmp_path / "out"),
            "evaluation": {"clips": 10, "max_new_tokens": 4},
            "report_to": [],
            **keys,
        }

    return make


def test_speech_and_sounds_are_trained_and_evaluated_together(settings, librispeech, esc50, tmp_path, capsys):
    speech, sounds = {"path": str(librispeech), "split": "dev-clean"}, {"path": str(esc50)}
    data = {"train": [speech, {**sounds, "filter": {"fold": [1]}}], "eval": [speech, sounds]}
    stages = ({"name": "align", "loss": "align"}, {"name": "lm", "loss": "lm"}, {"name": "both", "loss": "both"})
    final = run_recipe(recipe_from_dict(settings(*stages, data=data, alignment={"merges": 20}, readout="collapse")))
    decoding = json.loads(Path(final, "generation_config.json").read_text())["tasks"]
    assert decoding["caption"]["no_repeat_ngram_size"] == 3, "a caption of a sound that it does not know loops"
    assert "align: 2 rows are left out" in capsys.readouterr().out
    entries = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    first, *_, last = [entry for entry in entries if "wer_align" in entry]
    assert "label_accuracy" not in first and "wer" not in first, "the align stage does not run the LLM"
    assert {"wer", "cider_d", "label_accuracy", "label_accuracy_shuffled"} <= last.keys()


def test_captions_alone_cannot_be_aligned(settings, esc50):
    with pytest.raises(RecipeError, match="loss align needs clips of which it is known what is said"):
        data = {"train": [{"path": str(esc50)}]}
        run_recipe(recipe_from_dict(settings({"name": "a", "loss": "align"}, data=data, alignment={"merges": 20})))


def test_a_stream_of_both_tasks_trains(settings, librispeech, esc50, tmp_path, monkeypatch):
    item, taken = StreamingSet._item, {"align": Counter(), "lm": Counter()}

    def note(self, example, *given):
        made = item(self, example, *given)
        taken[self.stage.name][example.task] += made[0] is not None
        return made

    monkeypatch.setattr(StreamingSet, "_item", note)
    sounds = [{"path": str(esc50)}, {"path": str(esc50), "task": "no_speech"}]
    data = {"train": [{"path": str(librispeech), "split": "dev-clean"}, *sounds], "streaming": True}
    stages = ({"name": "align", "loss": "align"}, {"name": "lm", "loss": "lm"})
    run_recipe(recipe_from_dict(settings(*stages, data=data, alignment={"merges": 20}, logging_steps=1)))
    assert taken["lm"].keys() == {"transcribe", "caption", "no_speech"} and min(taken["lm"].values()) > 0
    assert taken["align"]["caption"] == 0 < min(taken["align"]["transcribe"], taken["align"]["no_speech"])
    entries = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    losses = {(entry["stage"], name) for entry in entries for name in ("align_loss", "lm_loss") if name in entry}
    assert losses == {("align", "align_loss"), ("lm", "lm_loss")}


def test_a_run_from_before_a_key_existed_can_be_continued(settings, esc50, tmp_path):
    recipe = settings({"name": "lm", "loss": "lm"}, data={"train": [{"path": str(esc50)}]})
    run_recipe(recipe_from_dict(recipe))
    written = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    del written["loss_on"], written["data"]["train"][0]["audio_folder"]
    (tmp_path / "out" / "recipe.yaml").write_text(yaml.safe_dump(written))
    run_recipe(recipe_from_dict(recipe))
    with pytest.raises(RecipeError, match="instructions"):
        run_recipe(recipe_from_dict({**recipe, "instructions": {"caption": ["What is that?"]}}))


@pytest.mark.parametrize(
    "name, stages",
    [
        ("phi2_xeus_librispeech", ["align", "lm"]),
        ("smollm2_whisper_librispeech", ["align", "lm"]),
        ("phi2_languagebind_clotho", ["adapter", "lora"]),
        ("qwen2_whisper_common_voice_de", ["align", "lm"]),
    ],
)
def test_recipes_run_end_to_end_on_official_layouts(
    name, stages, librispeech, clotho, tiny_whisper_dir, tiny_llm_dir, tmp_path, monkeypatch
):
    """Tiny random components in place of the real ones; every other key is the recipe's, but for sizes and lengths."""
    monkeypatch.chdir(tmp_path)  # the recipes name the data by relative paths
    Path("LibriSpeech").symlink_to(librispeech)
    Path("clotho").symlink_to(clotho)
    write_common_voice(Path("common_voice/de"))
    overrides = [f"--components.audio={tiny_whisper_dir}", f"--components.text={tiny_llm_dir}"]
    overrides += ["--adapter.hidden_size=32", "--adapter.num_heads=4", "--num_workers=0", "--report_to=[]"]
    overrides += ["--evaluation={clips: 3, max_new_tokens: 4}"]
    recipe = load_recipe(RECIPES / f"{name}.yaml", overrides)
    assert [stage.name for stage in recipe.stages] == stages
    for stage in recipe.stages:
        stage.steps, stage.epochs, stage.grad_accum = 2, None, 1
        if stage.batch_seconds:
            stage.batch_seconds = 5.0
    final = run_recipe(recipe)
    assert final == Path("outputs") / name / "final" and (final / "model.safetensors").stat().st_size > 1000
    assert not Path(f"outputs/{name}/bad_rows.jsonl").read_text()
    entries = [json.loads(line) for line in Path(f"outputs/{name}/history.jsonl").read_text().splitlines()]
    assert {entry["stage"] for entry in entries} == set(stages)
    last = [entry for entry in entries if "loss" not in entry][-1]
    assert ("cider_d" in last) == ("clotho" in name) and ("wer" in last) == ("clotho" not in name)
