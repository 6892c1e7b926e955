"""`audiophi export --vllm`: the files, and the calls that vLLM's Transformers backend makes on them. vLLM is not
run."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from audiophi.cli.main import main
from modeling_audiophi.configuration_audiophi import AUTO_MAP
from processing import AudioError, AudioPhiProcessor
from tests.conftest import message, prompts, random_like_trained
from tests.stranger import run_stranger

LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
CASES = ("whisper-llama", "wavlm-phi")

# What vllm/model_executor/models/transformers/{base,multimodal}.py call, on clips of different length.
AS_VLLM = """
import json, numpy, torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor

clips = list(numpy.load("clips.npz").values())
for folder, ids in json.load(open("jobs.json")).items():
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        empty = AutoModel.from_config(config, trust_remote_code=True)
    assert type(empty).__name__ == "AudioPhiModel" and type(empty).is_backend_compatible()
    tensors = load_file(f"{folder}/model.safetensors")
    assert {key for key in tensors if not key.startswith("lm_head.")} == {f"model.{key}" for key in empty.state_dict()}
    assert {f"model.{key}" for key, _ in empty.named_parameters()} >= {k for k in tensors if k[:8] != "lm_head."}
    model, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    print("INFO", type(model).__name__, sorted(info["missing_keys"]), sorted(info["unexpected_keys"]))

    # The processor, on arrays alone, and the expansion of each placeholder.
    text = " ".join([processor.audio_token] * len(clips))
    inputs = processor(text=text, audio=clips, return_tensors="pt", return_text_replacement_offsets=True)
    counts = [entry["replacement"].count(processor.audio_token) for entry in inputs.pop("text_replacement_offsets")[0]]
    inputs.pop("input_ids"), inputs.pop("attention_mask")
    assert {len(value) for value in inputs.values()} == {len(clips)}  # one row for each clip
    limit = next(getattr(config.audio_config, name) for name in
                 ("max_source_positions", "max_position_embeddings", "max_pos_emb")
                 if hasattr(config.audio_config, name))
    longest = numpy.zeros(int(processor.feature_extractor.chunk_length * processor.feature_extractor.sampling_rate))
    dummy = processor(text=processor.audio_token, audio=[longest])
    assert dummy["audio_num_windows"].tolist() == [1]
    assert int((dummy["input_ids"] == processor.audio_token_id).sum()) <= limit
    # Features of a clip by itself, its mask in a list.
    features = inputs.pop(processor.feature_key)
    embeds = []
    with torch.no_grad():
        for row in range(len(clips)):
            rest = {key: list(value)[row : row + 1] if key.endswith("_mask") else value[row : row + 1]
                    for key, value in inputs.items()}
            embeds.append(model.get_audio_features(features[row : row + 1], return_dict=True, **rest).pooler_output)
        assert [len(part) for part in embeds] == counts
        ids = torch.tensor(ids)
        inputs_embeds = model.get_input_embeddings()(ids)
        inputs_embeds[ids == config.audio_token_id] = torch.cat(embeds)
        hidden = model(input_ids=None, inputs_embeds=inputs_embeds[None], use_cache=False, return_dict=False,
                       position_ids=torch.arange(len(ids))[None], attention_instances={})[0][0, ...]
    table = tensors.get("lm_head.weight", tensors["model.language_model.embed_tokens.weight"])
    logits = torch.nn.functional.linear(hidden, table, tensors.get("lm_head.bias"))
    numpy.save(f"{folder}/logits.npy", logits.numpy())
