"""4-bit weights, really: bitsandbytes runs on CPUs, too."""

import pytest
import torch
from transformers import BitsAndBytesConfig

from audiophi.training import build, stages
from audiophi.training.recipe import RecipeError
from audiophi.training.trainer import AudioPhiTrainer
from modeling_audiophi import AudioPhiForConditionalGeneration
from processing import AudioPhiProcessor
from tests.conftest import prompts, save_llama
from tests.tiny_runs import ALIGN, LM, largest_difference, train

bnb = pytest.importorskip("bitsandbytes", reason="no bitsandbytes: pip install -e '.[qlora]'")


def linear4bit(model):
    return [name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]


NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def even_llm_dir(tmp_path_factory):
    """64 wide: the smallest that fits 4 bits on every CPU."""
    return save_llama(tmp_path_factory.mktemp("even-llm"), hidden_size=64, intermediate_size=128, head_dim=16)


def test_lora_is_trained_on_4_bit_weights(settings, tiny_whisper_dir, even_llm_dir, waveform, tmp_path):
    components = {"audio": tiny_whisper_dir, "text": even_llm_dir, "quantize_text": "4bit"}
    weights = train(settings(ALIGN, LM, components=components))
    trained = [value for name, value in weights.items() if "lora_B" in name]
    assert trained and all(value.abs().max() > 0 and torch.isfinite(value).all() for value in trained)
    assert not any("quant" in name or "absmax" in name for name in weights)
    # The checkpoint names the LLM as it was released: with full-precision weights, and with 4-bit ones.
    final, processor = tmp_path / "out" / "final", AudioPhiProcessor.from_pretrained(tmp_path / "out" / "final")
    inputs = prompts(processor, [[waveform(0.8)]])
    plain = AudioPhiForConditionalGeneration.from_pretrained(final).eval()
    small = AudioPhiForConditionalGeneration.from_pretrained(final, quantization_config=NF4).eval()
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


def test_matrices_of_odd_size_keep_their_precision(settings, tiny_whisper_dir, tmp_path, waveform):
    """Inputs of 64 fit, those of the MLP's 72 do not: trained, saved and read on, whatever the CPU."""
    text = save_llama(tmp_path / "odd-llm", hidden_size=64, intermediate_size=72, head_dim=16)
    train(settings(ALIGN, LM, components={"audio": tiny_whisper_dir, "text": text, "quantize_text": "4bit"}))
    final, processor = tmp_path / "out" / "final", AudioPhiProcessor.from_pretrained(tmp_path / "out" / "final")
    small = AudioPhiForConditionalGeneration.from_pretrained(final, quantization_config=NF4).eval()
    names = linear4bit(small)
    assert any("q_proj" in name for name in names) and not any("_proj" in n and ".mlp." in n for n in names)
    inputs = prompts(processor, [[waveform(0.8)]])
    with torch.no_grad():
        assert torch.isfinite(small(**inputs).logits.float()).all()


def test_a_run_that_is_taken_up_is_quantised_as_before(settings, tiny_whisper_dir, even_llm_dir, tmp_path, monkeypatch):
    """A stage that trains LoRA, then another one, in one go and in two runs."""
    components = {"audio": tiny_whisper_dir, "text": even_llm_dir, "quantize_text": "4bit"}
    generation = {"transcribe": {"num_beams": 2}}
    keys, more = {"components": components, "generation": generation}, {**LM, "name": "more"}
    in_one_go = train(settings(LM, more, output_dir=str(tmp_path / "one"), **keys))
    train(settings(LM, output_dir=str(tmp_path / "two"), **keys))
    trained, finish_stage = [], stages.finish_stage
    monkeypatch.setattr(
        stages, "finish_stage", lambda run, *rest: trained.append(run.model) or finish_stage(run, *rest)
    )
    in_two = train(settings(LM, more, output_dir=str(tmp_path / "two"), **keys))
    assert len(trained) == 1 and len(linear4bit(trained[0])) == 14 and trained[0].config.lora["text"]
    assert not any(".lora_" in name for name in linear4bit(trained[0]))
    assert trained[0].generation_config.tasks["transcribe"]["num_beams"] == 2
    assert largest_difference(in_one_go, in_two) == 0


def test_an_llm_without_a_fitting_matrix_is_refused(settings, make_tiny_model, tiny_whisper_dir, tmp_path):
    text = save_llama(tmp_path / "odd-llm", intermediate_size=48)
    components = {"audio": tiny_whisper_dir, "text": text, "quantize_text": "4bit"}
    with pytest.raises(RecipeError, match="quantize_text.*multiples of 64.*32 x 32"):
        train(settings(ALIGN, LM, components=components))
    with pytest.raises(ValueError, match="multiples of 64.*32 x 32"):
        make_tiny_model(text=text)[0].save_pretrained(tmp_path / "model")
        AudioPhiForConditionalGeneration.from_pretrained(tmp_path / "model", quantization_config=NF4)


def test_the_optimiser_may_be_bitsandbytes(settings, tmp_path, monkeypatch):
    """Parameters as small as these keep 32-bit states, so it learns the same."""
    stage = {**LM, "tune": {"adapter": "frozen", "llm": "lora"}, "steps": 2}
    plain = train(settings(stage, output_dir=str(tmp_path / "plain")))
    used, create = [], AudioPhiTrainer.create_optimizer
    monkeypatch.setattr(
        AudioPhiTrainer, "create_optimizer", lambda self, *rest: used.append(create(self, *rest)) or used[-1]
    )
    small = train(settings({**stage, "optimizer": "adamw_8bit"}, output_dir=str(tmp_path / "small")))
    assert isinstance(used[0], bnb.optim.AdamW) and used[0].args.optim_bits == 8
    assert largest_difference(plain, small) < 1e-5
    monkeypatch.setattr(build, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(RecipeError, match="stages.0.optimizer: adamw_8bit needs bitsandbytes"):
        train(settings({**stage, "optimizer": "adamw_8bit"}, output_dir=str(tmp_path / "none")))
