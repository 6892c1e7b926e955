"""XEUS's checkpoint: every spelling of it converts, everything else is refused, and it is found and converted once.

`reference/xeus_keys.json`, names and shapes of the released tensors, was made by tools/make_xeus_reference.py.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel

import get_components
from audiophi.components import convert_xeus
from audiophi.components.convert_xeus import XeusCheckpointError, convert_checkpoint, our_name
from modeling_audiophi import (
    AudioPhiForConditionalGeneration,
    XeusConfig,
    XeusModel,
    resolve_component,
)
from tests.xeus_reference import REFERENCE, tiny

# Renamings that releases of the checkpoint and of torch differ in.
OLD_NAMES = {"encoder.embed.0.convs.0.": "encoder.embed.0.conv."}
OLD_WEIGHT_NORM = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def renamed(weights, *tables):
    for table in tables:
        for new, old in table.items():
            weights = {name.replace(new, old): value for name, value in weights.items()}
    return weights


def checkpoint_with_heads(weights):
    """What a released file holds beside the encoder."""
    heads = {
        "losses.0.decoder.weight": torch.zeros(3),
        "util_modules.x": torch.zeros(1),
        "masker.mask_emb": torch.ones(2),
    }
    return {**weights, **heads, "global_step": torch.tensor(5)}


@pytest.fixture
def tiny_release(monkeypatch):
    """Makes the tiny reference the model that the converter expects by default."""
    monkeypatch.setattr(convert_xeus, "XeusConfig", lambda: tiny().config)


def test_every_released_tensor_has_its_place():
    """The 757 names and shapes of ESPnet's modules, each against ours."""
    theirs = json.loads((REFERENCE / "xeus_keys.json").read_text())
    with torch.device("meta"):
        ours = {name: list(tensor.shape) for name, tensor in XeusModel(XeusConfig()).state_dict().items()}
    assert len(theirs) == len(ours) == 757
    assert {our_name(name): shape for name, shape in theirs.items()} == ours
    for tables in ([OLD_NAMES], [OLD_WEIGHT_NORM], [OLD_NAMES, OLD_WEIGHT_NORM]):
        old = renamed(theirs, *tables)
        assert old != theirs and {our_name(name): shape for name, shape in old.items()} == ours
    # and, written out, the names that the modules do not share with ESPnet
    assert our_name("frontend.layers.6.conv.weight") == "frontend.6.conv.weight"
    assert our_name("preencoder.linear_out.bias") == "feature_projection.bias"
    assert our_name("encoder.embed.0.convs.0.parametrizations.weight.original1") == "pos_conv.direction"
    assert theirs["encoder.embed.0.convs.0.parametrizations.weight.original1"] == [1024, 64, 128]
    assert our_name("encoder.embed.0.conv.weight_g") == "pos_conv.magnitude"
    assert our_name("encoder.encoders.18.cgmlp.csgu.conv.weight") == "layers.18.cgmlp.csgu.conv.weight"
    assert our_name("encoder.after_norm.weight") == "after_norm.weight"
    assert our_name("losses.0.decoder.weight") is None and our_name("decoder.weight") is None


# ---- the converter


@pytest.mark.parametrize("tables", [[], [OLD_NAMES], [OLD_WEIGHT_NORM], [OLD_NAMES, OLD_WEIGHT_NORM]])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_naming_converts_to_the_same_folder(tmp_path, tables, zipped):
    reference = tiny(espnet_exact=True)
    source = tmp_path / "xeus_checkpoint.pth"
    weights = checkpoint_with_heads(renamed(reference.weights, *tables))
    torch.save(weights, source, _use_new_zipfile_serialization=zipped)
    folder = convert_checkpoint(source, tmp_path / "made" / "xeus", reference.config)
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is XeusConfig and config.espnet_exact and config.model_type == "xeus"
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model) is XeusModel and not any(info.values())
    assert reference.difference(model.eval()) < 1e-5
    origin = json.loads(Path(folder, "component.json").read_text())
    assert origin["licence"] == "CC-BY-NC-SA-4.0" and origin["source"] == source.name
    extractor = json.loads(Path(folder, "preprocessor_config.json").read_text())
    assert extractor["do_normalize"] is False and extractor["return_attention_mask"] is True
    with pytest.raises(FileExistsError, match="remove it"):
        convert_checkpoint(source, folder, reference.config)


