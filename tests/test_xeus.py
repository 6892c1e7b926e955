"""XEUS: equal to ESPnet's own modules, strict about checkpoints, and a component like the others.

`reference/xeus_tiny.safetensors` and `reference/xeus_keys.json` were made from ESPnet by tools/make_xeus_reference.py;
the slow test makes them again.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel
from transformers.utils import logging as transformers_logging

import get_components
from modeling_audiophi import (
    AudioPhiForConditionalGeneration,
    XeusConfig,
    XeusModel,
    convert_xeus,
    resolve_component,
)
from modeling_audiophi.convert_xeus import XeusCheckpointError, convert_checkpoint, our_name, xeus_state_dict
from modeling_audiophi.encoders import encoder_class
from modeling_audiophi.lengths_audiophi import length_mask, output_length, shortest_input
from tests.conftest import prompts

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = Path(__file__).parent / "reference"
# Renamings that releases of the checkpoint and of torch differ in.
OLD_NAMES = {"encoder.embed.0.convs.0.": "encoder.embed.0.conv."}
OLD_WEIGHT_NORM = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Reference:
    """A file of make_xeus_reference.py, and a XeusModel with its weights."""

    def __init__(self, path, **changes):
        with safe_open(path, "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}
            self.config = XeusConfig(**json.loads(file.metadata()["sizes"]), **changes)
        self.weights = {key[8:]: value for key, value in self.tensors.items() if key.startswith("weights.")}
        self.speech, self.lengths = self.tensors["speech"], self.tensors["lengths"]
        self.mask = length_mask(self.lengths, self.speech.shape[1])

    def model(self):
        model = XeusModel(self.config)
        model.load_state_dict(xeus_state_dict(self.weights, self.config), strict=True)
        return model.eval()

    def difference(self, model):
        """Largest difference from ESPnet over the output and every block, padded frames included."""
        with torch.no_grad():
            output = model(self.speech, self.mask, output_hidden_states=True)
        pairs = [(output.last_hidden_state, self.tensors["output"])]
        pairs += [(state, self.tensors[f"hidden.{i}"]) for i, state in enumerate(output.hidden_states[1:])]
        assert len(pairs) == self.config.num_hidden_layers + 1
        return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


def tiny(**changes):
    return Reference(REFERENCE / "xeus_tiny.safetensors", **changes)


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


@pytest.fixture(scope="module")
def tiny_xeus_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("xeus") / "xeus.pth"
    torch.save(tiny().weights, path)
    return convert_checkpoint(path, path.parent / "acme--xeus", tiny().config)


# ---- ESPnet


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_espnet_on_a_padded_batch(attention):
    reference = tiny(espnet_exact=True)
    model = reference.model()
    model.set_attn_implementation(attention)
    assert len(set(reference.lengths.tolist())) == 3
    assert reference.difference(model) < 1e-5
    frames = model._get_feat_extract_output_lengths(reference.lengths)
    assert torch.equal(frames, reference.tensors["output_lengths"])


def test_default_mode_equals_espnet_for_one_clip_and_not_for_a_padded_batch():
    reference, exact = tiny(), tiny(espnet_exact=True).model()
    model = reference.model()
    with torch.no_grad():
        alone = reference.speech[:1]
        assert torch.allclose(model(alone).last_hidden_state, exact(alone).last_hidden_state, atol=1e-5)
    assert reference.difference(model) > 0.1


def test_parameters_of_the_released_model():
    with torch.device("meta"):
        model = XeusModel(XeusConfig())
    count = {
        name: sum(p.numel() for key, p in model.named_parameters() if key.startswith(name))
        for name in ("frontend", "feature_projection", "")
    }
    assert count == {"frontend": 4_210_176, "feature_projection": 525_312, "": 574_121_600}


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


# ---- the model


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_lengths(lengths):
    """The rule, the mask and the frames that come out agree; nothing is NaN, not even for silence or no samples."""
    encoder = encoder_class(tiny().config)(tiny().config).eval()
    rule = encoder.length_rule(encoder.config)
    size = max(1, *lengths)
    with torch.no_grad():
        hidden, mask = encoder(torch.zeros(len(lengths), size), length_mask(torch.tensor(lengths), size))
    assert mask.sum(1).tolist() == [output_length(length, rule) for length in lengths]
    assert hidden.shape[:2] == mask.shape and torch.isfinite(hidden).all()
    assert mask.shape[1] == max(1, output_length(size, rule))


def test_released_lengths():
    rule = encoder_class(XeusConfig()).length_rule(XeusConfig())
    assert output_length(32_000, rule) == 99 and shortest_input(rule) == 400
    with pytest.raises(ValueError, match="399 samples make no frame"):
        tiny().model()(torch.zeros(1, 399))
    with pytest.raises(ValueError, match=r"\(batch, samples\), got a tensor of shape \(1, 80, 30\)"):
        tiny().model()(torch.zeros(1, 80, 30))


@pytest.mark.parametrize("layer", ["last", 0, -1, "mix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clip_does_not_depend_on_its_batch(layer, dtype):
    reference = tiny()
    encoder = encoder_class(reference.config)(reference.config, layer)
    encoder.model.load_state_dict(reference.model().state_dict())
    encoder = encoder.eval().to(dtype)
    # Garbage in the padding, and more of it than the longest clip needs.
    speech = torch.nn.functional.pad(reference.speech, (0, 777))
    mask = torch.nn.functional.pad(reference.mask, (0, 777))
    speech = speech.masked_fill(~mask, 3.0)
    with torch.no_grad():
        hidden, hidden_mask = encoder(speech, mask)
        assert hidden.dtype == dtype and torch.isfinite(hidden).all()
        for row, length in enumerate(reference.lengths.tolist()):
            expected, expected_mask = encoder(speech[row : row + 1, :length], mask[row : row + 1, :length])
            assert expected_mask.all() and int(hidden_mask[row].sum()) == expected.shape[1]
            difference = (hidden[row, : expected.shape[1]] - expected[0]).abs().max()
            assert difference < (1e-5 if dtype == torch.float32 else 0.1) * expected.abs().max()


def test_loudness_and_offset_do_not_matter():
    reference = tiny()
    model = reference.model()
    with torch.no_grad():
        expected = model(reference.speech, reference.mask).last_hidden_state
        louder = model(3 * reference.speech + 0.5, reference.mask).last_hidden_state
    frames = length_mask(model._get_feat_extract_output_lengths(reference.lengths))
    assert (expected - louder)[frames].abs().max() < 0.01


def test_bfloat16_is_close_to_float32():
    reference = tiny()
    with torch.no_grad():
        expected = reference.model()(reference.speech, reference.mask).last_hidden_state
        rough = reference.model().bfloat16()(reference.speech, reference.mask).last_hidden_state.float()
    frames = length_mask(
        output_length(reference.lengths, encoder_class(reference.config).length_rule(reference.config))
    )
    assert ((rough - expected)[frames].square().mean() / expected[frames].square().mean()).sqrt() < 0.05


def test_last_is_after_the_final_norm_and_minus_one_before():
    reference = tiny(espnet_exact=True)
    outputs = {}
    for layer in ("last", -1, 1):
        encoder = encoder_class(reference.config)(reference.config, layer)
        encoder.model.load_state_dict(reference.model().state_dict())
        with torch.no_grad():
            outputs[layer], _ = encoder.eval()(reference.speech, reference.mask)
    assert torch.allclose(outputs["last"], reference.tensors["output"], atol=1e-5)
    assert torch.allclose(outputs[-1], reference.tensors["hidden.1"], atol=1e-5)
    assert torch.allclose(outputs[1], reference.tensors["hidden.0"], atol=1e-5)
    with pytest.raises(ValueError, match="encoder_layer 3: .*3 hidden states"):
        encoder_class(reference.config)(reference.config, 3)


def test_gradient_checkpointing_changes_no_gradient():
    reference = tiny(hidden_dropout=0.0, attention_dropout=0.0)
    gradients = []
    for checkpointing in (False, True):
        model = reference.model().train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in model.layers)
        model(reference.speech, reference.mask).last_hidden_state.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


def test_new_weights_are_initialised():
    torch.manual_seed(0)
    model = XeusModel(tiny().config)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert model.layers[0].cgmlp.csgu.conv.bias.eq(1).all() and model.pos_conv.magnitude.min() > 0
    assert model(torch.randn(1, 1000)).last_hidden_state.std() > 0.1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"conv_dim": [8, 8]}, "2, 7 and 7 entries"),
        ({"num_attention_heads": 7}, "hidden_size 1024 is no multiple of num_attention_heads 7"),
        ({"merge_kernel_size": 30}, "merge_kernel_size must be odd"),
        ({"cgmlp_size": 33}, "cgmlp_size must be even"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        XeusConfig(**changes)


# ---- in AudioPhi


@pytest.mark.parametrize("readout, layer", [("frames", "last"), ("collapse", -1), ("frames", "mix")])
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


# ---- ESPnet itself


@pytest.mark.slow
def test_espnet_makes_the_reference_again_also_at_full_width(tmp_path):
    """ESPnet from PyPI, in a temporary folder; two blocks of the released width (300 MB)."""
    command = [sys.executable, str(ROOT / "tools" / "make_xeus_reference.py")]
    command += ["--output", str(tmp_path / "again"), "--full-width", str(tmp_path / "full")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(f"PyPI does not give ESPnet: {done.stderr.strip()[-300:]}")
    assert done.returncode == 0, done.stderr
    frozen, again = tiny(espnet_exact=True), Reference(tmp_path / "again" / "xeus_tiny.safetensors", espnet_exact=True)
    assert frozen.tensors.keys() == again.tensors.keys()
    assert all(torch.allclose(frozen.tensors[key], again.tensors[key], atol=1e-5) for key in frozen.tensors)
    assert json.loads((tmp_path / "again" / "xeus_keys.json").read_text()) == json.loads(
        (REFERENCE / "xeus_keys.json").read_text()
    )
    assert again.difference(again.model()) < 1e-5
    full = Reference(tmp_path / "full" / "xeus_full_width.safetensors", espnet_exact=True)
    assert full.config.hidden_size == 1024 and full.difference(full.model()) < 1e-5
