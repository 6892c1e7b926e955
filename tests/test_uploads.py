"""Uploads beside the training: a Hub that is gone and comes back."""

import pytest

from audiophi.training import uploads
from audiophi.training.recipe import RecipeError, recipe_from_dict
from audiophi.training.stages import run_recipe
from audiophi.training.uploads import HubUpload
from tests.loopback_hub import LoopbackHub
from tests.tiny_runs import ALIGN


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that `hf upload` takes for the real one; started by the test."""
    server = LoopbackHub({"hf_writer": "acme"})
    with server:
        pass  # has its port now, and does not answer
    for name, value in {
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": "hf_writer",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }.items():
        monkeypatch.setenv(name, value)
    return server


def test_an_upload_that_fails_is_tried_again(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "FIRST_PAUSE", 0.1)
    model, said = tmp_path / "final", []
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    upload = HubUpload("acme/tiny", tmp_path, said.append)
    upload.offer(model, "first")
    upload.finish()
    assert len(said) == 4 and said[-1].startswith("not uploaded")
    assert "cannot upload" in said[0] and f"by hand: hf upload acme/tiny {model} . --private" in said[0]
    assert upload.pending() == {"folder": str(model), "message": "first"}
    with hub:
        again = HubUpload("acme/tiny", tmp_path, said.append)  # as the same command would, later
        again.finish()
        assert said[-1] == f"uploaded {model} to acme/tiny" and again.pending() is None
        files = hub.files("acme/tiny")
    assert files["config.json"] == b"{}" and files["model.safetensors"] == b"weights"
    assert hub.repositories["acme/tiny"].private


def test_what_nobody_else_could_load_is_not_uploaded(settings):
    with pytest.raises(RecipeError, match="nobody else has .*tiny-whisper"):
        run_recipe(recipe_from_dict(settings(ALIGN, push_to_hub="acme/tiny")))
    with pytest.raises(RecipeError, match="not a repository's name"):
        recipe_from_dict(settings(ALIGN, push_to_hub="tiny"))
    with pytest.raises(RecipeError, match="push_stages"):
        recipe_from_dict(settings(ALIGN, push_stages=True))
