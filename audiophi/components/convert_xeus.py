"""XEUS from ESPnet's `.pth` to a Hugging Face folder, strictly: no tensor missing, none left over, no code executed.

`from_components(audio="espnet/xeus")` does it by itself, once, with the file from the Hub, and so does
`from_components(audio="FILE.pth")` with one that lies here. `tools/get_components.py espnet/xeus --file FILE.pth` makes
a downloaded file what "espnet/xeus" means on this machine. ESPnet itself loads with strict=False, which leaves the
positional convolution random, without a word, where the names in the file are those of another release.
"""

import copy
import hashlib
import json
import pickle
import zipfile
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import save_file
from transformers import Wav2Vec2FeatureExtractor
from transformers.utils import logging

from modeling_audiophi.configuration_xeus import XeusConfig
from modeling_audiophi.modeling_xeus import XeusModel

from .cache import components_dir, new_component

logger = logging.get_logger(__name__)

HUB_ID = "espnet/xeus"
# The repository has had several over time, which name the positional convolution differently; the first found is taken.
HUB_FILES = ("model/xeus_checkpoint_new.pth", "model/xeus_checkpoint.pth", "model/xeus_checkpoint_old.pth")
LICENCE = "CC-BY-NC-SA-4.0"

# Heads and bookkeeping of pre-training.
DROPPED = ("losses.", "util_modules.", "masker.", "global_step")
# ESPnet's names -> ours; what follows stays.
PREFIXES = {
    "frontend.layers.": "frontend.",
    "preencoder.linear_out.": "feature_projection.",
    "encoder.embed.0.convs.0.": "pos_conv.",
    "encoder.embed.0.conv.": "pos_conv.",  # ESPnet before it allowed several positional convolutions
    "encoder.encoders.": "layers.",
    "encoder.after_norm.": "after_norm.",
}
# torch.nn.utils.weight_norm, and torch.nn.utils.parametrizations.weight_norm
WEIGHT_NORM = {
    "pos_conv.weight_g": "pos_conv.magnitude",
    "pos_conv.weight_v": "pos_conv.direction",
    "pos_conv.parametrizations.weight.original0": "pos_conv.magnitude",
    "pos_conv.parametrizations.weight.original1": "pos_conv.direction",
}


class XeusCheckpointError(ValueError):
    """The file is not a XEUS checkpoint, or not a whole one."""


def our_name(name):
    """ESPnet's name of a tensor -> its name in XeusModel; None for what is dropped or unknown."""
    if name.startswith(DROPPED):
        return None
    for theirs, ours in PREFIXES.items():
        if name.startswith(theirs):
            renamed = ours + name[len(theirs) :]
            return WEIGHT_NORM.get(renamed, renamed)
    return None


