"""What a saved model or processor takes along: the right files, flat, each of which stands on its own.

transformers copies the file of a class and, recursively, what it imports by `from .x import Y`; nothing else. The
model's files and the processor's lie side by side in a repository.
"""

import ast
import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_relative_import_files

from modeling_audiophi import AudioPhiForConditionalGeneration
from modeling_audiophi.configuration_audiophi import AUTO_MAP
from processing import AudioPhiProcessor
from tests.conftest import prompts
from tests.stranger import run_stranger

ROOT = Path(__file__).resolve().parents[1]
NOT_SHIPPED = {"__init__.py"}
ALLOWED = {
    "huggingface_hub",
    "numpy",
    "peft",
    "safetensors",
    "soundfile",
    "tokenizers",
    "torch",
    "torchaudio",
    "transformers",
}
OPTIONAL = {"torchcodec"}  # said what it is for when it is missing
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


def shipped_by(entry):
    return {ROOT / entry, *map(Path, get_relative_import_files(ROOT / entry))}


def shipped():
    return sorted(
        shipped_by("modeling_audiophi/modeling_audiophi.py") | shipped_by("processing/processing_audiophi.py")
    )


def test_every_file_of_the_model_ships_but_those_for_development():
    folder = ROOT / "modeling_audiophi"
    assert {path.name for path in folder.glob("*.py")} - NOT_SHIPPED == {
        path.name for path in shipped() if path.parent == folder
    }


def test_file_names_are_unique_over_the_folders():
    names = [path.name for path in shipped()]
    assert len(names) == len(set(names)) > 30 and not NOT_SHIPPED & set(names)


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.name)
def test_imports_of_a_shipped_file(path):
    """`from .x import Y` of a file beside it, or a package that the user of a checkpoint has."""
    packages = ALLOWED | OPTIONAL | sys.stdlib_module_names
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= packages, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.partition(".")[0] in packages, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            plain = node.level == 1 and node.module is not None and "." not in node.module
            assert plain and path.with_name(f"{node.module}.py").is_file(), ast.unparse(node)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("slim", [True, False])
def test_save_load_save_writes_the_same_files(make_tiny_model, tmp_path, slim):
    model, processor = make_tiny_model(readout="mixed", lora={"text": LORA})
    model.save_pretrained(tmp_path / "first", slim=slim)
    processor.save_pretrained(tmp_path / "first")
    AudioPhiForConditionalGeneration.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    AudioPhiProcessor.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    assert first.keys() == second.keys() and [name for name in first if first[name] != second[name]] == []
    assert {name for name in first if name.endswith(".py")} == {path.name for path in shipped()}
    config = json.loads(first["config.json"])
    assert config["auto_map"] == AUTO_MAP and config["slim"] is slim
    processor_config = json.loads(first["processor_config.json"])
    assert processor_config["auto_map"]["AutoProcessor"] == AUTO_MAP["AutoProcessor"]
    for entry in AUTO_MAP.values():
        module, name = entry.split(".")
        assert f"class {name}(" in first[f"{module}.py"].decode()


def test_padding_side_is_saved_before_and_after_use(make_tiny_model, waveform, tmp_path):
    """Batches that are padded on the right generate nonsense."""
    _, processor = make_tiny_model()
    processor.save_pretrained(tmp_path / "unused")
    prompts(processor, [[waveform(0.5)], [waveform(0.9)]], side="right")
    processor.save_pretrained(tmp_path / "used")
    assert contents(tmp_path / "unused") == contents(tmp_path / "used")
    assert AutoProcessor.from_pretrained(tmp_path / "used").tokenizer.padding_side == "left"


def test_classes_are_named_anew_whatever_was_loaded(make_tiny_model, tmp_path):
    """A checkpoint must not go on loading its code from the repository that its weights came from."""
    model, _ = make_tiny_model()
    model.config.auto_map = {"AutoModel": "acme/other--modeling_audiophi.AudioPhiForConditionalGeneration"}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert type(AutoModel.from_pretrained(tmp_path)) is AudioPhiForConditionalGeneration


@pytest.mark.parametrize("folder", sorted((ROOT / "checkpoints").glob("*/config.json")), ids=lambda p: p.parent.name)
def test_checkpoints_of_this_repository_have_links_to_their_code(folder):
    """`python tools/link_code.py` makes them."""
    links = {file.name: file for file in folder.parent.glob("*.py")}
    assert links.keys() == {file.name for file in shipped()}
    assert all(links[file.name].is_symlink() and links[file.name].resolve() == file for file in shipped())
    assert json.loads(folder.read_text())["auto_map"] == AUTO_MAP


def test_a_stranger_reads_a_released_checkpoint(tmp_path):
    code = """
from transformers import AutoConfig, AutoProcessor
folder = {folder!r}
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
print(type(config).__name__, type(processor).__name__, next(iter(processor.tasks)))
"""
    folder = str(ROOT / "checkpoints" / "audiophi-tiny")
    told = run_stranger(code.format(folder=folder), tmp_path).split()
    assert told[-3:] == ["AudioPhiConfig", "AudioPhiProcessor", "transcribe"]
