"""AudioPhiCollator: what the model is trained on, checked on token ids."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from audiophi.data.alignment_text import AlignmentTokenizer
from audiophi.data.collator import AudioPhiCollator, training_item
from audiophi.data.example import Clip, Example, content_of
from audiophi.training.bad_rows import BadRows
from audiophi.training.batches import BatchSchedule
from audiophi.training.build import build_model, build_processor
from audiophi.training.corpus import Corpus, TrainingSet
from audiophi.training.recipe import Stage, recipe_from_dict
from audiophi.training.stage_data import StageCollator, stage_augment
from modeling_audiophi.alignment_audiophi import NO_TARGET
from tests.tiny_runs import LM

RATE = 16_000
ASKED = "Transcribe the speech."


def item(clips, text, instruction=ASKED, task="transcribe", **options):
    """One example as the collator takes it; `clips` encoded."""
    known = text if task == "transcribe" else None
    example = Example(task, 0, "x", "data", tuple(Clip(None, known) for _ in clips), references=(text,))
    if task == "answer":
        turns = ({"role": "user", "content": content_of(len(clips), instruction)},)
        example = Example(task, 0, "x", "data", example.clips, turns, (text,))
    return training_item(example, clips, wordings=[instruction], **options)


@pytest.fixture(scope="module")
def model_and_processor(make_tiny_model):
    return make_tiny_model()


@pytest.fixture(scope="module")
def processor(model_and_processor):
    return model_and_processor[1]


@pytest.fixture(scope="module")
def align_tokenizer(processor):
    return AlignmentTokenizer(processor.tokenizer, merges=5)


@pytest.fixture
def audio(waveform):
    return [(waveform(1.0), RATE), (waveform(2.6, 1), RATE)]


@pytest.fixture
def examples(processor, audio):
    first, second = map(processor.encode_audio, audio)
    return [
        item([first], "The QUICK, brown fox!", id="a"),
        item([second], "no", "Write down what you hear.", id="b"),
    ]


def cached(frames, text="no", size=6, **extra):
    states = torch.randn(frames, size, generator=torch.Generator().manual_seed(frames))
    return {**item([{"audio_hidden_states": states}], text), **extra}


def test_labels_are_the_normalised_text_and_the_end_token_and_nothing_else(processor, examples):
    batch = AudioPhiCollator(processor, "lm")(examples)
    end = processor.end_token_id
    for ids, labels, text in zip(batch["input_ids"], batch["labels"], ["the quick brown fox", "no"], strict=True):
        kept = labels != -100
        assert labels[kept].tolist() == [*processor.tokenizer(" " + text)["input_ids"], end]
        assert torch.equal(labels[kept], ids[kept])
        assert processor.audio_token_id not in labels


def test_both_losses_have_the_same_targets(processor, examples):
    """The alignment can score what the LLM writes only where both cut the transcript into the same tokens."""
    batch = AudioPhiCollator(processor, "both", align_tokenizer=AlignmentTokenizer(processor.tokenizer))(examples)
    for labels, targets in zip(batch["labels"], batch["align_labels"], strict=True):
        assert labels[labels != -100][:-1].tolist() == targets[targets != -100].tolist()


def test_padding_is_not_a_label_although_it_has_the_end_tokens_id(processor, examples):
    assert processor.tokenizer.pad_token_id == processor.end_token_id
    batch = AudioPhiCollator(processor, "lm")(examples)
    padding = batch["attention_mask"] == 0
    assert padding.any() and (batch["labels"][padding] == -100).all()
    assert ((batch["labels"] == processor.end_token_id).sum(1) == 1).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_changes_no_content(processor, examples, side):
    batch = AudioPhiCollator(processor, "lm", padding_side=side)(examples)
    for row, example in enumerate(examples):
        alone = AudioPhiCollator(processor, "lm")([example])
        real = batch["attention_mask"][row].bool()
        assert real[-1 if side == "left" else 0]
        assert torch.equal(batch["input_ids"][row][real], alone["input_ids"][0])
        assert torch.equal(batch["labels"][row][real], alone["labels"][0])


def test_training_prompt_equals_the_inference_prompt(processor, examples, audio):
    training = AudioPhiCollator(processor, "lm")(examples[:1])
    content = [{"type": "audio", "audio": audio[0]}, {"type": "text", "text": "Transcribe the speech."}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    length = prompt["input_ids"].shape[1]
    assert torch.equal(training["input_ids"][:, :length], prompt["input_ids"])
    assert (training["labels"][:, :length] == -100).all() and (training["labels"][:, length:] != -100).sum() > 1
    assert torch.equal(training["input_features"], prompt["input_features"])


def test_alignment_batches_have_targets_and_no_prompt(processor, align_tokenizer, examples):
    batch = AudioPhiCollator(processor, "align", align_tokenizer)(examples)
    assert set(batch) == {"input_features", "input_features_mask", "audio_num_windows", "align_labels"}
    assert batch["audio_num_windows"].tolist() == [1, 2]
    for row, text in enumerate(["the quick brown fox", "no"]):
        targets = batch["align_labels"][row]
        assert targets[targets != -100].tolist() == align_tokenizer.encode(text)
        assert align_tokenizer.decode(targets[targets != -100].tolist()) == text


def test_both_is_the_two_together(processor, align_tokenizer, examples):
    both, align, lm = (AudioPhiCollator(processor, mode, align_tokenizer)(examples) for mode in ("both", "align", "lm"))
    assert set(both) == set(align) | set(lm)
    assert all(torch.equal(both[name], value) for name, value in {**lm, **align}.items())


def decoded(processor, labels):
    return processor.tokenizer.decode(labels[labels != -100])


def test_answers_are_verbatim(processor, examples):
    text = 'Steps:\n1. Open "x.py" (3.5 EUR)\n{"a": [1, 2]}'
    written = item(examples[0]["clips"], text, "How?", "answer")
    kept = item(examples[0]["clips"], "The QUICK, brown fox!", text_case="keep")
    batch = AudioPhiCollator(processor, "lm")([written, kept])
    assert decoded(processor, batch["labels"][0]) == text + "<|im_end|>"
    assert decoded(processor, batch["labels"][1]) == " The QUICK, brown fox!<|im_end|>"


def test_what_ctc_may_learn(processor, align_tokenizer, examples):
    """The words; nothing at all; blank only where nobody speaks."""
    clip = examples[0]["clips"][0]
    silent = {**item([clip], "x", "What?", "answer"), "transcripts": [""]}
    rows = [examples[0], item([clip], "x", "What?", "answer"), silent]
    targets = AudioPhiCollator(processor, "both", align_tokenizer)(rows)["align_labels"]
    assert targets[0, 0] >= 0 and targets[1, 0] == NO_TARGET and (targets[2] == -100).all()
    alone = AudioPhiCollator(processor, "align", align_tokenizer)([silent])
    assert alone["align_labels"].tolist() == [[-100]]


def test_words_that_say_what_is_heard(processor, align_tokenizer, examples):
    clip = examples[0]["clips"][0]
    rows = [examples[0], item([clip], "A dog, barking.", task="caption")]
    labels = AudioPhiCollator(processor, "align", align_tokenizer, learn_sounds=True)(rows)["sound_labels"]
    assert (labels[0] == -100).all() and align_tokenizer.decode(labels[1].tolist()) == "a dog barking"


def test_text_several_clips_and_turns_in_one_batch(model_and_processor, align_tokenizer, examples):
    model, processor = model_and_processor
    clips = [example["clips"][0] for example in examples]
    turns = (
        {"role": "user", "content": content_of(1, "One?")},
        {"role": "assistant", "content": "First."},
        {"role": "user", "content": content_of(1, "And this?")},
    )
    two = Example("answer", 0, "two", "data", (Clip(None), Clip(None)), turns, ("Second.",))
    text = Example("answer", 0, "text", "data", (), ({"role": "user", "content": content_of(0, "2 + 2?")},), ("4",))
    rows = [
        training_item(two, clips, wordings=[]),
        training_item(text, [], wordings=[]),
        item(clips, "Both.", "Compare.", "answer"),
        examples[0],
    ]
    batch = AudioPhiCollator(processor, "both", align_tokenizer)(rows)
    assert (batch["input_ids"] == processor.audio_token_id).sum(1).tolist() == [2, 0, 2, 1]
    assert len(batch["audio_num_windows"]) == 5 == len(batch["align_labels"])
    learned = [decoded(processor, labels) for labels in batch["labels"]]
    assert learned[:3] == ["First.<|im_end|>Second.<|im_end|>", "4<|im_end|>", "Both.<|im_end|>"]
    last = AudioPhiCollator(processor, "lm", loss_on="last")(rows)
    assert decoded(processor, last["labels"][0]) == "Second.<|im_end|>"
    assert torch.equal(last["labels"][1:], batch["labels"][1:])
    only = AudioPhiCollator(processor, "lm")(rows[1:2])
    assert "audio_num_windows" not in only and torch.isfinite(model(**only).loss)


@pytest.mark.parametrize("mode", ["align", "lm", "both"])
def test_the_model_takes_every_kind_of_batch(model_and_processor, examples, mode):
    model, processor = model_and_processor
    # The tiny model's head covers the tokens 10 to 309, of which a few merges use some.
    collate = AudioPhiCollator(processor, mode, AlignmentTokenizer(processor.tokenizer, merges=0))
    loss = model(**collate(examples)).loss
    assert torch.isfinite(loss) and loss > 0


@pytest.mark.parametrize("mode", ["align", "lm", "both"])
def test_cached_encoder_outputs_give_the_same_loss_as_audio(model_and_processor, examples, mode):
    model, processor = model_and_processor
    collate = AudioPhiCollator(processor, mode, AlignmentTokenizer(processor.tokenizer, merges=0))
    live = collate(examples)
    with torch.no_grad():
        hidden, mask = model.model.encode(live["input_features"], live["input_features_mask"])
        windows = [states[real] for states, real in zip(hidden, mask, strict=True)]
        states = [windows[0], windows[1:]]
        stored = [
            {**example, "clips": [{"audio_hidden_states": kept}]}
            for example, kept in zip(examples, states, strict=True)
        ]
        batch = collate(stored)
        assert "input_features" not in batch and batch["audio_num_windows"].tolist() == [1, 2]
        if mode != "align":
            assert torch.equal(batch["input_ids"], live["input_ids"])
        torch.testing.assert_close(model(**batch).loss, model(**live).loss, atol=1e-5, rtol=1e-5)


def test_every_window_has_a_seed_of_its_own(processor):
    """The seeds of a stage's augmentation: by epoch, row, clip and window, whatever the batch."""
    readout = SimpleNamespace(learns_sounds=False)
    run = SimpleNamespace(
        processor=processor,
        align_tokenizer=None,
        recipe=SimpleNamespace(seed=0, text_case="lower", loss_on="all"),
        model=SimpleNamespace(
            model=SimpleNamespace(readout=readout, clip_tokens=None), config=SimpleNamespace(text_config=None)
        ),
    )
    collate = StageCollator(run, collate_stage())
    windows = {"audio_hidden_states": [torch.ones(8, 6)] * 2}
    examples = [cached(4, id=1, epoch=3), {**cached(4, id=2, epoch=3), "clips": [windows]}, cached(4, id=1, epoch=4)]
    seeds = collate(examples)["augment_seeds"].tolist()
    assert len(set(seeds)) == 4
    assert collate(examples[1::-1])["augment_seeds"].tolist() == [*seeds[1:3], seeds[0]]
    assert "augment_seeds" not in StageCollator(run, Stage(name="a", loss="lm", steps=1))(examples)
    run.recipe.seed = 1
    assert not set(seeds) & set(StageCollator(run, collate_stage())(examples)["augment_seeds"].tolist())


