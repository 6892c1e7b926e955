"""The mean of two checkpoints' weights: what one learned and the other did not forget.

    python tools/average_checkpoints.py BEFORE AFTER OUT

AFTER was trained on from BEFORE (both slim, of the same components). OUT is AFTER with each weight the mean of both;
what only AFTER has, or has in another shape (the classes of words that came with its data), stays as it is there
(Wortsman et al. 2022, "Model soups", https://arxiv.org/abs/2203.05482, of two).
"""

import argparse
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def average(before: Path, after: Path, out: Path) -> None:
    """Writes `out`. FileNotFoundError for a folder without weights, ValueError where `out` is `before` or `after`."""
    if out.resolve() in (before.resolve(), after.resolve()):
        raise ValueError(f"{out}: OUT must be a folder of its own")
    for folder in (before, after):
        if not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(f"{folder}: holds no {WEIGHTS}")
    first, last = load_file(before / WEIGHTS), load_file(after / WEIGHTS)
    with safe_open(after / WEIGHTS, "pt") as file:
        about = file.metadata()
    for name, tensor in last.items():
        same = name in first and first[name].shape == tensor.shape and tensor.is_floating_point()
        if same:
            last[name] = ((first[name].float() + tensor.float()) / 2).to(tensor.dtype)
    shutil.copytree(after, out, dirs_exist_ok=True, symlinks=True)
    save_file(last, out / WEIGHTS, metadata=about)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("before", "after", "out"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    average(args.before, args.after, args.out)
    print(args.out)
