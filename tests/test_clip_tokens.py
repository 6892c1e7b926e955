"""Clip tokens: embeddings of a clip as a whole, before what the readout keeps of it."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from audiophi.training.recipe import RecipeError, recipe_from_dict
from audiophi.training.stages import run_recipe
from modeling_audiophi import AudioPhiForConditionalGeneration
from modeling_audiophi.clip_tokens import ClipTokens
from tests.tiny_runs import ALIGN, LM, train

ASK = [{"type": "text", "text": "What is it?"}]


def chat(*clips):
    return [{"role": "user", "content": [*({"type": "audio", "audio": (clip, 16_000)} for clip in clips), *ASK]}]


def inputs(processor, *chats):
    how = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    batch = processor.apply_chat_template(list(chats), **how, processor_kwargs={"padding_side": "left"})
    return {name: value for name, value in batch.items() if name != "asked"}


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
@hypothesis_settings(max_examples=30, deadline=None)
def test_padding_changes_nothing(lengths, seed):
    torch.manual_seed(seed)
    module = ClipTokens(12, 8, 3).eval()
    clips = [torch.randn(length, 8) for length in lengths]
    padded = torch.nn.utils.rnn.pad_sequence([*clips, torch.zeros(11, 8)], batch_first=True, padding_value=7.0)[:-1]
    mask = torch.arange(11)[None] < torch.tensor(lengths)[:, None]
    together = module(padded, mask)
    assert together.shape == (len(lengths), 3, 12)
    for clip, tokens in zip(clips, together, strict=True):
        alone = module(clip[None], torch.ones(1, len(clip), dtype=torch.bool))[0]
        torch.testing.assert_close(alone, tokens, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(module.bfloat16()(padded.bfloat16(), mask)).all()


@torch.no_grad()
@pytest.mark.parametrize("readout", ["frames", "collapse", "mixed"])
def test_a_clip_brings_its_tokens_first(make_tiny_model, waveform, readout, tmp_path):
    model, processor = make_tiny_model(readout=readout)
    model.eval()
    clips = [waveform(0.7, 1), waveform(1.9, 2), waveform(1.2, 3)]
    batch = inputs(processor, chat(clips[0], clips[1]), chat(clips[2]))
    audio = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    before = model.get_audio_features(**audio, return_dict=True)
    model.set_clip_tokens(3)
    model.eval()
    after = model.get_audio_features(**audio, return_dict=True)
    assert after.counts.tolist() == [count + 3 for count in before.counts.tolist()]
    start = old = 0
    for count in before.counts.tolist():
        words = after.pooler_output[start + 3 : start + 3 + count]
        torch.testing.assert_close(words, before.pooler_output[old : old + count])
        start, old = start + 3 + count, old + count
    wanted = model.get_input_embeddings().weight.square().mean().sqrt()
    assert after.pooler_output[:3].square().mean().sqrt() == pytest.approx(float(wanted), rel=0.2)
    model.save_pretrained(tmp_path)
    loaded = AudioPhiForConditionalGeneration.from_pretrained(tmp_path).eval()
    again = loaded.get_audio_features(**audio, return_dict=True)
    torch.testing.assert_close(again.pooler_output, after.pooler_output)
    assert not any("clip_tokens" in name for name in model.get_audio_features(**audio, with_readout=False))
    if readout == "frames":
        frames = [processor.frame_counts(len(clip)) for clip in clips]
        assert [model.config.num_audio_tokens(counts) for counts in frames] == after.counts.tolist()
    for beams in (1, 2):
        how = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
        together = model.generate(**batch, **how)[:, batch["input_ids"].shape[1] :]
        for row, one in enumerate((chat(clips[0], clips[1]), chat(clips[2]))):
            single = inputs(processor, one)
            alone = model.generate(**single, **how)[0, single["input_ids"].shape[1] :]
            assert together[row, : len(alone)].tolist() == alone.tolist()
    with pytest.raises(ValueError, match="has 3 clip tokens"):
        model.set_clip_tokens(2)


def test_a_checkpoint_without_them_learns_them(settings, tmp_path):
    stages = ({**ALIGN, "steps": 1}, LM)
    first = settings(*stages, output_dir=str(tmp_path / "first"))
    final = run_recipe(recipe_from_dict(first))
    onwards = {"init_from": str(final), "alignment": None, "readout": None, "clip_tokens": 2}
    tuned = {**LM, "tune": {"adapter": "frozen", "readout": "full", "llm": "lora"}}
    start = settings({**tuned, "steps": 1, "learning_rate": 1e-9}, output_dir=str(tmp_path / "start"), **onwards)
    learned = settings({**tuned, "learning_rate": 1e-2}, output_dir=str(tmp_path / "second"), **onwards)
    before, after = train(start), train(learned)
    name = "model.clip_tokens.values.weight"
    assert before.keys() == after.keys() and (before[name] - after[name]).abs().max() > 1e-3
    frozen = "model.multi_modal_projector.norm_out.weight"
    assert before[frozen].equal(after[frozen])
    assert json.loads((tmp_path / "second" / "final" / "config.json").read_text())["clip_tokens"] == 2
    wrong = settings(tuned, output_dir=str(tmp_path / "third"), **{**onwards, "clip_tokens": 5})
    with pytest.raises(ValueError, match="has 2 clip tokens, so it cannot have 5"):
        run_recipe(recipe_from_dict({**wrong, "init_from": str(tmp_path / "second" / "final")}))
    with pytest.raises(RecipeError, match="clip_tokens"):
        recipe_from_dict({**wrong, "clip_tokens": -1})
