"""Clip tokens: what the language model reads of a clip as a whole, beside what the readout keeps."""

import json
import math
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from audiophi.publishing.architecture import describe_parts, parameters_by_part
from audiophi.training.build import apply_tuning
from audiophi.training.memory import Load, sizes, training_memory
from audiophi.training.prompt_room import PromptRoom
from audiophi.training.recipe import RecipeError, Stage, Tune, recipe_from_dict
from audiophi.training.stages import run_recipe
from modeling_audiophi import AudioPhiConfig, AudioPhiForConditionalGeneration
from modeling_audiophi.alignment_audiophi import NO_TARGET
from modeling_audiophi.clip_tokens import HEADS, ClipTokens, attentive_statistics
from modeling_audiophi.lengths_audiophi import length_mask
from modeling_audiophi.readouts import READOUTS
from tests.conftest import prompts
from tests.tiny_runs import ALIGN, LM, train

COUNT = 3
GENERATION = {"max_new_tokens": 6, "min_new_tokens": 6}
every_readout = pytest.mark.parametrize("readout", READOUTS)


def audio_of(inputs):
    return {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask", "asked")}


def labels_of(inputs):
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    return labels


# ---- the module


@pytest.fixture(scope="module")
def tokens():
    torch.manual_seed(0)
    return ClipTokens(12, 8, COUNT).eval()


@given(frames=st.lists(st.integers(1, 9), min_size=1, max_size=3), padding=st.integers(0, 5))
@hypothesis_settings(max_examples=50, deadline=None)
def test_padding_does_not_change_a_clips_tokens(tokens, frames, padding):
    hidden = 10 * torch.randn(len(frames), max(frames) + padding, 8)  # also where there is nothing to be heard
    together = tokens(hidden, length_mask(torch.tensor(frames), hidden.shape[1]))
    assert together.shape == (len(frames), COUNT, 12)
    for row, length in enumerate(frames):
        alone = tokens(hidden[row : row + 1, :length], torch.ones(1, length, dtype=torch.bool))
        assert torch.allclose(together[row], alone[0], atol=1e-5)


def test_statistics_are_those_of_the_attention():
    queries, keys, values = torch.randn(2, 8), torch.randn(1, 5, 8), 100 + torch.randn(1, 5, 8)
    found = attentive_statistics(queries, keys, values, torch.tensor([[True] * 4 + [False]]), HEADS)
    for query in range(2):
        for head in range(HEADS):
            part = slice(2 * head, 2 * head + 2)
            weights = (keys[0, :4, part] @ queries[query, part] / 2**0.5).softmax(0)[:, None]
            mean = (weights * values[0, :4, part]).sum(0)
            deviation = (weights * (values[0, :4, part] - mean).square()).sum(0).sqrt()
            assert torch.allclose(found[0, query, part], mean, atol=1e-4)
            assert torch.allclose(found[0, query, 8:][part], deviation, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frames", [0, 1, 7])
def test_one_frame_or_none_makes_finite_tokens_and_gradients(dtype, frames):
    module = ClipTokens(12, 8, COUNT).to(dtype)
    made = module(100 * torch.randn(1, 7, 8), length_mask(torch.tensor([frames]), 7))
    assert made.dtype == dtype and torch.isfinite(made).all()
    made.float().square().mean().backward()
    module.description_loss(module(torch.randn(1, 7, 8), length_mask(torch.tensor([frames]), 7)),
                            torch.tensor([[1, 2]]), torch.randn(9, 12, dtype=dtype)).backward()  # fmt: skip
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())


def test_a_description_is_a_bag_of_words_of_its_clip(tokens):
    """Clips without one count nothing; order and repetition do not matter; it can be learned."""
    table = torch.randn(20, 12)
    with torch.no_grad():
        tokens.start_at(table.square().mean().sqrt())
    hidden, mask = torch.randn(3, 6, 8), torch.ones(3, 6, dtype=torch.bool)
    made = tokens(hidden, mask)
    labels = torch.tensor([[4, 9, -100], [-100, -100, -100], [7, -100, -100]])
    whole = tokens.description_loss(made, labels, table)
    parts = [tokens.description_loss(made[[n]], labels[[n]], table) for n in range(3)]
    torch.testing.assert_close(whole, sum(parts))
    assert parts[1] == 0 and parts[1].requires_grad
    swapped = torch.tensor([[9, 4, 9], [-100, -100, -100], [-100, 7, 7]])
    torch.testing.assert_close(tokens.description_loss(made, swapped, table), whole)
    optimizer = torch.optim.Adam(tokens.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        tokens.description_loss(tokens(hidden, mask), labels, table).backward()
        optimizer.step()
    made = tokens.eval()(hidden, mask)
    best = tokens.words(made.flatten(0, 1), table).view(3, -1, 20).mean(1)
    assert set(best[0].topk(2).indices.tolist()) == {4, 9} and best[2].argmax() == 7


def test_under_autocast_the_statistics_stay_exact(tokens):
    hidden, mask = torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        lower = tokens(hidden, mask)
        keys, values = torch.randn(1, 50, 8), 100 + 0.01 * torch.randn(1, 50, 8)
        found = attentive_statistics(torch.randn(1, 8), keys, values, torch.ones(1, 50, dtype=torch.bool), HEADS)
    assert torch.allclose(lower.float(), tokens(hidden, mask), atol=0.1)
    assert found.dtype == torch.float32 and (found[..., 8:] < 0.03).all()  # in bfloat16 not even 0.25 could be told


# ---- in a model


@every_readout
def test_every_clip_gets_its_tokens_before_the_readouts(make_tiny_model, waveform, readout):
    """Clips of several windows (of 2 s), several clips to a prompt."""
    model, processor = make_tiny_model(readout=readout, clip_tokens=COUNT)
    inputs = prompts(processor, [[waveform(4.7), waveform(0.5, 1)], [waveform(1.2, 2)]])
    with torch.no_grad():
        audio = model.get_audio_features(**audio_of(inputs))
        assert audio.counts.tolist() == (audio.keep.sum(1) + COUNT).tolist()
        assert len(audio.pooler_output) == audio.counts.sum()
        rms = model.get_input_embeddings().weight.square().mean().sqrt()
        for row, read in enumerate(audio.pooler_output.split(audio.counts.tolist())):
            assert torch.equal(read[COUNT:], audio.embeds[row][audio.keep[row]])
            assert torch.allclose(read[:COUNT].square().mean(-1).sqrt(), rms.expand(COUNT), rtol=0.01)
            assert (read[0] - read[1]).abs().max() > 0.1 * rms
        for row, wave in enumerate([waveform(4.7), waveform(0.5, 1), waveform(1.2, 2)]):
            alone = model.get_audio_features(**audio_of(prompts(processor, [[wave]])))
            first = audio.counts[:row].sum()
            assert torch.allclose(audio.pooler_output[first : first + COUNT], alone.pooler_output[:COUNT], atol=1e-4)
        assert model.get_audio_features(**audio_of(inputs), with_readout=False).counts is None
        output = model(**inputs)
    assert torch.equal(output.audio_counts, audio.counts)
    assert output.logits.shape[:2] == inputs["input_ids"].shape


def test_cached_encoder_states_give_the_same(make_tiny_model, waveform):
    model, processor = make_tiny_model(clip_tokens=COUNT)
    inputs = prompts(processor, [[waveform(4.7)], [waveform(0.5, 1)]])
    audio = audio_of(inputs)
    with torch.no_grad():
        expected = model.get_audio_features(**audio)
        hidden, mask = model.model.encode(audio["input_features"], audio["input_features_mask"])
        windows = audio["audio_num_windows"]
        cached = {"audio_hidden_states": hidden, "audio_hidden_mask": mask, "audio_num_windows": windows}
        assert torch.equal(model.get_audio_features(**cached).pooler_output, expected.pooler_output)


def test_the_readouts_own_are_as_without(make_tiny_model, waveform):
    model, processor = make_tiny_model(readout="mixed", clip_tokens=COUNT)
    plain, _ = make_tiny_model(readout="mixed")
    missing = plain.load_state_dict(model.state_dict(), strict=False)
    assert missing.unexpected_keys and all(".clip_tokens." in key for key in missing.unexpected_keys)
    assert not missing.missing_keys and plain.model.clip_tokens is None
    audio = audio_of(prompts(processor, [[waveform(1.2)]]))
    with torch.no_grad():
        ours, theirs = model.get_audio_features(**audio), plain.get_audio_features(**audio)
    assert torch.equal(ours.pooler_output[COUNT:], theirs.pooler_output)


@every_readout
def test_a_gradient_reaches_them_and_none_without_audio_is_zero(make_tiny_model, waveform, readout):
    model, processor = make_tiny_model(readout=readout, clip_tokens=COUNT)
    inputs = prompts(processor, [[waveform(0.9)]])
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    for name, parameter in model.model.clip_tokens.named_parameters():
        if name.startswith("words."):  # of the description's loss alone
            continue
        # A bias of the keys moves all scores alike.
        assert parameter.grad is not None and (parameter.grad.any() or name == "keys.bias"), name
    model.zero_grad()
    model.train()
    text = prompts(processor, [[]], "right")
    model(**text, labels=labels_of(text)).loss.backward()
    parameters = list(model.model.clip_tokens.parameters())
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in parameters)


@pytest.mark.parametrize("slim", [True, False])
def test_they_are_saved_and_loaded(make_tiny_model, waveform, tmp_path, slim):
    model, processor = make_tiny_model(readout="collapse", clip_tokens=COUNT)
    torch.nn.init.normal_(model.model.clip_tokens.queries)
    inputs = prompts(processor, [[waveform(0.9)]])
    model.save_pretrained(tmp_path, slim=slim)
    loaded = AudioPhiForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.config.clip_tokens == COUNT
    for name, value in model.model.clip_tokens.state_dict().items():
        assert torch.equal(loaded.model.clip_tokens.state_dict()[name], value), name
    with torch.no_grad():  # weights that lie elsewhere in memory round otherwise
        assert torch.allclose(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5)


@every_readout
@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": False, "draft_tokens": 8},
        {"do_sample": False, "num_beams": 3, "ctc_weight": 0.4},
    ],
    ids=["greedy", "drafted", "beams"],
)
def test_a_batch_writes_what_its_rows_write_alone(make_tiny_model, waveform, readout, how):
    model, processor = make_tiny_model(readout=readout, clip_tokens=COUNT)
    clips = [[waveform(2.6), waveform(0.6, 2)], [waveform(0.5, 1)]]
    inputs = prompts(processor, clips)
    together = model.generate(**inputs, **GENERATION, **how)[:, inputs["input_ids"].shape[1] :]
    for row, waves in enumerate(clips):
        single = prompts(processor, [waves])
        alone = model.generate(**single, **GENERATION, **how)[0, single["input_ids"].shape[1] :]
        assert together[row].tolist() == alone.tolist()


