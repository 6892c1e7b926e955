"""The loss distill: what the teacher reads, whose logits they are, what learns from them, and what is refused."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from audiophi.data.collator import AudioPhiCollator, training_item
from audiophi.data.example import Clip, Example, Question, content_of, in_words
from audiophi.evaluation.conditions import as_text
from audiophi.tasks import TASKS
from audiophi.training.prompt_room import PromptRoom
from audiophi.training.recipe import RecipeError, recipe_from_dict
from modeling_audiophi.distillation_audiophi import as_teacher, kl_divergence
from tests.test_clusters import TWO, launch
from tests.tiny_runs import LM, largest_difference, train

RATE = 16_000
SAID = ("the  quick brown fox", "it was the best of times")
LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.5, "target_modules": ["q_proj", "v_proj", "down_proj"]}
DISTILL = {**LM, "name": "distill", "loss": "distill"}
TEACHER = ("teacher_input_ids", "teacher_attention_mask", "teacher_labels")


def question(*transcripts, task="answer", answer="A man.", asked="Who speaks?"):
    clips = tuple(Clip(None, transcript) for transcript in transcripts)
    turns = ({"role": "user", "content": content_of(len(clips), asked)},) if task == "answer" else ()
    return Example(task, 0, "x", "data", clips, turns, (answer,))


@pytest.fixture(scope="module")
def make_item(waveform):
    def make(processor, example, seed=0):
        clips = [processor.encode_audio((waveform(1.0 + n, seed + n), RATE)) for n in range(len(example.clips))]
        return training_item(example, clips, wordings=["Write."], id=example.id)

    return make


@pytest.fixture(scope="module")
def tiny(make_tiny_model):
    """(model, processor): LoRA in the LLM, with weights that matter; only it and the adapter are trained."""
    model, processor = make_tiny_model(align=False)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    torch.manual_seed(3)
    model.add_lora("text", LORA)
    model.tune("text", "lora")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)
    return model.eval(), processor


@pytest.fixture
def items(tiny, make_item):
    """Two with a teacher, of different lengths, and one whose transcript is not known."""
    processor = tiny[1]
    examples = [question(SAID[0]), question(None), question(SAID[1], answer="Nobody that I know of.", asked="And now?")]
    return [make_item(processor, example, seed) for seed, example in enumerate(examples)]


def collated(processor, items, **options):
    return AudioPhiCollator(processor, "lm", distill=True, **options)(items)


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_teacher_reads_what_the_condition_text_reads(tiny, items, side):
    processor = tiny[1]
    batch = collated(processor, items, padding_side=side)
    for row, (said, asked, answer) in {
        0: (SAID[0], "Who speaks?", "A man."),
        2: (SAID[1], "And now?", "Nobody that I know of."),
    }.items():
        example = as_text(question(said, answer=answer, asked=asked), said, TASKS["answer"])
        chat = [*example.messages, {"role": "assistant", "content": answer}]
        read = processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"][0]
        real = batch["teacher_attention_mask"][row].bool()
        assert torch.equal(batch["teacher_input_ids"][row][real], read)
        assert f'Transcript: "{" ".join(said.split())}"' in processor.tokenizer.decode(read)
        labels, told = batch["labels"][row], batch["teacher_labels"][row]
        assert torch.equal(labels[labels != -100], told[told != -100]) and (told != -100).any()
        assert (told[~real] == -100).all()
    assert (batch["teacher_labels"][1] == -100).all() and (batch["teacher_attention_mask"][1] == 0).all()
    assert (batch["labels"][1] != -100).any()
    assert processor.audio_token_id not in batch["teacher_input_ids"]


def test_who_has_a_teacher():
    """Not where the words themselves are asked for, nothing is known or said, or nothing is heard."""

    def read(example):
        return TASKS[example.task].read(example)

    assert read(question("a")) == ("a",) and read(question("a", "")) == ("a", "")
    assert read(question(None)) is read(question("a", None)) is read(question()) is read(question("")) is None
    assert read(question("a", task="transcribe")) is read(question("", task="no_speech")) is None
    assert read(question("a", task="caption")) is None


def test_each_clip_is_replaced_where_it_stood():
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "and"}, {"type": "audio"}]},
    ]
    read = in_words(turns, ["a", ""])
    assert read[0] == turns[0]
    assert [item["text"] for item in read[1]["content"]] == ['Transcript: "a"\n', "and", 'Transcript: ""\n']
    assert [item["text"] for item in in_words(turns, ["a"])[1]["content"]] == ['Transcript: "a"\n', "and"]


def test_several_clips_and_turns(tiny, make_item):
    model, processor = tiny
    turns = (
        {"role": "user", "content": content_of(1, "One?")},
        {"role": "assistant", "content": "First."},
        {"role": "user", "content": content_of(1, "And this?")},
    )
    example = Example("answer", 0, "two", "data", (Clip(None, "red"), Clip(None, "green")), turns, ("Second.",))
    for loss_on, words in (("all", "First.<|im_end|>Second.<|im_end|>"), ("last", "Second.<|im_end|>")):
        batch = collated(processor, [make_item(processor, example)], loss_on=loss_on)
        told = batch["teacher_labels"]
        assert processor.tokenizer.decode(told[told != -100]) == words
        assert model(**batch, distill_only=True).loss > 0


def test_a_batch_without_a_teacher_trains_lm_alone(tiny, items):
    model, processor = tiny
    batch = collated(processor, items[1:2])
    assert batch["teacher_input_ids"].shape == (1, 1) and (batch["teacher_labels"] == -100).all()
    output = model(**batch)
    assert output.distill_loss == 0 and output.loss == output.lm_loss > 0
    model(**batch, distill_only=True).loss.backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    model.zero_grad()


def test_longer_than_the_context_is_left_out(tiny, items):
    processor = tiny[1]
    lengths = collated(processor, items)["teacher_attention_mask"].sum(1).tolist()
    assert lengths[0] < lengths[2]
    batch = collated(processor, items, context=lengths[0])
    assert batch["teacher_input_ids"].shape == (3, lengths[0])
    assert (batch["teacher_labels"] != -100).any(1).tolist() == [True, False, False]
    none = collated(processor, items, context=3)
    assert none["teacher_input_ids"].shape == (3, 1) and (none["teacher_labels"] == -100).all()


def test_answers_that_differ_are_named(tiny, items, monkeypatch):
    import audiophi.data.collator as module

    changed = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Another."}]
    monkeypatch.setattr(module, "in_words", lambda messages, said: changed)
    with pytest.raises(ValueError, match="row x: its answer makes other tokens"):
        collated(tiny[1], items)


def test_prompt_room_knows_what_the_teacher_reads(tiny):
    model, processor = tiny
    room = PromptRoom(processor, model.config, {})
    long = question("the quick brown fox " * 200)
    assert room.can_be_taught(question("a")) and not room.can_be_taught(question(None))
    assert room.excess(long, [RATE]) is None and not room.can_be_taught(long)
    asked = Question("first_word", ("What is the first word?",), ("Which?",), ("the",))
    made = {"task": "words", "messages": (), "questions": (asked,)}  # not asked yet
    assert room.can_be_taught(replace(question("a"), **made)) and not room.can_be_taught(replace(long, **made))


# ---- loss ------------------------------------------------------------------------------------------------------------


def test_the_teacher_is_the_plain_llm(tiny, items, tiny_llm_dir, monkeypatch):
    """Reading the same text, whatever LoRA and dropout do to the student."""
    model, processor = tiny
    plain = AutoModelForCausalLM.from_pretrained(tiny_llm_dir, dtype=torch.float32).eval()
    batch = collated(processor, items)
    seen = {}
    import modeling_audiophi.modeling_audiophi as module

    def spy(heard, read, *rest):
        seen.update(heard=heard, read=read)
        return kl_divergence(heard, read, *rest)

    monkeypatch.setattr(module, "kl_divergence", spy)
    model.train()
    output = model(**batch)
    assert all(layer.training for layer in model.model.language_model.modules())
    model.eval()
    rows = [0, 2]
    ids, mask = batch["teacher_input_ids"][rows], batch["teacher_attention_mask"][rows]
    with torch.no_grad():
        logits = plain(ids, attention_mask=mask).logits[:, :-1]
        expected = logits[batch["teacher_labels"][rows][:, 1:] != -100]
        with_lora = model(ids, attention_mask=mask).logits[:, :-1][batch["teacher_labels"][rows][:, 1:] != -100]
    torch.testing.assert_close(seen["read"], expected, atol=1e-5, rtol=1e-5)
    assert not seen["read"].requires_grad and seen["heard"].requires_grad
    assert (with_lora - expected).abs().max() > 1e-2, "LoRA does nothing"
    assert seen["heard"].shape == expected.shape and output.distill_loss > 0


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_divergence_is_torchs_own(temperature):
    heard, read = torch.randn(2, 7, 11).unbind()
    p, q = (torch.distributions.Categorical(logits=x / temperature) for x in (read, heard))
    expected = torch.distributions.kl_divergence(p, q) * temperature**2
    torch.testing.assert_close(kl_divergence(heard, read, temperature), expected.sum())
    assert kl_divergence(heard.bfloat16(), read.bfloat16()).dtype == torch.float32


def test_who_reads_what_the_teacher_reads_has_nothing_to_learn(tiny, items):
    model, processor = tiny
    batch = {name: value for name, value in collated(processor, items[:1]).items() if name in TEACHER}
    same = {name.removeprefix("teacher_"): value for name, value in batch.items()}
    assert model(**same, **batch).distill_loss > 1e-3  # LoRA
    plain = copy.deepcopy(model)
    for name, parameter in plain.named_parameters():
        if ".lora_B." in name:
            nn.init.zeros_(parameter)
    assert abs(plain(**same, **batch).distill_loss) < 1e-6


def test_only_what_is_tuned_learns(tiny, items):
    model, processor = tiny
    model.train()
    model(**collated(processor, items), distill_only=True).loss.backward()
    model.eval()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    assert any(".lora_A." in name for name in learned) and any("multi_modal_projector" in name for name in learned)
    assert all(".lora_" in name or "multi_modal_projector" in name for name in learned)


def test_parts_of_the_loss(tiny, items):
    """Rows without a teacher count for lm only; the weight is distill's; lm_loss is what it is without distill."""
    model, processor = tiny
    batch = collated(processor, items)
    both = model(**batch, distill_weight=0.5)
    torch.testing.assert_close(both.loss, both.lm_loss + 0.5 * both.distill_loss)
    alone = model(**batch, distill_only=True)
    assert alone.lm_loss is None and alone.loss == alone.distill_loss == both.distill_loss
    plain = model(**{name: value for name, value in batch.items() if name not in TEACHER})
    torch.testing.assert_close(plain.lm_loss, both.lm_loss)
    assert plain.distill_loss is None
    taught = model(**collated(processor, [items[0], items[2]]), distill_only=True)
    torch.testing.assert_close(taught.loss, alone.loss, atol=1e-5, rtol=1e-5)
    left = model(**collated(processor, items, padding_side="left"), distill_only=True)
    torch.testing.assert_close(left.loss, alone.loss, atol=1e-5, rtol=1e-5)


