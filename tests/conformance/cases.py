"""The models that the conformance tests run on: two encoders x two language models x three readouts."""

import pytest
import torch

from tests.conftest import prompts

ENCODERS = {"whisper": "tiny_whisper_dir", "wavlm": "tiny_wavlm_dir"}
LLMS = {"llama": "tiny_llm_dir", "phi": "tiny_phi_dir"}
READOUTS = ("frames", "collapse", "mixed")
# Every encoder with every language model, and among them every readout, for what is slow or does not depend on it.
PAIRS = ("whisper-llama-collapse", "whisper-phi-frames", "wavlm-llama-frames", "wavlm-phi-mixed")

every_case = pytest.mark.parametrize("name", [f"{e}-{text}-{r}" for e in ENCODERS for text in LLMS for r in READOUTS])
every_pair = pytest.mark.parametrize("name", PAIRS)

TOLERANCE = 2e-4  # logits, float32; their scale is about 1
SETTINGS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def batch_of(processor, waveform, side="left"):
    """Two conversations of different length, the second one with two clips."""
    return prompts(processor, [[waveform(1.3)], [waveform(0.5, 1), waveform(0.31, 2)]], side)


def text_of(inputs):
    return {key: inputs[key] for key in ("input_ids", "attention_mask")}


def audio_of(inputs):
    return {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask", "asked")}


def expanded(model, inputs):
    """The prompt as the language model reads it (`ExpandedPrompt`), and the audio's embeddings in it."""
    audio = model.get_audio_features(**audio_of(inputs))
    return model.model.expand_prompt(**text_of(inputs), counts=audio.counts), audio.pooler_output


def labelled(processor, inputs):
    """Labels on the last 4 real positions of each row."""
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)):
        places = mask.nonzero()[-4:, 0]
        labels[row, places] = ids[places]
    assert not (labels == processor.audio_token_id).any()
    return labels


def close(one, other, atol=TOLERANCE):
    return torch.allclose(one, other, atol=atol)
