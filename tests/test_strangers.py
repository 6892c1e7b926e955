"""Checkpoints in the hands of someone who does not have this package: trust_remote_code, in a process of its own."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Data2VecAudioConfig, UniSpeechConfig, UniSpeechSatConfig, Wav2Vec2FeatureExtractor

from modeling_audiophi import ADAPTERS, ENCODERS, AudioPhiForConditionalGeneration, XeusConfig, XeusModel
from processing import AudioPhiProcessor
from tests.conftest import WAVEFORM_SIZES, prompts, random_like_trained, save_waveform_encoder
from tests.stranger import run_stranger

FIXTURES = Path(__file__).parent / "fixtures"
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
ENCODER_FIXTURES = {
    "whisper": "tiny_whisper_dir",
    "wav2vec2": "tiny_wav2vec2_dir",
    "hubert": "tiny_hubert_dir",
    "wavlm": "tiny_wavlm_dir",
    "wav2vec2-bert": "tiny_w2v_bert_dir",
    "languagebind_audio": "tiny_languagebind_dir",
    "audio-spectrogram-transformer": "tiny_ast_dir",
    "clap": "tiny_clap_dir",
}
SAVED_HERE = {"data2vec-audio": Data2VecAudioConfig, "unispeech": UniSpeechConfig, "unispeech-sat": UniSpeechSatConfig}


def encoder_folder(name, request, tmp_path):
    if name in ENCODER_FIXTURES:
        return request.getfixturevalue(ENCODER_FIXTURES[name])
    path = tmp_path / name
    if name in SAVED_HERE:
        config = SAVED_HERE[name](feat_extract_norm="layer", do_stable_layer_norm=True, **WAVEFORM_SIZES)
        return save_waveform_encoder(path, config)
    config = XeusConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        cgmlp_size=64,
        conv_dim=[16] * 7,
    )
    random_like_trained(XeusModel(config)).save_pretrained(path)
    Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(path)
    return str(path)


# Prints {name: token ids}; writes each checkpoint again.
LOAD = """
import json, numpy
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor

clip = numpy.load("clip.npy")
found = {}
for number, (name, folder) in enumerate(json.load(open("jobs.json")).items()):
    auto = (AutoModel, AutoModelForMultimodalLM)[number % 2]
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = auto.from_pretrained(folder, trust_remote_code=True)
    assert type(config).__module__.startswith("transformers_modules."), type(config)
    messages = [{"role": "user", "content": [
        {"type": "audio", "audio": clip, "sampling_rate": 16_000}, {"type": "text", "text": "Write."}]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False, no_repeat_ngram_size=1)
    found[name] = output[0, inputs["input_ids"].shape[1] :].tolist()
    model.save_pretrained(f"again/{name}", include_noncommercial=True)
    processor.save_pretrained(f"again/{name}")
print("FOUND" + json.dumps(found))
"""


def token_ids(model, processor, clip):
    inputs = prompts(processor, [[clip]])
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False, no_repeat_ngram_size=1)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def found_by(stranger):
    return json.loads(stranger.rpartition("FOUND")[2])


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_every_encoder_and_adapter(make_tiny_model, waveform, request, tmp_path):
    """The same words as here, and saved again the same files. Slim and full ones by turns."""
    clip = waveform(0.9)
    np.save(tmp_path / "clip.npy", clip)
    adapters = sorted(ADAPTERS)
    assert len(ENCODERS) >= len(adapters)  # or some adapter would not be tried
    expected, jobs = {}, {}
    for number, name in enumerate(ENCODERS):
        adapter = adapters[number % len(adapters)]
        readout = ("frames", "collapse", "mixed")[number % 3]
        lora = {"text": LORA} if number % 2 else None
        audio = encoder_folder(name, request, tmp_path)
        model, processor = make_tiny_model(adapter, readout, audio=audio, lora=lora, seed=number)
        random_like_trained(model.model.multi_modal_projector)
        jobs[name] = str(tmp_path / "repositories" / name)
        model.save_pretrained(jobs[name], slim=number % 4 < 2, include_noncommercial=True)
        processor.save_pretrained(jobs[name])
        expected[name] = token_ids(model, processor, clip)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    assert found_by(run_stranger(LOAD, tmp_path)) == expected
    for name, folder in jobs.items():
        first, again = contents(folder), contents(tmp_path / "again" / name)
        assert first.keys() == again.keys(), name
        assert [file for file in first if first[file] != again[file]] == [], name


# ---- the repository that must load forever


@pytest.fixture(scope="module")
def frozen():
    return json.loads((FIXTURES / "hub_repo_v1.json").read_text())


def test_frozen_repository_with_its_own_code(frozen, waveform, tmp_path):
    """Made by tools/make_hub_fixture.py; never to be made again under the same name."""
    np.save(tmp_path / "clip.npy", waveform(frozen["seconds"]))
    (tmp_path / "jobs.json").write_text(json.dumps({"v1": str(FIXTURES / "hub_repo_v1")}))
    components = str(FIXTURES / "hub_repo_v1_components")
    assert found_by(run_stranger(LOAD, tmp_path, AUDIOPHI_COMPONENTS=components)) == {"v1": frozen["ids"]}


def test_frozen_repository_with_the_package(frozen, waveform, monkeypatch):
    """Weights and config of then, code of now."""
    monkeypatch.setitem(os.environ, "AUDIOPHI_COMPONENTS", str(FIXTURES / "hub_repo_v1_components"))
    model = AudioPhiForConditionalGeneration.from_pretrained(FIXTURES / "hub_repo_v1").eval()
    processor = AudioPhiProcessor.from_pretrained(FIXTURES / "hub_repo_v1")
    clip = waveform(frozen["seconds"])
    assert token_ids(model, processor, clip) == frozen["ids"]
    with torch.no_grad():
        logits = model(**prompts(processor, [[clip]])).logits[0, -1]
    assert torch.allclose(logits[:8], torch.tensor(frozen["logits"]), atol=1e-3)


def test_frozen_repository_is_small():
    files = [path for path in FIXTURES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_000_000
