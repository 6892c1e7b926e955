"""4-bit weights, really: bitsandbytes runs on CPUs, too."""

import pytest
import torch
from transformers import BitsAndBytesConfig

from modeling_audiophi import AudioPhiForConditionalGeneration
from processing import AudioPhiProcessor
from tests.conftest import prompts
from tests.tiny_runs import ALIGN, LM, train

bnb = pytest.importorskip("bitsandbytes", reason="no bitsandbytes: pip install -e '.[qlora]'")


def linear4bit(model):
    return [name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]


def test_lora_is_trained_on_4_bit_weights(settings, tiny_whisper_dir, tiny_llm_dir, waveform, tmp_path):
    components = {"audio": tiny_whisper_dir, "text": tiny_llm_dir, "quantize_text": "4bit"}
    weights = train(settings(ALIGN, LM, components=components))
    trained = [value for name, value in weights.items() if "lora_B" in name]
    assert trained and all(value.abs().max() > 0 and torch.isfinite(value).all() for value in trained)
    assert not any("quant" in name or "absmax" in name for name in weights)
    # The checkpoint names the LLM as it was released: with full-precision weights, and with 4-bit ones.
    final, processor = tmp_path / "out" / "final", AudioPhiProcessor.from_pretrained(tmp_path / "out" / "final")
    inputs = prompts(processor, [[waveform(0.8)]])
    plain = AudioPhiForConditionalGeneration.from_pretrained(final).eval()
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    small = AudioPhiForConditionalGeneration.from_pretrained(final, quantization_config=config).eval()
    assert not linear4bit(plain) and linear4bit(small)
    assert all(name.startswith("model.language_model.layers.") for name in linear4bit(small))
    with torch.no_grad():
        full, rounded = plain(**inputs).logits, small(**inputs).logits.float()
    assert torch.isfinite(rounded).all()
    # Random tiny weights in 16 levels: alike, not equal.
    similarity = torch.nn.functional.cosine_similarity(full.flatten(), rounded.flatten(), dim=0)
    assert 0.8 < similarity < 1
    written = small.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert written.shape[1] <= inputs["input_ids"].shape[1] + 3