def test_a_clip_is_augmented_alike_whoever_draws_it(settings, tmp_path):
    """In batches of other clips, in other processes and in workers of theirs; anew in each epoch, and by the seed."""
    recipe = recipe_from_dict(settings({**LM, "noise": 0.1}))
    processor = build_processor(recipe)
    model = build_model(replace(recipe, alignment=None, readout=None), processor, None)
    corpus = Corpus(recipe.data.train, BadRows(tmp_path / "bad.jsonl", 0))
    stage = recipe.stages[0]
    run = SimpleNamespace(recipe=recipe, processor=processor, model=model, align_tokenizer=None)
    rows = TrainingSet(corpus, processor, None, recipe.instructions, recipe.seed)

    def changed(rank, processes, size, workers=0):
        """(epoch, row) -> what its one window of equal states becomes."""
        seconds = [row.seconds for row in corpus.rows]
        order = BatchSchedule(seconds, epochs=2, batch_size=size, rank=rank, world_size=processes, seed=size)
        collate, found = StageCollator(run, stage), {}
        for batch in DataLoader(rows, batch_sampler=order, num_workers=workers, collate_fn=collate):
            windows = len(batch["drawn"])
            states, mask = torch.arange(8.0).expand(windows, 5, 8), torch.ones(windows, 5, dtype=torch.bool)
            states = stage_augment(stage)(states, mask, batch["augment_seeds"])
            found |= dict(zip(batch["drawn"], (tuple(window.flatten().tolist()) for window in states), strict=True))
        return found

    alone = changed(0, 1, 4)
    assert len(alone) == 32 == len(set(alone.values()))
    assert {**changed(0, 2, 3, workers=2), **changed(1, 2, 3)} == alone
    recipe.seed += 1
    assert not set(changed(0, 1, 4).values()) & set(alone.values())


