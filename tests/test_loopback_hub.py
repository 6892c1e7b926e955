"""The real clients of huggingface_hub and transformers against a Hub on this machine: push, be interrupted, load."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from tests.loopback_hub import LoopbackHub
from tests.stranger import run_stranger

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_writer"

PUBLISH = """
import json, numpy, torch
from transformers import TrainingArguments
from modeling_audiophi import AudioPhiForConditionalGeneration
from processing import AudioPhiProcessor
from audiophi.training.recipe import Stage
from audiophi.training.trainer import AudioPhiTrainer

names = ("acme/tiny-whisper", "acme/tiny-llm")
processor = AudioPhiProcessor.from_components(*names)
torch.manual_seed(0)
model = AudioPhiForConditionalGeneration.from_components(
    *names, adapter={"type": "mlp", "hidden_size": 32}, audio_token_id=processor.audio_token_id,
    lora={"text": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}}).eval()
with torch.no_grad():
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.normal_(0, 0.3)
processor.match_model(model.config)

push = dict(private=True, max_shard_size="8KB")
try:
    model.push_to_hub("acme/audio-phi", **push)
    raise SystemExit("the interrupted upload did not fail")
except RuntimeError as error:
    assert "Error while uploading" in str(error), error
model.push_to_hub("acme/audio-phi", **push)
processor.push_to_hub("acme/audio-phi")
arguments = TrainingArguments("run", hub_model_id="acme/trained", report_to=[], use_cpu=True)
stage = Stage(name="lm", loss="lm", steps=1, batch_size=1)
AudioPhiTrainer(model=model, args=arguments, stage=stage, processor=processor).push_to_hub()
"""

# Prints {"ids": …, "components": …} of what repository REPO says about a clip.
USE = """
import json, os, numpy
from transformers import AutoConfig, AutoModel, AutoProcessor