def test_two_micro_batches_are_one_batch(tiny, items):
    model, processor = tiny

    def gradients(batches, **options):
        model.zero_grad()
        loss = 0
        for batch in batches:
            part = model(**batch, distill_only=True, **options).loss
            part.backward()
            loss += float(part.detach())
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return loss, found

    whole = collated(processor, items)
    count = (whole["teacher_labels"] != -100).sum()
    one, expected = gradients([whole])
    batches = [collated(processor, part) for part in (items[:1], items[1:])]
    parts, found = gradients(batches, distill_items_in_batch=count)
    assert one == pytest.approx(parts, rel=1e-5)
    assert largest_difference(expected, found) < 1e-6


def test_what_the_model_refuses(tiny, items):
    model, processor = tiny
    batch = collated(processor, items)
    with pytest.raises(ValueError, match="need labels and teacher_labels"):
        model(**{name: value for name, value in batch.items() if name != "teacher_labels"})
    with pytest.raises(ValueError, match="distill_only needs"):
        model(**{name: value for name, value in batch.items() if name not in TEACHER}, distill_only=True)
    other = batch["teacher_labels"].clone()
    other[0, (other[0] != -100).nonzero()[-1]] = -100
    with pytest.raises(ValueError, match="other tokens"):
        model(**{**batch, "teacher_labels": other})