def some(names):
    """A list for a message: the first few names, and how many there are."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"


def read_checkpoint(path):
    """Contents of a `.pth` without executing what it may contain; XeusCheckpointError when it cannot be read."""
    try:
        # Mapped, not read: the file has the size of the model.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()
        raise XeusCheckpointError(
            f"{path} ({Path(path).stat().st_size:,} bytes) cannot be read as a PyTorch checkpoint, it is truncated or "
            f"another kind of file: download it again ({type(error).__name__}: {reason[0] if reason else 'no message'})"
        ) from error
    if not isinstance(state, dict):
        raise XeusCheckpointError(f"{path} holds a {type(state).__name__}, not a dictionary of tensors")
    return state


def xeus_state_dict(state, config, source="the checkpoint"):
    """ESPnet's tensors under XeusModel's names.

    Raises XeusCheckpointError that names missing, unexpected and misshapen tensors.
    """
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in XeusModel(config).state_dict().items()}
    renamed, unexpected = {}, []
    for name, tensor in state.items():
        if str(name).startswith(DROPPED):
            continue
        ours = our_name(str(name))
        if ours not in expected or ours in renamed or not isinstance(tensor, torch.Tensor):
            unexpected.append(str(name))
        else:
            renamed[ours] = tensor
    missing = expected.keys() - renamed.keys()
    if missing or unexpected:
        raise XeusCheckpointError(
            f"{source} is not a XEUS checkpoint; missing (in this project's names): {some(missing)}; "
            f"unexpected: {some(unexpected)}"
        )
    wrong = [
        f"{name} {tuple(tensor.shape)} instead of {expected[name]}"
        for name, tensor in renamed.items()
        if tuple(tensor.shape) != expected[name]
    ]
    if wrong:
        raise XeusCheckpointError(f"{source} is a XEUS of another size than the config: {some(wrong)}")
    return {name: tensor.contiguous() for name, tensor in renamed.items()}


def convert_checkpoint(source, target, config=None, origin=None):
    """Write the folder `target` from ESPnet's `.pth` file `source`; a folder that exists is complete.

    Args:
        config: XeusConfig of the file (default: the released model; the number of heads is not in the weights).
        origin: dict for `component.json`, which says where the weights come from.

    Returns `target` as a string. Raises XeusCheckpointError, and then leaves nothing behind; FileExistsError when
    `target` exists.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists already: remove it to convert again")
    config = XeusConfig() if config is None else copy.deepcopy(config)
    weights = xeus_state_dict(read_checkpoint(source), config, source)
    with open(source, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    with new_component(target) as folder:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        config.architectures, config.dtype = ["XeusModel"], weights["after_norm.weight"].dtype
        config.save_pretrained(folder)
        # XEUS normalises by itself: the extractor pads and says what is padding.
        Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(folder)
        origin = {"source": source.name, **(origin or {}), "sha256": digest, "licence": LICENCE}
        (folder / "component.json").write_text(json.dumps(origin, indent=2) + "\n")
    return str(target)


def download_checkpoint(revision=None, **hub):
    """Path of XEUS's `.pth` in the Hub's local cache. OSError that says what to do when it cannot be had."""
    for name in HUB_FILES:
        try:
            return hf_hub_download(HUB_ID, name, revision=revision, **hub)
        except LocalEntryNotFoundError as error:  # no connection; a subclass of the next
            reason = error
            break
        except EntryNotFoundError as error:
            reason = error
        except (OSError, HfHubHTTPError) as error:
            reason = error
            break
    said = (str(reason).strip().splitlines() or ["no message"])[0]
    raise OSError(
        f"{HUB_ID} is not on this machine, and the Hub does not give it ({type(reason).__name__}: {said}): download "
        f"{HUB_FILES[0]} of that repository elsewhere and give the .pth as the audio component, or to "
        f"`tools/get_components.py {HUB_ID} --file`"
    ) from reason


def xeus_component(component, revision=None, root=None, **hub):
    """Folder of XEUS, converted now if it is not there yet; None for any other component.

    `component`: "espnet/xeus", or a local `.pth` file. `revision` is the Hub's; `root` the folder that gets the
    component (default: `components_dir()`); `hub` arguments of the download. Raises OSError when the Hub does not give
    the file, XeusCheckpointError when the file is not XEUS.
    """
    file = Path(component)
    root = components_dir() if root is None else Path(root)
    if str(component) == HUB_ID:
        target = root / HUB_ID.replace("/", "--")
    elif file.suffix == ".pth" and file.is_file():
        # The name changes with the file, so that another one in its place is not mistaken for it.
        stamp = f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}"
        target = root / f"xeus-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
    else:
        return None
    if target.is_dir():
        return str(target)
    origin = {}
    if str(component) == HUB_ID:
        file = Path(download_checkpoint(revision, **hub))
        # The Hub's cache keeps a file under snapshots/<commit>/model/.
        origin = {"id": HUB_ID, "revision": file.parts[-3]}
    logger.warning("Converting %s, once; the weights of XEUS are %s: non-commercial", file, LICENCE)
    try:
        return convert_checkpoint(file, target, origin=origin)
    except FileExistsError:  # another process was faster
        return str(target)