def test_what_is_not_xeus_is_said_in_one_sentence_and_leaves_nothing(tmp_path):
    reference = tiny()
    weights, good = reference.weights, tmp_path / "good.pth"
    torch.save(weights, good)
    target = tmp_path / "made" / "xeus"

    def saved(content):
        torch.save(content, tmp_path / "bad.pth")

    def written(content):
        (tmp_path / "bad.pth").write_bytes(content)

    norm, gate = "encoder.after_norm.weight", "encoder.embed.0.convs.0.parametrizations.weight.original0"
    without = {name: value for name, value in weights.items() if name != norm}
    for write, content, message in [
        (written, good.read_bytes()[:-2000], "bytes. cannot be read as a PyTorch checkpoint, it is truncated"),
        (written, good.read_bytes()[:1000], "cannot be read as a PyTorch checkpoint"),
        (written, b"", "cannot be read as a PyTorch checkpoint"),
        (written, b"version https://git-lfs.github.com/spec/v1\n", "cannot be read as a PyTorch checkpoint"),
        (saved, {**weights, "x": Hostile(tmp_path / "executed")}, "cannot be read as a PyTorch checkpoint"),
        (saved, [1, 2], "holds a list, not a dictionary"),
        (saved, without, "missing .*: after_norm.weight; unexpected: none"),
        (saved, {**weights, "decoder.weight": torch.ones(1)}, "missing .*: none; unexpected: decoder.weight"),
        (
            saved,
            {**weights, "encoder.embed.0.conv.weight_g": weights[gate]},
            "unexpected: encoder.embed.0.conv.weight_g",
        ),
        (saved, {"model": weights}, "missing .*and 106 more; unexpected: model"),
        (saved, {**weights, norm: torch.ones(3)}, r"after_norm.weight \(3,\) instead of \(16,\)"),
    ]:
        write(content)
        with pytest.raises(XeusCheckpointError, match=message) as error:
            convert_checkpoint(tmp_path / "bad.pth", target, reference.config)
        assert "bad.pth" in str(error.value) and "\n" not in str(error.value)
        assert not target.exists()
    with pytest.raises(XeusCheckpointError, match="another size than the config|is not a XEUS checkpoint"):
        convert_checkpoint(good, target)  # the tiny weights are not the released model
    assert not (tmp_path / "made").exists() and not (tmp_path / "executed").exists()


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    torch.save(tiny().weights, tmp_path / "xeus.pth")

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(convert_xeus, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        convert_checkpoint(tmp_path / "xeus.pth", tmp_path / "made" / "xeus", tiny().config)
    assert not list((tmp_path / "made").iterdir())


# ---- finding the checkpoint


@pytest.fixture
def hub(tmp_path, monkeypatch, tiny_release):
    """A Hub that has `hub.files` of espnet/xeus; `hub.asked` counts the downloads."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    class Hub:
        files, asked, online = ["model/xeus_checkpoint.pth"], [], True

    def download(repo, name, revision=None):
        Hub.asked.append((repo, name, revision))
        if not Hub.online:
            raise LocalEntryNotFoundError("no connection")
        if name not in Hub.files:
            raise EntryNotFoundError("404")
        path = tmp_path / "hub" / "0123abc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tiny().weights, path)
        return str(path)

    Hub.asked = []
    monkeypatch.setattr(convert_xeus, "hf_hub_download", download)
    monkeypatch.setenv("AUDIOPHI_COMPONENTS", str(tmp_path / "components"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return Hub


def test_the_id_is_downloaded_and_converted_once(hub, tmp_path):
    folder = resolve_component("espnet/xeus", revision="main")
    assert Path(folder) == tmp_path / "components" / "espnet--xeus"
    assert [name for _, name, _ in hub.asked] == ["model/xeus_checkpoint_new.pth", "model/xeus_checkpoint.pth"]
    assert hub.asked[0][2] == "main"
    origin = json.loads(Path(folder, "component.json").read_text())
    assert origin["id"] == "espnet/xeus" and origin["revision"] == "0123abc"
    hub.online = False
    assert resolve_component("espnet/xeus") == folder and len(hub.asked) == 2


def test_without_the_hub_it_says_what_to_do(hub, tmp_path, capsys):
    hub.online = False
    with pytest.raises(OSError, match="espnet/xeus is not on this machine.*no connection.*--file"):
        resolve_component("espnet/xeus")
    assert get_components.main(["espnet/xeus", "--root", str(tmp_path / "root")]) == 1
    torch.save(tiny().weights, tmp_path / "elsewhere.pth")
    arguments = ["espnet/xeus", "--file", str(tmp_path / "elsewhere.pth"), "--root", str(tmp_path / "components")]
    assert get_components.main(arguments) == 0
    assert resolve_component("espnet/xeus") == str(tmp_path / "components" / "espnet--xeus")
    assert get_components.main(arguments) == 1  # it is there already
    assert "remove it to convert again" in capsys.readouterr().err


def test_a_local_file_is_a_component(hub, tmp_path, tiny_llm_dir):
    file = tmp_path / "own.pth"
    torch.save(tiny().weights, file)
    model = AudioPhiForConditionalGeneration.from_components(str(file), tiny_llm_dir, "linear")
    assert model.config.base_components["audio"]["id"] == str(file)
    folder = resolve_component(str(file))
    assert folder == resolve_component(file) and Path(folder).parent == tmp_path / "components" and not hub.asked
    torch.save({**tiny().weights, "encoder.after_norm.bias": torch.ones(16)}, file)
    assert resolve_component(str(file)) != folder
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(XeusCheckpointError, match="truncated"):
        resolve_component(str(file))