def test_lower_precision_hears(make_tiny_model, waveform):
    model, processor = make_tiny_model(readout="collapse", clip_tokens=COUNT)
    inputs = prompts(processor, [[waveform(0.9)]])
    for dtype in (torch.bfloat16, torch.float16):
        audio = model.to(dtype).get_audio_features(**audio_of(inputs))
        assert audio.pooler_output.dtype == dtype and torch.isfinite(audio.pooler_output).all()


# ---- what is known before the encoder runs


def test_what_is_too_long_with_them_is_refused_before_the_encoder_runs(make_tiny_model, waveform, monkeypatch):
    model, processor = make_tiny_model(clip_tokens=COUNT)
    inputs = prompts(processor, [[waveform(1.0)]])
    length = inputs["input_ids"].shape[1] - 1 + int(model.model.adapter_lengths(inputs))
    assert model.model.most_counts(inputs).tolist() == (model.model.adapter_lengths(inputs) + COUNT).tolist()
    model(**inputs)
    model.config.text_config.max_position_embeddings = length + COUNT - 1
    monkeypatch.setattr(model.model.audio_tower, "forward", None)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=f"the prompt has {length + COUNT} tokens"):
            call(**inputs)


@pytest.mark.parametrize("readout", ["frames", "collapse"])
def test_the_room_in_a_prompt_and_the_memory_count_them(make_tiny_model, readout):
    found = []
    for count in (0, COUNT):
        model, processor = make_tiny_model(readout=readout, clip_tokens=count)
        room = PromptRoom(processor, model.config, {})
        stage = Stage("lm", "lm", Tune())
        apply_tuning(model, stage)
        memory = training_memory(model, stage, Load(2, 1.5))
        found.append((room.audio_tokens([16_000, 8_000]), sizes(model.config, Load(2, 1.5)).text, memory))
    (tokens, text, memory), (more_tokens, more_text, more_memory) = found
    assert more_tokens == tokens + 2 * COUNT and more_text == text + COUNT
    assert all(getattr(more_memory, part) > getattr(memory, part) for part in ("weights", "adapter", "llm"))


