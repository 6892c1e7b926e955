"""XEUS in AudioPhi: a component like the others, whose licence is said."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from audiophi.components.convert_xeus import convert_checkpoint
from modeling_audiophi import AudioPhiForConditionalGeneration, XeusConfig
from tests.conftest import prompts
from tests.xeus_reference import tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tiny_xeus_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("xeus") / "xeus.pth"
    torch.save(tiny().weights, path)
    return convert_checkpoint(path, path.parent / "acme--xeus", tiny().config)


@pytest.mark.parametrize("readout, layer", [("frames", "last"), ("collapse", -1), ("frames", "mix"), ("frames", 1)])
def test_through_audiophi(make_tiny_model, tiny_xeus_dir, waveform, tmp_path, readout, layer):
    model, processor = make_tiny_model(audio=tiny_xeus_dir, readout=readout, encoder_layer=layer)
    assert model.config.base_components["audio"]["id"] == "acme/xeus"
    inputs = prompts(processor, [[waveform(0.6)], [waveform(0.35, seed=1)]])
    assert inputs["input_values"].shape == (2, 9600) and inputs["input_values_mask"].sum(1).tolist() == [9600, 5600]
    with torch.no_grad():
        logits = model(**inputs).logits
        alone = model(**prompts(processor, [[waveform(0.35, seed=1)]])).logits
        assert torch.allclose(logits[1, -1], alone[0, -1], atol=1e-3)
        assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[0] == 2
    model.save_pretrained(tmp_path / "slim")
    assert not any("audio_tower.model" in key for key in load_file(tmp_path / "slim" / "model.safetensors"))
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert config["audio_config"]["model_type"] == "xeus"
    assert type(AutoConfig.from_pretrained(tmp_path / "slim").audio_config) is XeusConfig


def test_saving_the_weights_warns_of_their_licence(make_tiny_model, tiny_xeus_dir, tmp_path, caplog):
    model, _ = make_tiny_model(audio=tiny_xeus_dir)
    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING, logger="modeling_audiophi"):
        model.save_pretrained(tmp_path / "slim")
        assert "CC-BY-NC-SA" not in caplog.text
        with pytest.raises(ValueError, match="CC-BY-NC-SA-4.0.*include_noncommercial=True"):
            model.save_pretrained(tmp_path / "full", slim=False)
        assert not (tmp_path / "full").exists()
        model.save_pretrained(tmp_path / "full", slim=False, include_noncommercial=True)
        assert "CC-BY-NC-SA-4.0" in caplog.text
        caplog.clear()
        model.tune("audio", "full")
        model.save_pretrained(tmp_path / "tuned")
        assert "CC-BY-NC-SA-4.0" in caplog.text
    loaded = AudioPhiForConditionalGeneration.from_pretrained(tmp_path / "full")
    assert torch.equal(loaded.model.audio_tower.model.pos_conv.direction, tiny().model().pos_conv.direction)


def test_remote_code_registers_the_encoder_and_meets_the_package(make_tiny_model, tiny_xeus_dir, tmp_path):
    """A full checkpoint gives the same features where the package cannot be imported, and importing the package after
    it, which registers the same model type again, is no error."""
    model, _ = make_tiny_model(audio=tiny_xeus_dir)
    model.save_pretrained(tmp_path / "remote", slim=False, include_noncommercial=True)
    speech = tiny().speech
    torch.save(speech, tmp_path / "speech.pt")
    script = f"""
import sys, torch
from transformers import AutoConfig, AutoModel
model = AutoModel.from_pretrained("remote", trust_remote_code=True)
assert "modeling_audiophi" not in sys.modules
torch.save(model.get_audio_features(input_values=torch.load("speech.pt")).pooler_output, "out.pt")
sys.path.insert(0, {str(ROOT)!r})
from modeling_audiophi import XeusConfig, XeusModel
assert type(AutoConfig.for_model("xeus")) is XeusConfig
assert type(AutoModel.from_pretrained({tiny_xeus_dir!r})) is XeusModel
"""
    env = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "/usr/bin", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=env)
    with torch.no_grad():
        expected = model.get_audio_features(input_values=speech).pooler_output
    assert torch.allclose(torch.load(tmp_path / "out.pt"), expected, atol=1e-5)