def test_the_teacher_leaves_the_modes_as_they_were(tiny):
    language_model = copy.deepcopy(tiny[0].model.language_model).train()
    language_model.layers[0].eval()
    modes = [module.training for module in language_model.modules()]
    with pytest.raises(KeyError), as_teacher(language_model):
        assert not any(module.training for module in language_model.modules()) and not torch.is_grad_enabled()
        raise KeyError
    assert [module.training for module in language_model.modules()] == modes and torch.is_grad_enabled()


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions(tmp_path_factory, waveform):
    """A manifest of eight questions about speech, two more without a transcript, and one about nothing."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for number in range(10):
        soundfile.write(folder / f"{number}.wav", waveform(0.8 + 0.1 * number, number), RATE)
        row = {"audio": f"{number}.wav", "instruction": "What is it about?", "answer": f"a fox and a bear {number % 3}"}
        rows.append({**row, "transcript": f"{SAID[number % 2]} {number}"} if number < 8 else row)
    rows.append({"instruction": "2 + 2?", "answer": "4"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def history(settings, name="out") -> list[dict]:
    lines = (Path(settings()["output_dir"]).parent / name / "history.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize("keys", [{}, {"loss": "lm", "distill_weight": 0.5}, {"loss": "both", "distill_weight": 2.0}],
                         ids=["alone", "lm", "both"])  # fmt: skip
def test_distill_is_learned(settings, questions, capsys, keys, streaming):
    stage = {**DISTILL, "steps": 30, "batch_size": 6, "learning_rate": 3e-3, "llm_learning_rate": 3e-3, **keys}
    data = {"train": [{"path": str(questions)}], "streaming": streaming}
    train(settings(stage, data=data))
    logged, printed = history(settings), capsys.readouterr().out
    assert logged[-1]["distill_loss"] < 0.7 * logged[0]["distill_loss"]
    for entry in logged:
        parts = {"lm": entry.get("lm_loss", 0), "align": entry.get("align_loss", 0)}
        total = sum(parts.values()) + keys.get("distill_weight", 1.0) * entry["distill_loss"]
        assert entry["loss"] == pytest.approx(total, rel=1e-3)
        assert ("lm_loss" in entry) == (keys != {}) and ("align_loss" in entry) == (keys.get("loss") == "both")
    assert f"distill_loss {logged[-1]['distill_loss']:.3f}" in printed
    if not streaming:
        assert f"distill: 3 rows are {'trained' if keys else 'left out'}" in printed
    if keys:
        assert f"loss {keys['loss']} + {keys['distill_weight']:g} distill" in printed


@pytest.mark.parametrize("keys", [{"loss": "distill"}, {"loss": "lm", "distill_weight": 1.0}], ids=["alone", "lm"])
def test_accumulation_changes_nothing(settings, questions, tmp_path, keys):
    """Micro-batches have different numbers of tokens, and some no teacher; every step has all rows."""
    stage = {**DISTILL, **keys, "steps": 3, "lora": {"r": 2, "dropout": 0.0}, "warmup": 0.0, "llm_learning_rate": 1e-3}
    adapter = {**settings()["adapter"], "dropout": 0.0}
    data = {"train": [{"path": str(questions)}]}
    sizes = {"a": {"batch_size": 8 + 3 * (keys["loss"] == "lm")}, "b": {"batch_size": 1, "grad_accum": 8}}
    weights = [
        train(settings({**stage, **size}, adapter=adapter, data=data, output_dir=str(tmp_path / name)))
        for name, size in sizes.items()
    ]
    losses = [[entry["distill_loss"] for entry in history(settings, name)] for name in sizes]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert largest_difference(*weights) < 3e-4


@pytest.mark.faults
@pytest.mark.parametrize("kind", TWO)
def test_two_processes_train_what_one_trains(settings, questions, tmp_path, kind):
    """Tokens that have a teacher are counted over both. With one row at a time one process often has a teacher where
    the other has none, and none waits for ever."""
    stage = {**DISTILL, "loss": "lm", "distill_weight": 1.0, "steps": 3, "warmup": 0.0, "lora": {"r": 2, "dropout": 0}}
    stage["llm_learning_rate"] = 1e-3
    keys = {"data": {"train": [{"path": str(questions)}]}, "adapter": {**settings()["adapter"], "dropout": 0.0}}
    launch(tmp_path / "two", settings({**stage, "batch_size": 1, "grad_accum": 4}, **keys), TWO[kind])
    weights = train(settings({**stage, "batch_size": 1, "grad_accum": 8}, **keys, output_dir=str(tmp_path / "one")))
    losses = [[entry["distill_loss"] for entry in history(settings, name)] for name in ("one", "two/run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert largest_difference(weights, load_file(tmp_path / "two" / "run" / "final" / "model.safetensors")) < 3e-4


def test_rows_that_teach_nothing_are_refused(settings, speech):
    for keys in ({}, {"loss": "lm", "distill_weight": 1.0}):
        with pytest.raises(RecipeError, match="distill needs questions about clips"):
            train(settings({**DISTILL, **keys}, data={"train": [{"path": str(speech)}]}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tune": {"llm": "full"}}, "weights must not move"),
        ({"loss": "lm", "distill_weight": 1.0, "tune": {"llm": "full"}}, "weights must not move"),
        ({"loss": "align", "distill_weight": 1.0, "tune": {"llm": "frozen"}}, "nothing to distill"),
        ({"distill_weight": 1.0}, "the only one"),
        ({"loss": "lm", "distill_weight": -1.0}, "0 or more"),
        ({"distill_temperature": 0.0}, "above 0"),
    ],
)
def test_contradictions_are_named(settings, keys, message):
    with pytest.raises(RecipeError, match=message):
        recipe_from_dict(settings({**DISTILL, **keys}))


def test_distill_needs_no_alignment_head(settings):
    recipe = recipe_from_dict(settings(DISTILL, readout="frames", alignment=None))
    assert recipe.stages[0].distills and not recipe.stages[0].aligns
    names = [recipe_from_dict(settings({**LM, "distill_weight": w})).stages[0].losses for w in (0.0, 0.5)]
    assert names == ["lm", "lm + 0.5 distill"]


def test_only_words_have_a_teacher_among_questions_that_are_made():
    """Who reads what is said does not know who says it, nor what is heard behind it."""
    clip = Clip({"path": "a.wav", "bytes": None}, transcript="a fox")
    example = Example(task="words", number=0, id="a", source="data", clips=(clip,))
    taught = {name for name, task in TASKS.items() if task.read(example) is not None}
    assert taught == {"answer", "words"}