"""


@pytest.fixture(scope="module")
def exported(make_tiny_model, folders, waveform, tmp_path_factory):
    """{case: (checkpoint folder, export, expected logits)} and what the stranger printed."""
    root, found = tmp_path_factory.mktemp("exports"), {}
    clips = [waveform(0.9), waveform(0.4, 1)]
    np.savez(root / "clips.npz", *clips)
    jobs = {}
    for name in CASES:
        audio, text = folders(name)
        model, processor = make_tiny_model("mlp", "frames", audio=audio, text=text, lora={"text": LORA})
        random_like_trained(model.model.multi_modal_projector)
        for key, value in model.named_parameters():
            if ".lora_B." in key:
                torch.nn.init.normal_(value.data, 0, 0.5)
        model.generation_config.ctc_weight = 0.3
        folder, export = root / name, root / f"{name}-vllm"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        assert main(["export", "--vllm", str(folder)]) == 0
        inputs = prompts(processor, [clips])
        with torch.no_grad():
            found[name] = folder, export, model(**inputs).logits[0]
        jobs[str(export)] = inputs["input_ids"][0].tolist()
    (root / "jobs.json").write_text(json.dumps(jobs))
    found["printed"] = run_stranger(AS_VLLM, root)
    return found


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_what_vllm_calls_gives_the_models_logits(exported):
    """In a process without this package, from the export alone: nothing is missing, nothing left over but the output
    layer, which vLLM has itself."""
    lines = [line for line in exported["printed"].splitlines() if line.startswith("INFO ")]
    assert lines[0] == "INFO AudioPhiModel [] []"
    assert lines[1] in ("INFO AudioPhiModel [] []", "INFO AudioPhiModel [] ['lm_head.bias', 'lm_head.weight']")
    for name in CASES:
        _, export, expected = exported[name]
        assert expected.std() > 0.1
        assert torch.allclose(torch.from_numpy(np.load(export / "logits.npy")), expected, atol=5e-4)


@pytest.mark.parametrize("name", CASES)
def test_files_of_an_export(exported, name):
    folder, export, _ = exported[name]
    config, before = read(export / "config.json"), read(folder / "config.json")
    assert config["auto_map"] == {**AUTO_MAP, "AutoModel": "modeling_audiophi.AudioPhiModel"}
    assert before["auto_map"] == AUTO_MAP and not config["slim"] and before["slim"]
    assert config["lora"] == {"audio": None, "text": None} and config["align_vocab_size"] == 0
    assert config["audio_config"]["max_source_positions"] > 0
    assert "ctc_weight" not in read(export / "generation_config.json")
    tensors = load_file(export / "model.safetensors")
    assert all(
        key.startswith(("model.", "lm_head.")) and "lora" not in key and ".alignment." not in key for key in tensors
    )
    processor = AudioPhiProcessor.from_pretrained(export)
    assert processor.audio_token and processor.feature_extractor.sampling_rate == processor.array_rate == 16_000
    assert AudioPhiProcessor.from_pretrained(folder).array_rate is None


def test_arrays_without_a_rate_are_refused_elsewhere(exported, waveform):
    folder, export, _ = exported["whisper-llama"]
    clip = message([waveform(0.5)])
    del clip[0]["content"][0]["sampling_rate"]
    settings = {"tokenize": True, "return_dict": True}
    assert len(AudioPhiProcessor.from_pretrained(export).apply_chat_template(clip, **settings)["input_features"]) == 1
    with pytest.raises(AudioError, match="no sampling rate"):
        AudioPhiProcessor.from_pretrained(folder).apply_chat_template(clip, **settings)


def test_what_is_said(exported, capsys, tmp_path):
    folder, _, _ = exported["whisper-llama"]
    assert main(["export", "--vllm", str(folder), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "Serving was not run" in said and "2 s at most" in said and "ctc_weight 0.3" in said
    assert main(["export", "--vllm", str(folder), "--output", str(tmp_path / "out")]) == 1
    assert "not an empty folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", str(folder)])


@pytest.mark.parametrize("readout", ["collapse", "mixed"])
def test_readouts_that_cannot_be_served_are_refused(make_tiny_model, tmp_path, capsys, readout):
    model, processor = make_tiny_model(readout=readout)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert main(["export", "--vllm", str(tmp_path / "model")]) == 1
    error = capsys.readouterr().err
    assert f"cannot serve the readout '{readout}'" in error and "`readout: frames`" in error
    assert not (tmp_path / "model-vllm").exists()
