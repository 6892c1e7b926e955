"""The released LanguageBind-Audio checkpoint -> a component folder: config, safetensors, feature extractor settings.

    LanguageBind/LanguageBind_Audio_FT   (MIT; CLIP ViT-L/14 with a text tower; pytorch_model.bin)

`resolve_component` calls `converted_component` for whatever it finds, a Hub id's download or a local folder. Only
`vision_model.*` is taken, strictly: what is missing, left over or of another shape is named. The conversion is made in
a temporary folder beside the final one and renamed at the end, so a folder that exists is complete.
"""

import hashlib
import json
import os
import pickle
import tempfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from modeling_audiophi.configuration_languagebind_audio import LanguageBindAudioConfig
from modeling_audiophi.modeling_languagebind_audio import LanguageBindAudioModel

SOURCE_MODEL_TYPE = "LanguageBindAudio"
GOOD_CHECKPOINT = "LanguageBind/LanguageBind_Audio_FT"
PREFIX = "vision_model."
IGNORED = (
    "text_model.",
    "text_projection.",
    "visual_projection.",
    "logit_scale",
    "vision_model.embeddings.position_ids",
)
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
NON_FT_MEL_BINS = 126
# Settings of the checkpoint's vision_config that ours has under the same name; what it leaves out is as in the FT
# checkpoint.
SAME_NAME = [
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "patch_size"),
    *("hidden_act", "layer_norm_eps", "attention_dropout", "num_mel_bins", "target_length"),
]
# Feature extractor settings by their name in vision_config.
EXTRACTOR = {"audio_sample_rate": "sampling_rate", "audio_mean": "mean", "audio_std": "std"}


def converted_component(folder, component, revision=None, **hub):
    """`folder` itself, or where it holds the original checkpoint, the folder of its conversion (made now if need be).

    `component` and `revision` are what `folder` was found for: a Hub id, or the folder's own path; `hub` are arguments
    of the download. Raises ValueError
    for a checkpoint that cannot be used, OSError where its weights cannot be had.
    """
    settings = source_settings(folder)
    if settings is None:
        return folder
    check_source(settings, component)
    root = Path(os.environ.get("AUDIOPHI_COMPONENTS") or Path.home() / ".cache" / "audiophi" / "components")
    is_id = not Path(component).is_dir()
    name = str(component).replace("/", "--") if is_id else Path(folder).resolve().name
    target = root / (f"{name}--{revision}" if is_id and revision else name)
    if not is_id or target.resolve() == Path(folder).resolve():
        target = root / f"{name}--converted-{fingerprint(folder)}"
    if not (target / "config.json").is_file():
        convert_languagebind_audio(with_weights(folder, component, revision, **hub), target, component)
    return str(target)


def source_settings(folder):
    """config.json of an original LanguageBind-Audio checkpoint in `folder`, None of anything else."""
    path = Path(folder, "config.json")
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None  # whoever loads it says what is wrong
    return settings if isinstance(settings, dict) and settings.get("model_type") == SOURCE_MODEL_TYPE else None


def check_source(settings, component, keys=()):
    """ValueError for the checkpoint before its fine-tuning in full: its LoRA layers are not merged, its spectrograms
    differ."""
    vision = settings.get("vision_config") or {}
    rank, bins = vision.get("lora_r", 0), vision.get("num_mel_bins", 112)
    if rank or bins == NON_FT_MEL_BINS or any(".lora_" in key for key in keys):
        raise ValueError(
            f"{component}: a LanguageBind-Audio checkpoint with LoRA layers (lora_r {rank}, {bins} mel bins) cannot be "
            f"used; take the fully fine-tuned {GOOD_CHECKPOINT} (lora_r 0, 112 mel bins)"
        )