def collate_stage():
    return Stage(name="a", loss="lm", noise=0.1, steps=1)


def test_a_short_answer_may_count_as_much_as_a_long_one(processor, make_tiny_model, examples):
    model, _ = make_tiny_model()
    plain = AudioPhiCollator(processor, "lm")(examples)
    for power, worth in ((1.0, lambda n: 1.0), (0.5, lambda n: n**0.5)):
        batch = AudioPhiCollator(processor, "lm", length_normalization=power)(examples)
        weights = batch["label_weights"] * (batch["labels"] >= 0)
        counts = (batch["labels"] >= 0).sum(1).tolist()
        assert len(set(counts)) > 1
        assert weights.sum(1).tolist() == pytest.approx([worth(n) for n in counts])
        losses = []
        for row in range(len(examples)):
            alone = AudioPhiCollator(processor, "lm")(examples[row : row + 1])
            losses.append(model(**alone).loss.item())
        expected = sum(worth(n) * loss for n, loss in zip(counts, losses, strict=True)) / sum(map(worth, counts))
        assert model(**batch).loss.item() == pytest.approx(expected, rel=1e-4)
        assert model(**plain).loss.item() != pytest.approx(expected, rel=1e-4)


def test_descriptions_of_clips_are_words_of_the_llm(processor, examples):
    """One row per clip, in order, also where nothing is known of it; and none where nobody learns them."""
    known = [{**item, "described": [text]} for item, text in zip(examples, ["woman adult", None], strict=False)]
    labels = AudioPhiCollator(processor, "lm", describe=True)(known)["clip_labels"]
    told = [processor.tokenizer.decode([i for i in row if i >= 0]) for row in labels.tolist()]
    assert told == [" woman adult", ""]
    assert "clip_labels" not in AudioPhiCollator(processor, "lm")(known)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "ctc"}, "mode 'ctc' is not one of align, lm, both"),
        ({"mode": "align"}, "needs align_tokenizer"),
        ({"loss_on": "first"}, "loss_on 'first' is not one of all, last"),
    ],
)
def test_mistakes_are_named(processor, options, message):
    with pytest.raises(ValueError, match=message):
        AudioPhiCollator(processor, **options)