def hear(repository, **access):
    config = AutoConfig.from_pretrained(repository, trust_remote_code=True, **access)
    processor = AutoProcessor.from_pretrained(repository, trust_remote_code=True, **access)
    model = AutoModel.from_pretrained(repository, trust_remote_code=True, **access)
    messages = [{"role": "user", "content": [
        {"type": "audio", "audio": numpy.load("clip.npy"), "sampling_rate": 16_000}, {"type": "text", "text": "Go."}]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False, no_repeat_ngram_size=1)
    return output[0, inputs["input_ids"].shape[1] :].tolist()
"""
REFUSED_WITHOUT_TOKEN = """
for auto in (AutoConfig, AutoProcessor, AutoModel):
    try:
        auto.from_pretrained("acme/audio-phi", trust_remote_code=True)
        raise SystemExit("a private repository was given to a stranger")
    except OSError as error:
        assert "acme/audio-phi" in str(error), error
"""
HEAR_BOTH = """
print("FOUND" + json.dumps([hear("acme/audio-phi", token="hf_writer"), hear("acme/trained")]))
"""
HERE = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"


GET = """
import os, sys, torch
from pathlib import Path
sys.path.insert(0, os.path.join(sys.path[0], "tools"))
import get_components
from modeling_audiophi import AudioPhiForConditionalGeneration, resolve_component

def files(folder):
    paths = (path.relative_to(folder).as_posix() for path in Path(folder).rglob("*.*"))
    return sorted(path for path in paths if not path.startswith(".cache"))

found = [files(resolve_component("acme/old-audio")), files(resolve_component("acme/old-text"))]
model = AudioPhiForConditionalGeneration.from_components(
    "acme/old-audio", "acme/old-text", adapter={"type": "mlp", "hidden_size": 32}, audio_token_id=5)
found += [float(sum(p.double().sum() for p in part.parameters()))
          for part in (model.model.audio_tower, model.model.language_model)]
if os.environ["HF_HUB_OFFLINE"] == "0":
    found += [files(get_components.component_from_hub("acme/old-text", Path("components")))]
    resolve_component("acme/both")
print("FOUND" + json.dumps(found))
"""


def found_by(stranger):
    return json.loads(stranger.rpartition("FOUND")[2])


def test_pickled_weights_become_safetensors_and_nothing_comes_twice(tiny_wavlm_dir, tiny_llm_dir, tmp_path):
    """What old repositories hold: pytorch_model.bin alone (whole, or in shards), beside files for other libraries."""
    audio, text = tmp_path / "audio", tmp_path / "text"
    weights = {}
    for folder, source in ((audio, tiny_wavlm_dir), (text, tiny_llm_dir)):
        shutil.copytree(source, folder)
        weights[folder] = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        (folder / "onnx").mkdir()
        for name in ("flax_model.msgpack", "tf_model.h5", "onnx/model.onnx", "model.fp32-00001-of-00001.safetensors"):
            (folder / name).write_bytes(b"no weights")
    torch.save(weights[audio], audio / "pytorch_model.bin")
    names = sorted(weights[text])
    shards = {f"pytorch_model-0000{i}-of-00002.bin": names[i - 1 :: 2] for i in (1, 2)}
    for file, keys in shards.items():
        torch.save({key: weights[text][key] for key in keys}, text / file)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (text / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    both = shutil.copytree(audio, tmp_path / "both")
    shutil.copy(Path(tiny_wavlm_dir, "model.safetensors"), both)
    with LoopbackHub({TOKEN: "acme"}) as hub:
        hub.add_folder("acme/old-audio", audio)
        hub.add_folder("acme/old-text", text)
        hub.add_folder("acme/both", both)
        settings = {"preamble": HERE + "import json\n", "HF_ENDPOINT": hub.url}
        first = found_by(run_stranger(GET, tmp_path / "a", HF_HUB_OFFLINE="0", **settings))
        asked = {path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert not {name for name in asked if name.endswith((".msgpack", ".h5", ".onnx")) or "fp32" in name}
    # Where there are safetensors the pickled copy is not asked for.
    weights_of_both = {path.rpartition("/")[2] for _, path in hub.requests if "acme/both/resolve" in path}
    assert "model.safetensors" in weights_of_both and "pytorch_model.bin" not in weights_of_both
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert "model.safetensors" in first[0] and set(shards) <= set(first[1]) & set(first[4])
    assert not [name for part in (0, 1, 4) for name in first[part] if name.endswith(".bin") or "partial" in name]
    for part, folder in ((2, audio), (3, text)):
        total = float(sum(value.double().sum() for value in weights[folder].values()))
        assert first[part] == pytest.approx(total, rel=1e-6)
    assert found_by(run_stranger(GET, tmp_path / "a", HF_HUB_OFFLINE="1", **settings)) == first[:4]


def test_push_and_load(tiny_whisper_dir, tiny_llm_dir, waveform, tmp_path):
    """Interrupted and resumed upload of shards, a private repository, the Trainer's; a clean cache, then offline."""
    stranger = tmp_path / "stranger"
    for folder in (tmp_path / "publisher", stranger):
        folder.mkdir()
        np.save(folder / "clip.npy", waveform(0.9))
    with LoopbackHub({TOKEN: "acme"}) as hub:
        commits = {
            "audio": hub.add_folder("acme/tiny-whisper", tiny_whisper_dir),
            "text": hub.add_folder("acme/tiny-llm", tiny_llm_dir),
        }
        hub.accept_uploads, hub.refuse_uploads = 1, 1
        expected = found_by(
            run_stranger(
                PUBLISH + USE + 'print("FOUND" + json.dumps([hear("acme/trained")]))',
                tmp_path / "publisher",
                preamble=HERE,
                HF_ENDPOINT=hub.url,
                HF_TOKEN=TOKEN,
            )
        )
        puts = [path for method, path in hub.requests if method == "PUT"]
        assert len(puts) == len(hub.uploads) + 1 and len(set(hub.uploads)) == len(hub.uploads)  # none twice
        files = hub.files("acme/audio-phi")
        shards = [name for name in files if name.endswith(".safetensors")]
        assert len(shards) > 1 and "model.safetensors.index.json" in files
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
        bases = json.loads(files["config.json"])["base_components"]
        assert {part: base["revision"] for part, base in bases.items()} == commits
        assert {part: base["id"] for part, base in bases.items()} == {
            "audio": "acme/tiny-whisper",
            "text": "acme/tiny-llm",
        }
        trained = hub.files("acme/trained")
        assert {"model.safetensors", "modeling_audiophi.py", "processing_audiophi.py", "tokenizer.json"} <= set(trained)
        assert b'model="acme/trained"' in trained["README.md"] and commits["audio"].encode() in trained["README.md"]
        # The base components move on; what was pushed goes on with the commits that it was made of.
        hub.repositories["acme/tiny-llm"].commit({"model.safetensors": None, "config.json": None})
        script = USE + REFUSED_WITHOUT_TOKEN + HEAR_BOTH
        assert found_by(run_stranger(script, stranger, HF_ENDPOINT=hub.url)) == expected * 2
    offline = run_stranger(USE + HEAR_BOTH, stranger, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert found_by(offline) == expected * 2


TRANSCRIBE = """
from transformers import AutoModel, AutoProcessor
processor = AutoProcessor.from_pretrained("acme/audiophi-tiny", trust_remote_code=True)
model = AutoModel.from_pretrained("acme/audiophi-tiny", trust_remote_code=True, dtype="float32").eval()
messages = [{"role": "user", "content": [
    {"type": "audio", "path": CLIP}, {"type": "text", "text": "Transcribe the speech."}]}]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
output = model.generate(**inputs, max_new_tokens=100, do_sample=False)
text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
import json
print("FOUND" + json.dumps(text))
"""


@pytest.fixture
def speech_file(tmp_path):
    """A recording of LibriSpeech where there is one ($LIBRISPEECH, or beside the repository), else one of ours."""
    beside = ROOT.parent / "shared" / "data" / "librispeech_devclean_12spk" / "dev-clean"
    folder = Path(os.environ.get("LIBRISPEECH", beside)).resolve()
    clips = (path for path in folder.rglob("*") if path.suffix in (".flac", ".mp3", ".ogg", ".wav"))
    if (clip := min(clips, default=None)) is not None:
        return str(clip)
    table = pyarrow.parquet.read_table(ROOT / "data" / "synthetic_speech" / "dev-00000.parquet")
    (tmp_path / "speech.ogg").write_bytes(table["audio"][0].as_py()["bytes"])
    return str(tmp_path / "speech.ogg")


@pytest.mark.slow
def test_a_stranger_transcribes_real_speech_as_the_package_does(tmp_path, speech_file):
    from modeling_audiophi import resolve_component

    names = ("openai/whisper-base", "HuggingFaceTB/SmolLM2-135M-Instruct")
    try:
        folders = {name: resolve_component(name) for name in names}
    except OSError as error:
        pytest.skip(f"no real components: {error}")
    transcribe = f"CLIP = {speech_file!r}\n" + TRANSCRIBE
    publish = f"""
from modeling_audiophi import AudioPhiForConditionalGeneration
from processing import AudioPhiProcessor
AudioPhiForConditionalGeneration.from_pretrained({str(ROOT / "checkpoints" / "audiophi-tiny")!r}).push_to_hub(
    "acme/audiophi-tiny")
AudioPhiProcessor.from_pretrained({str(ROOT / "checkpoints" / "audiophi-tiny")!r}).push_to_hub("acme/audiophi-tiny")
"""
    with LoopbackHub({TOKEN: "acme"}) as hub:
        for name, folder in folders.items():
            hub.add_folder(name, folder)
        settings = {"HF_ENDPOINT": hub.url}
        # The package's classes, with the package's code, from the folder in this repository.
        here = HERE + "import modeling_audiophi\n"
        package = transcribe.replace('"acme/audiophi-tiny"', repr(str(ROOT / "checkpoints" / "audiophi-tiny")))
        expected = found_by(run_stranger(publish + package, tmp_path / "a", preamble=here, HF_TOKEN=TOKEN, **settings))
        assert len(expected.split()) > 5
        assert found_by(run_stranger(transcribe, tmp_path / "b", **settings)) == expected
        # Float32, as the model is loaded; the base components alone would be several times as much.
        assert sum(len(data) for data in hub.files("acme/audiophi-tiny").values()) < 100_000_000