def fingerprint(folder):
    """Changes with the path, size or time of the checkpoint's files."""
    files = sorted(file for pattern in ("config.json", *WEIGHTS) for file in Path(folder).resolve().glob(pattern))
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def with_weights(folder, component, revision=None, **hub):
    """`folder` if it holds weights, else the Hub's download with them; OSError for a local folder without."""
    if weight_files(folder):
        return folder
    if Path(component).is_dir():
        raise OSError(f"{component}: no weights there, looked for {' and '.join(WEIGHTS)}")
    for pattern in WEIGHTS:  # safetensors first: then nothing is downloaded twice
        patterns = ["config.json", pattern]
        folder = snapshot_download(str(component), revision=revision, allow_patterns=patterns, **hub)
        if weight_files(folder):
            return folder
    raise OSError(f"{component}: the Hub has no {' or '.join(WEIGHTS)} of it")


def weight_files(folder):
    return next((files for pattern in WEIGHTS if (files := sorted(Path(folder).glob(pattern)))), [])


def read_checkpoint(folder):
    """All tensors of a checkpoint by name, without running pickled code. ValueError naming a file that is damaged."""
    tensors = {}
    for file in weight_files(folder):
        try:
            if file.suffix == ".safetensors":
                tensors |= load_file(file)
            else:
                tensors |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
            reason = str(error).strip().splitlines() or ["no message"]
            raise ValueError(f"{file}: damaged or truncated checkpoint ({reason[0]}); download it again") from error
    return tensors


def convert_languagebind_audio(source, target, component=None):
    """The original checkpoint in folder `source` -> a new folder `target` that this project and AutoModel load.

    `component` names the checkpoint in messages. Raises ValueError for a checkpoint with LoRA layers, a damaged file,
    and keys that are missing, unexpected or of another shape; then there is no `target`.
    """
    component = component or source
    settings = source_settings(source)
    if settings is None:
        raise ValueError(f"{component}: not a LanguageBind-Audio checkpoint (model_type {SOURCE_MODEL_TYPE} expected)")
    tensors = read_checkpoint(source)
    check_source(settings, component, tensors)
    vision = settings.get("vision_config") or {}
    config = LanguageBindAudioConfig(**{name: vision[name] for name in SAME_NAME if vision.get(name) is not None})
    weights = vision_weights(tensors, config, component)
    config.architectures = [LanguageBindAudioModel.__name__]
    config.dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    extractor = {
        "feature_extractor_type": "LanguageBindAudioFeatureExtractor",
        "feature_size": config.num_mel_bins,
        "target_length": config.target_length,
        **{ours: vision[theirs] for theirs, ours in EXTRACTOR.items() if vision.get(theirs) is not None},
    }
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as scratch:
        made = Path(scratch, "converted")
        made.mkdir()
        save_file(weights, made / "model.safetensors", {"format": "pt"})
        config.save_pretrained(made)
        (made / "preprocessor_config.json").write_text(json.dumps(extractor, indent=2) + "\n")
        origin = {"id": str(component), "source": "converted from the original checkpoint, vision_model only"}
        if Path(source).parent.name == "snapshots":  # the Hub's cache
            origin["revision"] = Path(source).name
        (made / "component.json").write_text(json.dumps(origin, indent=2) + "\n")
        try:
            made.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # anything but another process having finished first
                raise
    return str(target)


def vision_weights(tensors, config, component):
    """The encoder's tensors under our names. ValueError naming what is missing, unexpected or of another shape."""
    kept = {key: value for key, value in tensors.items() if not key.startswith(IGNORED)}
    weights = {key.removeprefix(PREFIX): value for key, value in kept.items() if key.startswith(PREFIX)}
    with torch.device("meta"):
        expected = {key: value.shape for key, value in LanguageBindAudioModel(config).state_dict().items()}
    missing = sorted(PREFIX + key for key in expected.keys() - weights.keys())
    unexpected = sorted({key for key in kept if key.removeprefix(PREFIX) not in expected or not key.startswith(PREFIX)})
    shapes = [
        f"{PREFIX}{key} {tuple(weights[key].shape)} instead of {tuple(shape)}"
        for key, shape in expected.items()
        if key in weights and weights[key].shape != shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"{component}: the checkpoint does not fit LanguageBind-Audio; missing: {', '.join(missing) or 'none'}; "
            f"unexpected: {', '.join(unexpected) or 'none'}; other shapes: {', '.join(shapes) or 'none'}"
        )
    return {key: weights[key].contiguous() for key in expected}