def test_they_are_among_a_checkpoints_parts(make_tiny_model):
    model, _ = make_tiny_model(readout="collapse", clip_tokens=COUNT)
    own = sum(parameter.numel() for parameter in model.model.clip_tokens.parameters())
    assert parameters_by_part(model.config)["clip tokens"] == own
    assert [row[1] for row in describe_parts(model.config) if row[0] == "clip tokens"][0].startswith(f"{COUNT} of each")
    plain, _ = make_tiny_model(readout="collapse")
    assert "clip tokens" not in parameters_by_part(plain.config)


# ---- building and training


def test_numbers_that_cannot_be_are_refused(make_tiny_model):
    with pytest.raises(ValueError, match="clip_tokens must be 0 or more, got -1"):
        AudioPhiConfig(clip_tokens=-1)
    with pytest.raises(ValueError, match="clip_tokens 512: the language model's context is only 512"):
        make_tiny_model(readout="collapse", clip_tokens=512)


def test_a_model_without_them_can_be_given_some(make_tiny_model, waveform, tmp_path):
    model, processor = make_tiny_model(readout="collapse")
    scale = torch.full_like(model.model.readout.proj.weight, 0.25)
    model.model.readout.proj.weight.data.copy_(scale)
    model.set_clip_tokens(0)
    assert model.model.clip_tokens is None
    model.set_clip_tokens(COUNT)
    model.eval()
    assert torch.equal(model.model.readout.proj.weight, scale), "what is trained must stay"
    rms = model.get_input_embeddings().weight.detach().square().mean().sqrt().item()
    assert model.model.clip_tokens.made[-1].weight.tolist() == pytest.approx([rms] * 32)
    with torch.no_grad():
        model.model.clip_tokens.made[-1].weight.fill_(7.0)
    model.set_clip_tokens(COUNT)
    model.set_readout("frames")
    assert model.model.clip_tokens.made[-1].weight.unique().tolist() == [7.0]
    with pytest.raises(ValueError, match=f"has {COUNT} clip tokens, which cannot become {COUNT + 1}"):
        model.set_clip_tokens(COUNT + 1)
    inputs = prompts(processor, [[waveform(0.9)]])
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        loaded = type(model).from_pretrained(tmp_path).eval()
        assert torch.allclose(loaded(**inputs).logits, expected, atol=1e-5)