def test_an_unknown_text_case_is_refused(examples):
    with pytest.raises(ValueError, match="text case 'UPPER'"):
        item(examples[0]["clips"], "a", text_case="UPPER")


def test_mixed_kinds_of_clips_in_a_batch_are_refused(processor, examples):
    with pytest.raises(ValueError, match="clips of one batch"):
        AudioPhiCollator(processor, "lm")([examples[0], cached(4)])


def test_rows_of_a_data_set_train_with_transformers_own_trainer(make_tiny_model, audio, tmp_path):
    model, processor = make_tiny_model()
    (first, rate), second = audio
    rows = [
        {"audio": {"array": first, "sampling_rate": rate}, "text": "The QUICK, brown fox!"},
        {"audio": second, "text": "Two.", "instruction": "How many words?"},
    ]
    collate = AudioPhiCollator(processor, "lm")
    batch, alone = collate(rows), collate([rows[1]])
    known = [item([processor.encode_audio(audio[0])], "The QUICK, brown fox!"),
             item([processor.encode_audio(second)], "Two.", "How many words?", "answer")]  # fmt: skip
    known = collate(known)
    assert known.keys() == batch.keys() and all(torch.equal(batch[name], known[name]) for name in batch)
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, per_device_eval_batch_size=1, max_steps=2, report_to=[],
        remove_unused_columns=False, label_names=["labels"], disable_tqdm=True, save_strategy="no", use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows)
    assert trainer.train().training_loss > 0
    found = trainer.predict(rows[1:])
    assert found.predictions.shape == (*alone["labels"].shape, model.config.get_text_config().vocab_size)
    for row, said in (
        ({"audio": second}, "without text: it has 'audio'"),
        ({"file": "x.wav"}, "without audio and text: it has 'file'"),
        ({"audio": "gone.wav", "text": "a"}, "gone.wav"),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            collate([row])
