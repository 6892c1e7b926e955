"""Let checkpoints in this repository be loaded without the package: links to the code, named in their configs.

    python tools/link_code.py [checkpoints/NAME ...]

What `save_pretrained` copies beside a model (its file, the processor's, and all that these import) is linked instead,
so that it is never older than the code. `AutoModel.from_pretrained(FOLDER, trust_remote_code=True)` then works in a
clone; `audiophi push` uploads copies.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
ENTRIES = ("modeling_audiophi/modeling_audiophi.py", "processing/processing_audiophi.py")


def shipped() -> list[Path]:
    """The files that a checkpoint takes along."""
    files = ((ROOT / entry, *get_relative_import_files(ROOT / entry)) for entry in ENTRIES)
    return sorted({Path(file) for own in files for file in own})


def link_code(folder: Path) -> None:
    """Renews the links in a checkpoint's folder, and the `auto_map` of its config.json."""
    from modeling_audiophi.configuration_audiophi import AUTO_MAP

    for old in folder.glob("*.py"):
        if old.is_symlink():
            old.unlink()
    for file in shipped():
        os.symlink(os.path.relpath(file, folder.resolve()), folder / file.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = json.dumps({**config, "auto_map": AUTO_MAP}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    for folder in parser.parse_args().folders or sorted(path.parent for path in ROOT.glob("checkpoints/*/config.json")):
        link_code(folder)
        print(folder)
