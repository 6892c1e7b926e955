"""The folder of components that were made on this machine, and how a component gets there: whole or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path


def components_dir() -> Path:
    """Folder of converted components: $AUDIOPHI_COMPONENTS, else ~/.cache/audiophi/components."""
    return Path(os.environ.get("AUDIOPHI_COMPONENTS") or Path.home() / ".cache" / "audiophi" / "components")


@contextlib.contextmanager
def new_component(target):
    """An empty folder that becomes `target` when the `with` block ends, and vanishes when it raises.

    Where another process has made `target` meanwhile, that one stays.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, since a folder cannot be renamed across file systems.
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as scratch:
        folder = Path(scratch, "component")
        folder.mkdir()
        yield folder
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():
                raise
