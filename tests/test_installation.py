"""The wheel, installed where nothing of this clone can be imported."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import soundfile as sf

from audiophi import requirements
from audiophi.cli.main import main
from audiophi.publishing import template
from audiophi.publishing.template import CardError
from tests.stranger import run_stranger

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("audiophi", "modeling_audiophi", "processing")
# Of what may be installed for development, but is no dependency.
EXTRAS = ("gradio", "pytest", "hypothesis", "selenium", "bitsandbytes", "aac_metrics", "torchcodec", "piper")
# An editable installation's finder stands behind Python's own.
ALONE = f"""
import sys
from importlib.util import find_spec

sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
assert not [name for name in {PACKAGES} if find_spec(name)], "this is no other machine"
sys.modules |= dict.fromkeys({EXTRAS})  # these cannot be imported
sys.path.insert(0, {{there!r}})
"""
# As `python -m audiophi ...` does.
RUN = """
import os, runpy

sys.argv = ["audiophi", *{arguments}]
try:
    runpy.run_module("audiophi", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
ours = [module for name, module in sys.modules.items() if module and name.partition(".")[0] in {packages}]
assert len(ours) > 30 and all(module.__file__.startswith({there!r}) for module in ours if module.__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(wheel, folder that it is installed in)"""
    folder = tmp_path_factory.mktemp("installed")
    left_out = {".git", ".venv", "outputs", "cache", "data", "checkpoints", "tests", "build", "audiophi.egg-info"}

    def ignore(path, names):
        return left_out if Path(path) == ROOT else {name for name in names if name == "__pycache__"}

    shutil.copytree(ROOT, folder / "source", ignore=ignore)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    options = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *options, "--no-build-isolation", "-w", folder, folder / "source"], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", *options, "--no-compile", "--target", folder / "there", wheel], check=True)
    return wheel, folder / "there"


def run(installed, script, folder):
    """What a script prints that finds the installation alone."""
    return run_stranger(script, folder, preamble=ALONE.format(there=str(installed[1])))


def test_the_wheel_has_three_packages_and_all_of_their_files(installed):
    names = [Path(name) for name in zipfile.ZipFile(installed[0]).namelist()]
    assert {path.parts[0] for path in names if ".d" not in path.parts[0]} == {*PACKAGES}
    files = {path.relative_to(ROOT) for package in PACKAGES for path in ROOT.glob(f"{package}/**/*.py")}
    assert {path for path in names if path.suffix == ".py"} == files and len(files) > 100


def test_it_transcribes_a_file(installed, checkpoint, waveform, tmp_path, capsys):
    """The same words as from here."""
    sf.write(tmp_path / "clip.wav", waveform(0.9), 16_000)
    command = ["transcribe", str(tmp_path / "clip.wav"), "--model", checkpoint, "--max_new_tokens", "8"]
    script = RUN.format(arguments=command, packages=PACKAGES, there=str(installed[1]))
    said = run(installed, script, tmp_path / "elsewhere")
    capsys.readouterr()
    assert main(command) == 0
    assert said == capsys.readouterr().out and said.strip()


def test_import_audiophi_is_all_that_transformers_must_be_told(installed, checkpoint, tmp_path):
    """And the card's template is among what is installed."""
    script = f"""
import audiophi
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor, pipeline

for auto in (AutoModel, AutoModelForMultimodalLM):
    assert type(auto.from_pretrained({checkpoint!r})) is audiophi.AudioPhiForConditionalGeneration
assert type(AutoConfig.from_pretrained({checkpoint!r})) is audiophi.AudioPhiConfig
assert type(AutoProcessor.from_pretrained({checkpoint!r})) is audiophi.AudioPhiProcessor
assert type(pipeline("audio-text-to-text", {checkpoint!r})) is audiophi.AudioTextToTextPipeline
from modeling_audiophi.components_audiophi import CONVERTERS, FALLBACKS, SOURCES
assert CONVERTERS and FALLBACKS and SOURCES
assert all(hasattr(audiophi, name) for name in audiophi.__all__)
from audiophi.publishing.template import template_path
print(template_path())
"""
    path = Path(run(installed, script, tmp_path).split()[-1])
    assert path.is_relative_to(installed[1]) and path.read_text() == (ROOT / "model_card.md").read_text()


def test_a_template_that_is_gone_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(template, "__file__", str(tmp_path / "audiophi" / "publishing" / "template.py"))
    monkeypatch.setattr("importlib.metadata.files", lambda name: [])
    with pytest.raises(CardError, match="install the package anew"):
        template.template_path()


def test_what_is_missing_is_said_before_anything_is_imported(installed, tmp_path):
    script = """
sys.modules |= {"torch": None, "soundfile": None}
try:
    import audiophi
except ImportError as error:
    print(error)
assert "transformers" not in sys.modules
"""
    said = run(installed, script, tmp_path)
    assert said.startswith("AudioPhi needs torch, soundfile") and "pip install torch soundfile" in said


def test_an_old_transformers_is_refused(monkeypatch):
    monkeypatch.setattr(requirements, "version", lambda name: "4.57.1")
    with pytest.raises(ImportError, match="transformers 5.15 or newer, not 4.57.1"):
        requirements.check_requirements()
    for fine in ("5.15.0", "6.0.dev0", "unknown"):
        monkeypatch.setattr(requirements, "version", lambda name, fine=fine: fine)
        requirements.check_requirements()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = ".".join(map(str, requirements.TRANSFORMERS))
    assert any(line.startswith(f"transformers>={oldest},") for line in project["dependencies"])
