"""Whether what `import audiophi` needs is there, asked before any of it is imported."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

MODULES = ("torch", "torchaudio", "transformers", "soundfile")  # the others come with these, or are imported where used
TRANSFORMERS = (5, 15)  # the oldest, as in pyproject.toml


def check_requirements() -> None:
    """ImportError that names what is missing or too old, and the command that helps."""
    missing = [name for name in MODULES if find_spec(name) is None]
    if missing:
        raise ImportError(f"AudioPhi needs {', '.join(missing)}, not installed here: pip install {' '.join(missing)}")
    try:
        found = version("transformers")
        major, minor = (int(part) for part in found.split(".")[:2])
    except (PackageNotFoundError, ValueError):  # a copy of its sources, or a version of somebody's own
        return
    if (major, minor) < TRANSFORMERS:
        oldest = ".".join(map(str, TRANSFORMERS))
        raise ImportError(f"AudioPhi needs transformers {oldest} or newer, not {found}: pip install -U transformers")
