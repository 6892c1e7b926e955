"""Slim and full checkpoints: saving, loading, pushing.

A *slim* checkpoint keeps only what differs from its base components (adapter, alignment, readout, clip tokens, layer
mix, LoRA, parts that were tuned in full, added embedding rows) and names the components by id and revision; loading
reads both and misses nothing silently. A *full* one holds everything and needs no other repository.
"""

import contextlib
import copy
import functools
import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import AutoModel, GenerationConfig, PreTrainedConfig
from transformers.utils import is_bitsandbytes_available

from .components_audiophi import is_own_key, resolve_component
from .encoders import warn_of_licence, weights_licence
from .lora_audiophi import PARTS, merged_state_dict
from .packed_weights_audiophi import pack, unpack
from .quantization_audiophi import matrices_for_4bit

# Arguments of from_pretrained that say where and how to look on the Hub; base components are fetched with the same,
# but for the revision.
HUB_ARGUMENTS = ("cache_dir", "token", "local_files_only", "force_download")
# What quantization leaves as it is: only the language model's own matrices are large enough to be worth it.
UNQUANTIZED = [
    *("model.audio_tower", "model.multi_modal_projector", "model.alignment", "model.readout", "model.clip_tokens"),
    "lm_head",
    r".*\.lora_[AB]",
]


