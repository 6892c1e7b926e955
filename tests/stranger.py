"""A process that has transformers, torch, torchaudio, soundfile, peft and safetensors, but not this project."""

import os
import subprocess
import sys
from pathlib import Path

# Cannot be imported there: the project, and those of its dependencies that a user of a checkpoint does not need.
HIDDEN = (
    *("audiophi", "modeling_audiophi", "processing", "train", "eval"),
    *("datasets", "evaluate", "jiwer", "whisper_normalizer", "gguf", "matplotlib", "tensorboard", "aac_metrics"),
)
# A Space's app.py draws.
HIDDEN_IN_A_SPACE = tuple(name for name in HIDDEN if name != "matplotlib")


def preamble_hiding(names):
    """Python code after which these packages cannot be imported."""
    return f"""
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *arguments):
        return None if name.partition(".")[0] in {names!r} else self.finder.find_spec(name, *arguments)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
try:
    import modeling_audiophi
except ImportError:
    pass
else:
    raise SystemExit("the package can be imported: this is no stranger")
"""


PREAMBLE = preamble_hiding(HIDDEN)


def run_stranger(script, folder, preamble=PREAMBLE, **environment):
    """Run Python code in a process of its own, in `folder`, with caches of its own there. Returns what it printed.

    AssertionError with the end of its output when it fails. `environment`: further variables.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),  # no components, tokens or models of this machine
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        **environment,
    }
    command = [sys.executable, "-I", "-c", preamble + script]
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout
