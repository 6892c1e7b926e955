"""A Space that shows a published model: `audiophi/app.py`, which needs no other file of AudioPhi, its sample clips, and
what the Hub must know to run it."""

from pathlib import Path

APP = Path(__file__).resolve().parents[1] / "app.py"
GRADIO_VERSION = "6.31.0"
PYTHON_VERSION = "3.12"  # the Hub's default is older than what AudioPhi needs
# As in pyproject.toml: of the project's dependencies those that a published model and app.py import.
REQUIREMENTS = """\
torch>=2.7,<2.15
torchaudio>=2.7
transformers>=5.15,<6
accelerate>=1.10
peft>=0.18
soundfile>=0.13
safetensors>=0.5
matplotlib>=3.9
"""
TEXT = """
Demo of `{model}`, a small language model that listens. `app.py` takes the model from the
variable `AUDIOPHI_MODEL` in this Space's settings.
"""


def space_files(model: str) -> dict[str, bytes]:
    """path in the Space -> content, for the model with this id on the Hub. OSError where app.py is missing."""
    from huggingface_hub import SpaceCardData

    about = SpaceCardData(
        title=model.rpartition("/")[2], sdk="gradio", sdk_version=GRADIO_VERSION, python_version=PYTHON_VERSION,
        app_file=APP.name, models=[model], short_description="A small language model that listens",
    )  # fmt: skip
    readme = f"---\n{about.to_yaml()}\n---\n{TEXT.format(model=model)}"
    samples = {f"samples/{file.name}": file.read_bytes() for file in sorted(APP.parent.glob("samples/*.ogg"))}
    made = {"README.md": readme.encode(), "requirements.txt": REQUIREMENTS.encode()}
    return {**made, APP.name: APP.read_bytes(), **samples}


def publish_space(model: str, space: str, private: bool = False) -> str:
    """Create or update Space `space` for `model`, both Hub ids → its URL."""
    from huggingface_hub import CommitOperationAdd, HfApi

    files, api = space_files(model), HfApi()
    url = api.create_repo(space, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True)
    # Before the files, whose arrival starts the Space.
    api.add_space_variable(space, "AUDIOPHI_MODEL", model, description="Hub id of the model that is shown")
    added = [CommitOperationAdd(path, content) for path, content in files.items()]
    api.create_commit(space, added, commit_message=f"Show {model}", repo_type="space")
    return str(url)