def trained_parts(model):
    return {name.split(".")[1] for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_they_are_trained_as_the_readout_is(make_tiny_model):
    model, _ = make_tiny_model(readout="mixed", clip_tokens=COUNT)
    apply_tuning(model, Stage("lm", "lm", Tune(adapter="frozen", readout="full")))
    assert trained_parts(model) == {"readout", "clip_tokens"}
    apply_tuning(model, Stage("lm", "lm", Tune(readout="frozen")))
    assert not trained_parts(model) & {"readout", "clip_tokens"}
    apply_tuning(model, Stage("both", "both", Tune()))
    assert trained_parts(model) == {"multi_modal_projector", "alignment", "readout", "clip_tokens"}
    apply_tuning(model, Stage("align", "align", Tune()))
    assert trained_parts(model) == {"multi_modal_projector", "alignment", "readout", "clip_tokens"}


@every_readout
def test_the_loss_align_teaches_them_what_a_clip_is_like(make_tiny_model, waveform, readout):
    """Without the LLM; of clips of which nothing is known they learn nothing."""
    model, processor = make_tiny_model(readout=readout, clip_tokens=COUNT)
    audio = audio_of(prompts(processor, [[waveform(0.9)], [waveform(0.5, 1)]]))
    words = model.model.alignment.vocab_ids[:2].tolist()
    model.model.language_model.forward = None  # it must not run
    labels = {"align_labels": torch.full((2, 1), NO_TARGET), "clip_labels": torch.tensor([words, [-100, -100]])}
    optimizer = torch.optim.Adam(model.model.clip_tokens.parameters(), 0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        output = model(**audio, **labels)
        output.loss.backward()
        optimizer.step()
        losses.append(output.clip_loss.item())
        assert output.loss.item() == pytest.approx(losses[-1], rel=1e-5) and output.logits is None
    assert losses[-1] < 0.5 * losses[0] and losses[-1] > math.log(2) - 0.01  # two words in no order
    nothing = model(**audio, align_labels=labels["align_labels"], clip_labels=torch.full((2, 1), -100))
    assert nothing.clip_loss.item() == 0


def test_a_stage_for_them_alone(settings, speech, tmp_path):
    """What a row says of the speaker is enough; all else stays."""
    folder = tmp_path / "speakers"
    shutil.copytree(speech, folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    with open(folder / "metadata.jsonl", "w") as manifest:
        for number, row in enumerate(rows):
            print(json.dumps({"audio": row["audio"], "gender": "mf"[number % 2]}), file=manifest)
    voices = {**ALIGN, "name": "voices", "steps": 3, "tune": {"adapter": "frozen", "readout": "full"}}
    voices["data"] = [{"path": str(folder), "task": "speaker"}]
    keys = {"clip_tokens": COUNT, "logging_steps": 1}
    run_recipe(recipe_from_dict(settings({**ALIGN, "steps": 1}, voices, **keys)))
    files = [tmp_path / "out" / stage / "model" / "model.safetensors" for stage in ("align", "voices")]
    before, after = map(load_file, files)
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed and all(".clip_tokens." in name for name in changed)
    history = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    losses = [entry["clip_loss"] for entry in history if entry["stage"] == "voices" and "loss" in entry]
    assert len(losses) == 3 and min(losses) > 0
    with pytest.raises(RecipeError, match="they are frozen"):
        recipe_from_dict(settings({**ALIGN, "steps": 1}, voices))


def test_a_checkpoint_without_them_is_continued_with_them(settings, tmp_path):
    start = run_recipe(recipe_from_dict(settings(ALIGN, output_dir=str(tmp_path / "start"))))
    tune = {"adapter": "frozen", "readout": "full", "llm": "frozen"}
    more = {"readout": None, "init_from": str(start)}
    stages = ({**ALIGN, "steps": 1}, {**LM, "tune": tune, "lora": {}})
    weights = train(settings(*stages, output_dir=str(tmp_path / "with"), clip_tokens=COUNT, **more))
    names = {name for name in weights if ".clip_tokens." in name}
    assert weights["model.clip_tokens.queries"].shape[0] == COUNT and len(names) > 5
    # Null keeps what the checkpoint has; another number contradicts it.
    then = {**more, "init_from": str(tmp_path / "with" / "final")}
    again = train(settings({**LM, "steps": 1}, output_dir=str(tmp_path / "again"), **then))
    assert {name for name in again if ".clip_tokens." in name} == names
    for other in (0, COUNT + 2):
        with pytest.raises(RecipeError, match=f"clip_tokens: the model has {COUNT} clip tokens.* become {other}"):
            train(settings(LM, output_dir=str(tmp_path / str(other)), clip_tokens=other, **then))


def test_a_new_model_is_trained_with_them_beside_rows_of_text(settings, speech, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text('{"instruction": "2 + 2?", "answer": "4"}\n')
    stage = {**LM, "loss": "both", "batch_size": 2, "tune": {"adapter": "full"}, "learning_rate": 0.01, "lora": {}}
    data = {"train": [{"path": str(speech)}, {"path": str(text)}]}
    weights = train(settings(stage, clip_tokens=COUNT, data=data))
    assert weights["model.clip_tokens.made.4.bias"].abs().max() > 1e-3, "they did not learn"


def test_a_recipe_cannot_ask_for_fewer_than_none(settings):
    with pytest.raises(RecipeError, match="clip_tokens must be 0 or more"):
        recipe_from_dict(settings(ALIGN, clip_tokens=-1))