class CheckpointsMixin:
    """`from_pretrained`, `save_pretrained` and `push_to_hub` for a model with ComponentsMixin."""

    @property
    def dtype(self):
        """Of the model's own parts: frozen components may be kept in fewer bits while these are trained."""
        return next(self.model.readout.parameters()).dtype

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """As in transformers; a slim checkpoint also loads the base components that it names.

        `quantization_config` is for the language model's matrices, unless it names modules to skip. Raises ImportError
        for one of bitsandbytes without bitsandbytes, OSError for a base component that is nowhere, ValueError for one
        that does not fit the checkpoint.
        """
        path = pretrained_model_name_or_path
        if path is None:
            return super().from_pretrained(path, *args, config=config, **kwargs)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = of_language_model(kwargs["quantization_config"])
        quantization = kwargs.get("quantization_config")
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        revision = kwargs.get("_commit_hash") or kwargs.get("revision")
        known = config
        if not isinstance(config, PreTrainedConfig):
            known = cls.config_class.from_pretrained(config or path, revision=revision, **hub)
        if quantization is not None:
            leave_misfits(quantization, known.text_config)
        if not known.slim:
            return super().from_pretrained(path, *args, config=config, **kwargs)
        config = copy.deepcopy(known)
        folder = path
        if not Path(path).is_dir():
            patterns = {"allow_patterns": ["*.json", "*.safetensors"], "ignore_patterns": ["*/*"]}
            folder = snapshot_download(path, revision=revision, **patterns, **hub)
        own = unpack(read_safetensors(folder))
        paths = {
            part: resolve_component(base["id"], base["revision"], **hub)
            for part, base in config.base_components.items()
        }
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or "auto"
        dtype = config.dtype if dtype == "auto" else dtype
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        ignored = ("revision", "_from_auto", "_commit_hash", "trust_remote_code", "adapter_kwargs")
        with_info = kwargs.pop("output_loading_info", False)
        for key in (*hub, *ignored):
            kwargs.pop(key, None)
        model = cls._assemble(config, paths, own, dtype=dtype or torch.float32, **kwargs)
        model.name_or_path = model.config.name_or_path = str(path)
        model.generation_config = GenerationConfig.from_pretrained(folder)
        info = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return (model, info) if with_info else model

    def save_pretrained(
        self,
        save_directory,
        *args,
        slim=None,
        merge_lora=False,
        include_noncommercial=False,
        int8=False,
        state_dict=None,
        **kwargs,
    ):
        """As in transformers.

        Args:
            slim: leave out what the base components hold, and name them; None: as the model was loaded or built
                (`config.slim`).
            merge_lora: add the LoRA layers into the weights that they change; for a full checkpoint.
            include_noncommercial: write encoder weights whose licence restricts their use (XEUS) into a full
                checkpoint all the same.
            int8: matrices of a slim checkpoint in 8 bits, a scale per row; they are loaded as any others.

        Raises ValueError for a slim checkpoint of a model without base components, for `merge_lora` in a slim
        checkpoint, for `int8` in a full one, and for a full checkpoint of restricted weights that was not asked for.
        """
        slim = self.config.slim if slim is None else slim
        if slim and not self.config.base_components:
            raise ValueError(
                "a slim checkpoint names its base components, but this model was not built from components"
            )
        if merge_lora and (slim or state_dict is not None):
            raise ValueError("merge_lora changes base weights: it is for a full checkpoint (slim=False) of the model")
        if int8 and not slim:
            raise ValueError("int8 is for slim checkpoints (slim=True); a full one is loaded by transformers itself")
        licence = weights_licence(self.config.audio_config)
        if not slim and licence is not None and not include_noncommercial:
            raise ValueError(
                f"a full checkpoint would contain the encoder's weights ({licence}): save a slim one, which names "
                "them, or say include_noncommercial=True and publish it under that licence"
            )
        if not slim or self.config.tuned["audio"] == "full":
            warn_of_licence(self.config.audio_config, save_directory)
        if slim:
            state_dict = self.slim_state_dict(state_dict)
            state_dict = pack(state_dict) if int8 else state_dict
        elif merge_lora:
            state_dict = merged_state_dict(self)
        with saved_config(self.config, slim, merge_lora):
            super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)

    def push_to_hub(self, repo_id, *, slim=None, merge_lora=False, include_noncommercial=False, int8=False, **kwargs):
        """As in transformers, with the arguments of `save_pretrained` that say what is saved.

        Raises ValueError for a slim checkpoint whose base components lie on this machine only.
        """
        self.check_components_are_public(slim)
        options = {"slim": slim, "merge_lora": merge_lora, "int8": int8}
        options["include_noncommercial"] = include_noncommercial
        # transformers' method calls save_pretrained without any of them.
        self.save_pretrained = functools.partial(self.save_pretrained, **options)
        try:
            return super().push_to_hub(repo_id, **kwargs)
        finally:
            del self.save_pretrained

    def check_components_are_public(self, slim=None):
        """ValueError for a slim checkpoint (None: as `config.slim` says) whose base components nobody else has."""
        local = [base["id"] for base in self.config.base_components.values() if Path(base["id"]).is_absolute()]
        if (self.config.slim if slim is None else slim) and local:
            raise ValueError(
                f"a slim checkpoint names its base components, but nobody else has {', '.join(local)}: push a full one "
                "(slim=False), or build the model from components by their ids on the Hub"
            )

    def slim_state_dict(self, state_dict=None):
        """What a slim checkpoint holds, out of `state_dict` (default: the model's)."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        own = {key: value for key, value in state_dict.items() if is_own_key(key, self.config)}
        rows, size = self.config.base_vocab_size, self.config.text_config.vocab_size
        if self.config.tuned["text"] != "full" and size > rows:
            table = next(n for n, m in self.named_modules() if m is self.get_input_embeddings()) + ".weight"
            own["added_input_rows"] = state_dict[table][rows:].clone()
            if not self.config.tie_word_embeddings:
                own["added_output_rows"] = state_dict["lm_head.weight"][rows:].clone()
        return own


@contextlib.contextmanager
def saved_config(config, slim, merged):
    """Inside the `with` block `config` describes the checkpoint that is being written."""
    # Imported here: its file ships with this one's, and who only loads a model does not wait for all pipelines.
    from .pipeline_audiophi import AudioTextToTextPipeline

    before = config.slim, config.lora, config.tuned
    config.slim = slim
    # Only in files: a config in memory that has it is taken for remote code.
    impl = f"pipeline_audiophi.{AudioTextToTextPipeline.__name__}"
    config.custom_pipelines = {"audio-text-to-text": {"impl": impl, "pt": ["AutoModelForMultimodalLM"]}}
    if merged:
        # What LoRA has changed is no longer what the base component holds.
        config.tuned = {part: "full" if config.lora[part] else how for part, how in config.tuned.items()}
        config.lora = dict.fromkeys(PARTS)
    try:
        yield
    finally:
        config.slim, config.lora, config.tuned = before
        del config.custom_pipelines


def of_language_model(quantization_config):
    """A copy of `quantization_config` that leaves all but the language model's matrices alone, unless it says itself
    what to leave. Raises ImportError when it needs bitsandbytes and there is none."""
    settings = copy.deepcopy(quantization_config)
    read = settings.get if isinstance(settings, dict) else functools.partial(getattr, settings)
    bits = isinstance(settings, dict) and (settings.get("load_in_4bit") or settings.get("load_in_8bit"))
    method = getattr(read("quant_method", None), "value", read("quant_method", None)) or (bits and "bitsandbytes")
    if method == "bitsandbytes" and not is_bitsandbytes_available():
        raise ImportError(
            "quantization_config asks for bitsandbytes, which is not installed: pip install bitsandbytes, or load "
            "without quantization_config (dtype=torch.bfloat16 takes half of float32's memory)"
        )
    name = "llm_int8_skip_modules" if method == "bitsandbytes" else "modules_to_not_convert"
    if read(name, None) is None:
        if isinstance(settings, dict):
            settings[name] = list(UNQUANTIZED)
        elif hasattr(settings, name):
            setattr(settings, name, list(UNQUANTIZED))
    return settings


def leave_misfits(settings, text_config):
    """Adds to what 4-bit `settings` of bitsandbytes leave alone: the language model's matrices that do not fit.

    Raises ValueError where none does; says which are left.
    """
    is_dict = isinstance(settings, dict)
    if not (settings.get("load_in_4bit") if is_dict else getattr(settings, "load_in_4bit", False)):
        return
    with torch.device("meta"):
        language_model = AutoModel.from_config(text_config)
    misfits = ["model.language_model." + name for name in matrices_for_4bit(language_model)[1]]
    left = (settings.get("llm_int8_skip_modules") if is_dict else settings.llm_int8_skip_modules) or []
    if is_dict:
        settings["llm_int8_skip_modules"] = [*left, *misfits]
    else:
        settings.llm_int8_skip_modules = [*left, *misfits]


def read_safetensors(folder):
    """All tensors of a folder's model.safetensors or of the shards that its index names; OSError when a file is
    missing."""
    whole, index = Path(folder, "model.safetensors"), Path(folder, "model.safetensors.index.json")
    if whole.is_file():
        return load_file(whole)
    if not index.is_file():
        raise OSError(f"no model.safetensors in {folder}")
    files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return {key: value for file in files for key, value in load_file(Path(folder, file)).items()}
