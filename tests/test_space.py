"""`audiophi push --space`: the real client against a Hub on this machine, and the Space in a process of its own."""

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
import soundfile as sf
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement

from audiophi.cli.main import main
from audiophi.cli.space import APP, GRADIO_VERSION, REQUIREMENTS
from tests.loopback_hub import LoopbackHub
from tests.stranger import HIDDEN_IN_A_SPACE, preamble_hiding, run_stranger

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_writer"

# As the Space does with `python app.py`, but for the server.
RUN = """
import json, os, sys
sys.path.insert(0, "space")
import app
assert app.__file__ == os.path.abspath("space/app.py"), app.__file__
made = {}
app.gr.Blocks.launch = lambda page, **settings: made.update(page=page, **settings)
app.main([])
ask = next(fn.fn for fn in made["page"].fns.values() if fn.api_name == "ask")
steps = list(ask("clip.wav", "Transcribe the speech.", True))
assert app.SAMPLES and all(path.startswith(os.path.abspath("space/samples")) for path in app.SAMPLES)
print("FOUND" + json.dumps([made["page"].title, steps[-1]]))
"""


@pytest.fixture(scope="module")
def pushed(make_tiny_model, tiny_whisper_dir, tiny_llm_dir, waveform, tmp_path_factory):
    """(hub, its folder, what was printed, what the package hears in clip.wav): a slim checkpoint and its Space,
    pushed by two calls of the command line."""
    folder = tmp_path_factory.mktemp("space")
    with LoopbackHub({TOKEN: "acme"}) as hub:
        hub.add_folder("acme/tiny-whisper", tiny_whisper_dir)
        hub.add_folder("acme/tiny-llm", tiny_llm_dir)
        sf.write(folder / "clip.wav", waveform(0.9), 16_000)
        make = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch
from modeling_audiophi import AudioPhiForConditionalGeneration
from processing import AudioPhiProcessor
names = ("acme/tiny-whisper", "acme/tiny-llm")
processor = AudioPhiProcessor.from_components(*names)
torch.manual_seed(0)
model = AudioPhiForConditionalGeneration.from_components(
    *names, adapter={{"type": "mlp", "hidden_size": 32}}, audio_token_id=processor.audio_token_id)
processor.match_model(model.config)
processor.tasks = {{"transcribe": {{"instructions": ["Transcribe the speech."], "in_pieces": True}}}}
model.generation_config.tasks = {{"transcribe": {{}}}}
model.generation_config.max_new_tokens = 8
model.save_pretrained("made")
processor.save_pretrained("made")
from audiophi.cli.main import main
for more in ([], ["acme/other-demo"]):
    assert main(["push", "made", "acme/audio-phi", "--space", *more]) == 0
from transformers import pipeline
import json
pipe = pipeline("audio-text-to-text", model="made", device="cpu")
print("FOUND" + json.dumps(pipe("clip.wav")["generated_text"]))
"""
        said = run_stranger(make, folder, preamble="", HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
        printed, _, heard = said.rpartition("FOUND")
        yield hub, folder, printed, json.loads(heard)


def test_the_space_is_published_beside_the_model(pushed):
    hub, _, printed, _ = pushed
    for space in ("spaces/acme/audio-phi", "spaces/acme/other-demo"):
        assert f"published: {hub.url}/{space}\n" in printed
        assert hub.repositories[space].sdk == "gradio"
        assert hub.repositories[space].variables == {"AUDIOPHI_MODEL": "acme/audio-phi"}
        files = hub.files(space)
        assert files["app.py"] == APP.read_bytes() and files["requirements.txt"].decode() == REQUIREMENTS
        about = SpaceCard(files["README.md"].decode(), ignore_metadata_errors=False).data
        assert about.models == ["acme/audio-phi"] and about.app_file == "app.py" and about.sdk_version == GRADIO_VERSION
        assert about.title == "audio-phi" and about.sdk == "gradio" and len(about.short_description) <= 60
    # The variable is there before the files, whose arrival starts the Space.
    order = [path.rpartition("/")[2] for method, path in hub.requests if "/spaces/" in path and method == "POST"]
    assert order.index("variables") < order.index("main")
    assert "modeling_audiophi.py" in hub.files("acme/audio-phi")  # the model's repository is not the Space's


def test_the_space_runs_without_this_package(pushed, tmp_path):
    """From the files in the Space, the model and its code from the Hub: the same words as the package's."""
    hub, folder, _, heard = pushed
    for name, content in hub.files("spaces/acme/audio-phi").items():
        (tmp_path / "space" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / name).write_bytes(content)
    (tmp_path / "clip.wav").write_bytes((folder / "clip.wav").read_bytes())
    model = hub.repositories["spaces/acme/audio-phi"].variables
    said = run_stranger(
        RUN, tmp_path, preamble=preamble_hiding(HIDDEN_IN_A_SPACE), HF_ENDPOINT=hub.url, **model
    )  # fmt: skip
    title, (words, status, *_) = json.loads(said.rpartition("FOUND")[2])
    assert title == "AudioPhi: acme/audio-phi" and words == heard and status.startswith("Done (greedy)")
    assert len(heard) > 3


def test_requirements_are_the_projects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*REQUIREMENTS.split("\n")} - {""} <= {*project["dependencies"]}
    (demo,) = map(Requirement, project["optional-dependencies"]["demo"])
    assert demo.name == "gradio" and GRADIO_VERSION in demo.specifier
    imported = {*re.findall(r"^(?:import|from) (\w+)", APP.read_text(), re.MULTILINE)}
    ours = imported - {*sys.stdlib_module_names, "gradio", "numpy"}  # numpy comes with all of them
    assert "torch" in ours and ours <= {Requirement(line).name for line in REQUIREMENTS.split()}


def test_a_wrong_id_is_refused_before_anything_is_sent(checkpoint, monkeypatch, capsys):
    with LoopbackHub({TOKEN: "acme"}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert main(["push", checkpoint, "acme/phi", "--space", "acme/a/b"]) == 1 and hub.requests == []
    assert "acme/a/b" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["push", checkpoint, "phi", "--space"])
    assert "ORG/NAME" in capsys.readouterr().err
