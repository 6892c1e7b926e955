"""The mean of two checkpoints."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_audiophi import AudioPhiForConditionalGeneration
from tools.average_checkpoints import average


def test_the_mean_of_two_checkpoints_is_a_checkpoint(make_tiny_model, tmp_path):
    model, _ = make_tiny_model()
    for name, shift in (("before", 0.0), ("after", 0.5)):
        with torch.no_grad():
            for parameter in model.model.multi_modal_projector.parameters():
                parameter += shift
        model.save_pretrained(tmp_path / name)
    weights = load_file(tmp_path / "after" / "model.safetensors")
    weights["model.of_after"] = torch.ones(3)
    save_file(weights, tmp_path / "after" / "model.safetensors", metadata={"format": "pt"})
    average(tmp_path / "before", tmp_path / "after", tmp_path / "out")
    before, out = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "out"))
    shifted = [name for name in before if "multi_modal_projector" in name and before[name].is_floating_point()]
    assert shifted and all(torch.allclose(out[name], before[name] + 0.25) for name in shifted)
    assert torch.equal(out["model.of_after"], torch.ones(3))
    del out["model.of_after"]
    save_file(out, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    AudioPhiForConditionalGeneration.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="of its own"):
        average(tmp_path / "before", tmp_path / "after", tmp_path / "after")
    with pytest.raises(FileNotFoundError, match="holds no model.safetensors"):
        average(tmp_path, tmp_path / "after", tmp_path / "other")
