"""Phi-2's prompt, and choosing a template by name or by the LLM's family."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from processing import AudioPhiProcessor
from processing.chat_templates import CHATML, PHI, PLAIN, TEMPLATES, default_template, named_template

RATE = 16_000


@pytest.fixture
def phi_dir(tiny_llm_dir, tmp_path):
    """A folder that calls itself Phi and has no chat template, as Phi-2."""
    path = Path(shutil.copytree(tiny_llm_dir, tmp_path / "tiny-phi"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({"model_type": "phi", "vocab_size": config["vocab_size"]}))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm_dir)
    tokenizer.chat_template = None
    tokenizer.eos_token = "<|endoftext|>"
    (path / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def processor(tiny_whisper_dir, phi_dir):
    return AudioPhiProcessor.from_components(tiny_whisper_dir, phi_dir, window_frames=200)


def conversation(waveform, answer=None, **options):
    clip = {"type": "audio", "audio": waveform(0.3), "sampling_rate": RATE}
    messages = [{"role": "user", "content": [clip, {"type": "text", "text": "Transcribe the speech."}]}]
    return messages + ([{"role": "assistant", "content": answer}] if answer else [])


def encode(processor, messages, **options):
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)


def test_phi_is_chosen_for_phi_without_a_template(processor, phi_dir):
    assert processor.chat_template == PHI
    tokenizer = AutoTokenizer.from_pretrained(phi_dir)
    assert default_template(tokenizer, model_type="llama") == CHATML  # by its tokens
    tokenizer.chat_template = own = "{{ '<|im_start|>' }}"  # a fine-tuned Phi that says how it talks
    assert default_template(tokenizer, model_type="phi") == own


def test_the_prompt_is_phi_2s(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "who are you"},
        {"role": "assistant", "content": "a fox"},
        {"role": "user", "content": [{"type": "text", "text": "and "}, {"type": "text", "text": "who"}]},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "Be brief.\nInstruct: who are you\nOutput: a fox<|endoftext|>\nInstruct: and who\nOutput:"


@pytest.mark.parametrize("answer", ["the quick fox", " the quick fox"])
def test_labels_are_the_answer_and_the_end_token(processor, waveform, answer):
    batch = encode(processor, conversation(waveform, answer), return_assistant_tokens_mask=True)
    labels = batch["input_ids"][batch["assistant_masks"].bool()]
    assert processor.tokenizer.decode(labels) == " the quick fox<|endoftext|>"
    assert labels[-1] == processor.tokenizer.eos_token_id == processor.end_token_id
    prompt = encode(processor, conversation(waveform), add_generation_prompt=True)["input_ids"][0]
    assert torch.equal(batch["input_ids"][0][: len(prompt)], prompt)
    assert (prompt == processor.audio_token_id).sum() > 0


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_template_is_chosen_by_name(tiny_whisper_dir, tiny_llm_dir, name):
    processor = AudioPhiProcessor.from_components(tiny_whisper_dir, tiny_llm_dir, chat_template=name)
    assert processor.chat_template == TEMPLATES[name]
    if name != "llama3":  # its tokens are not in this vocabulary
        assert processor.end_token_id == processor.tokenizer.eos_token_id


def test_a_template_of_ones_own_and_a_name_that_does_not_exist(tiny_whisper_dir, tiny_llm_dir):
    own = "{{ messages[0].content }}"
    processor = AudioPhiProcessor.from_components(tiny_whisper_dir, tiny_llm_dir, chat_template=own)
    assert processor.chat_template == own and named_template(PLAIN, processor.tokenizer) == PLAIN
    with pytest.raises(ValueError, match=r"'fi' is neither a name \(chatml, llama3, plain, phi\) nor a Jinja"):
        AudioPhiProcessor.from_components(tiny_whisper_dir, tiny_llm_dir, chat_template="fi")


def test_the_choice_is_saved(processor, tmp_path):
    processor.save_pretrained(tmp_path / "saved")
    assert AudioPhiProcessor.from_pretrained(tmp_path / "saved").chat_template == processor.chat_template
