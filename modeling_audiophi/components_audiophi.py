"""Base components: finding them, checking that they fit, building a model of them."""

import json
import os
import pickle
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING
from transformers.utils import logging

from .configuration_audiophi import AudioPhiAdapterConfig, AudioPhiConfig
from .encoders import change_settings, encoder_class
from .family_audiophi import look_up
from .lengths_audiophi import output_length
from .lora_audiophi import is_lora_key, with_base_layers
from .spelling_audiophi import spell

logger = logging.get_logger(__name__)

# What the installed package knows about components that transformers cannot load as they are released
# (audiophi/components); shipped with a checkpoint this file is alone. Functions (id, revision, **hub) -> folder or
# None, tried before the Hub is; (folder, id, revision, **hub) -> folder, of whatever was found; id -> folder or None,
# tried last.
SOURCES, CONVERTERS, FALLBACKS = [], [], []

SMALL_FILES = ["*.json", "*.txt", "*.jinja", "*.model"]
# Weights by the names that transformers loads, and no others: repositories also have them in float32, or for ONNX.
SAFETENSORS = ["model.safetensors", "model-*-of-*.safetensors"]
PICKLED = ["pytorch_model.bin", "pytorch_model-*-of-*.bin"]
SAMPLING_RATE = 16_000
AUDIO_PREFIX = "model.audio_tower."
TEXT_PREFIX = "model.language_model."


def resolve_component(component, revision=None, weights=True, **hub):
    """Local folder of a base component; a checkpoint in a format of its own is converted once.

    Arguments and errors: see `find_component`.
    """
    folder = find_component(component, revision, weights, **hub)
    for convert in CONVERTERS:
        folder = convert(folder, component, revision, **hub)
    return folder


def find_component(component, revision=None, weights=True, **hub):
    """Local folder of a base component as it was released.

    Looks, in this order, at: a local folder of that name; `$AUDIOPHI_COMPONENTS/<org>--<name>`;
    `~/.cache/audiophi/components/<org>--<name>`; the SOURCES (XEUS: from the Hub or a local `.pth`); the Hub; the
    FALLBACKS.
    `weights=False` downloads only the small files, where nothing has to be converted; `hub` (cache_dir, token,
    local_files_only, force_download) is for downloads. Raises OSError that lists what was tried, ValueError for a
    checkpoint that cannot be converted.
    """
    if Path(component).is_dir():
        return str(component)
    folder = str(component).replace("/", "--")
    tried = [str(component)]
    for root in (os.environ.get("AUDIOPHI_COMPONENTS"), Path.home() / ".cache" / "audiophi" / "components"):
        if root:
            tried.append(str(Path(root) / folder))
            if Path(tried[-1], "config.json").is_file():
                return tried[-1]
    for source in SOURCES:
        if (path := source(str(component), revision, **hub)) is not None:
            return path
    try:
        return download_component(str(component), revision, weights, **hub)
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        tried.append(f"the Hub ({type(error).__name__}: {str(error).splitlines()[0]})")
    for fallback in FALLBACKS:
        path = fallback(str(component))
        if path is not None:
            return str(path)
        tried.append(f"{fallback.__module__}.{fallback.__name__}")
    raise OSError(f"component {component!r} was not found; tried: " + "; ".join(tried))


def download_component(component, revision=None, weights=True, **hub):
    """Folder with a Hub repository's small files and, with `weights`, one copy of its weights, as safetensors.

    Where a repository has none, its pickled weights are downloaded instead and converted once, in that folder, without
    running code from them. Raises the Hub client's errors, and ValueError for pickled weights that cannot be read.
    """
    how = {"revision": revision, **hub}
    if not weights:
        return snapshot_download(component, allow_patterns=SMALL_FILES, **how)
    folder = snapshot_download(component, allow_patterns=[*SMALL_FILES, *SAFETENSORS], **how)
    if not any(Path(folder, name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        folder = snapshot_download(component, allow_patterns=[*SMALL_FILES, *PICKLED], **how)
        convert_pickled(Path(folder))
    return folder


def convert_pickled(folder):
    """pytorch_model*.bin of a folder -> model*.safetensors, file by file; the index last, so that it tells that all are
    there."""
    files = sorted(folder.glob("pytorch_model*.bin"))
    for file in [*files, *folder.glob("pytorch_model.bin.index.json")]:
        target = folder / file.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        partial = target.with_suffix(f".partial-{os.getpid()}")
        if file.suffix == ".json":
            partial.write_text(file.read_text().replace("pytorch_model", "model").replace(".bin", ".safetensors"))
        else:
            try:
                tensors = torch.load(file, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
                raise ValueError(f"{file}: not a file of tensors, or damaged; download it again") from error
            # Tied weights share their memory, which safetensors does not store.
            tensors = {name: value.clone().contiguous() for name, value in tensors.items() if torch.is_tensor(value)}
            save_file(tensors, partial, {"format": "pt"})
        partial.replace(target)
    for file in files:
        file.unlink()  # in the Hub's cache a link


def component_id(component):
    """The name a checkpoint remembers: `<org>/<name>`, also for a folder `<org>--<name>`, else the absolute path."""
    if not Path(component).is_dir():
        return str(Path(component).resolve() if Path(component).is_file() else component)
    name = Path(component).resolve().name
    return name.replace("--", "/", 1) if "--" in name else str(Path(component).resolve())


def component_revision(folder):
    """The commit that a component's folder is of: the Hub's cache and converted components say it; else None."""
    folder = Path(folder)
    if folder.parent.name == "snapshots":
        return folder.name
    origin = folder / "component.json"
    return json.loads(origin.read_text(encoding="utf-8")).get("revision") if origin.is_file() else None


def load_config(component, revision=None):
    """Config of a component, weights untouched."""
    return AutoConfig.from_pretrained(resolve_component(component, revision, weights=False))


def feature_extractor_settings(folder):
    """What a component says about its feature extractor, in either of transformers' two places; None if it says
    nothing."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if Path(folder, name).is_file():
            settings = json.loads(Path(folder, name).read_text())
            settings = settings.get("feature_extractor", settings)
            if "feature_extractor_type" in settings:
                return settings
    return None


def load_text_config(component, revision=None):
    """Config of a causal LM, also where it is part of a model that sees, too (Gemma 3 4B, Qwen3.5). ValueError naming a
    component that cannot be the language model, and why."""
    whole = load_config(component, revision)
    config = whole.get_text_config(decoder=True)
    named = f"text component {component!r} ({whole.model_type})"
    if whole.is_encoder_decoder:
        raise ValueError(f"{named} is an encoder-decoder, not a causal language model")
    known = type(whole) in MODEL_FOR_CAUSAL_LM_MAPPING or type(whole) in MODEL_FOR_MULTIMODAL_LM_MAPPING
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not known:
        raise ValueError(f"{named} is not a causal language model")
    if getattr(config, "hidden_size_per_layer_input", None):
        raise ValueError(
            f"{named} has per-layer embeddings: every layer reads token ids, and audio has none. Take a model without "
            "them (Gemma 3, Gemma 4 without E in its size)"
        )
    config.tie_word_embeddings = whole.tie_word_embeddings
    return config


def check_components(audio, audio_config, revision=None):
    """ValueError naming the encoder that cannot be used and why; reads configs only."""
    encoder = encoder_class(audio_config)
    settings = feature_extractor_settings(resolve_component(audio, revision, weights=False))
    if settings is None:
        raise ValueError(f"audio component {audio!r} has no preprocessor_config.json: its feature extractor is unknown")
    wanted = getattr(encoder, "sampling_rate", SAMPLING_RATE)
    rate = settings.get("sampling_rate", wanted)
    if rate != wanted:
        raise ValueError(f"audio component {audio!r} wants audio at {rate} Hz; AudioPhi's encoder works at {wanted} Hz")
    bins = getattr(audio_config, "num_mel_bins", None)
    if bins is not None and encoder.feature_key == "input_features" and settings.get("feature_size", bins) != bins:
        raise ValueError(
            f"audio component {audio!r}: feature extractor makes {settings['feature_size']} mel bins, "
            f"the encoder takes {bins}"
        )


def check_context(config):
    """ValueError when the audio tokens of one encoder window, or the clip tokens, do not fit into the language model's
    context."""
    tokens = output_length(config.window_frames, config.audio_length_rule) + config.clip_tokens
    context = getattr(config.text_config, "max_position_embeddings", None)
    seconds = config.window_frames / encoder_class(config.audio_config).feature_rate(config.audio_config)
    if context is not None and config.clip_tokens >= context:
        raise ValueError(f"clip_tokens {config.clip_tokens}: the language model's context is only {context}")
    if context is not None and config.readout == "frames" and tokens >= context:
        raise ValueError(
            f"one window of {seconds:.1f} s makes {tokens} audio tokens, but the language model's context is "
            f"{context}: raise the adapter's stack or lower window_frames"
        )


def read_text_weights(path, dtype):
    """State dict of a causal LM under AudioPhi's names, its missing keys, the name of its embedding table, and what
    that is multiplied by before its layers read it (`look_up`)."""
    sees = type(AutoConfig.from_pretrained(path)) in MODEL_FOR_MULTIMODAL_LM_MAPPING
    auto = AutoModelForMultimodalLM if sees else AutoModelForCausalLM
    model, info = auto.from_pretrained(path, dtype=dtype, output_loading_info=True)
    base = model.get_decoder() if sees else model.base_model
    state = {TEXT_PREFIX + key: value for key, value in base.state_dict().items()}
    head = model.get_output_embeddings()
    state |= {f"lm_head.{key}": value for key, value in head.state_dict().items()}
    embed = base.get_input_embeddings()
    table = next(name for name, module in base.named_modules() if module is embed)
    rows = embed.weight[:1024].detach()
    read = look_up(embed, torch.arange(len(rows)), base.config).detach()
    scale = read.float().norm() / rows.float().norm()
    return state, list(info["missing_keys"]), f"{TEXT_PREFIX}{table}.weight", float(scale)


def text_generation_config(path, text_config, audio_token_id):
    """Greedy decoding with the LLM's own special tokens; the placeholder is never written."""
    own = GenerationConfig.from_pretrained(path) if Path(path, "generation_config.json").is_file() else text_config
    special = {name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if special["pad_token_id"] is None:
        end = special["eos_token_id"]
        special["pad_token_id"] = end[0] if isinstance(end, list) else end
    return GenerationConfig(**special, suppress_tokens=[audio_token_id])


class ComponentsMixin:
    """Building from components."""

    @classmethod
    def from_components(
        cls,
        audio,
        text,
        adapter="conv_mlp",
        audio_token_id=None,
        readout="frames",
        hear_with="alignment",
        clip_tokens=0,
        encoder_layer="last",
        align_vocab_ids=None,
        align_spelling=None,
        window_frames=None,
        lora=None,
        dtype=torch.float32,
        audio_revision=None,
        text_revision=None,
        audio_settings=None,
        **kwargs,
    ):
        """A model of pretrained parts and a new adapter.

        Args:
            audio, text: Hub ids or local folders of an encoder and a causal LM; for XEUS also ESPnet's `.pth`.
            adapter: registry key, dict of `AudioPhiAdapterConfig` arguments, or such a config.
            audio_token_id: the processor's placeholder id; None adds a row to the embedding table. An id beyond the
                table adds rows.
            hear_with: see `AudioPhiConfig`; "decoder" needs no training.
            clip_tokens: how many tokens of a clip as a whole the LLM reads beside the readout's.
            align_vocab_ids: LLM token ids of the alignment head; None builds none.
            align_spelling: {"texts": text of each of those tokens, "buckets", "size"} to score their spelling too.
            audio_settings: changes to the encoder's config, say {"frequency_pooling": "concat"}; see encoders.py.
            lora: {"audio": {...}, "text": {...}} arguments of `peft.LoraConfig`.
            dtype: of all weights. kwargs: further arguments of `from_pretrained` (device_map, attn_implementation,
                ...).

        Raises ValueError that names the part that does not fit, before any weights are loaded.
        """
        audio_config, text_config = load_config(audio, audio_revision), load_text_config(text, text_revision)
        check_components(audio, audio_config, audio_revision)
        change_settings(audio_config, audio_settings)
        if isinstance(adapter, str):
            adapter = {"type": adapter}
        if isinstance(adapter, dict):
            adapter = AudioPhiAdapterConfig(**adapter)
        vocab_ids = None if align_vocab_ids is None else sorted({int(index) for index in align_vocab_ids})
        rows = text_config.vocab_size
        if vocab_ids and not 0 <= vocab_ids[0] <= vocab_ids[-1] < rows:
            raise ValueError(f"align_vocab_ids must be token ids below {rows}, got {vocab_ids[0]} to {vocab_ids[-1]}")
        spellings, sizes = None, None
        if vocab_ids and align_spelling:
            sizes = {name: align_spelling[name] for name in ("buckets", "size")}
            spellings = [spell(text, sizes["buckets"]) for text in align_spelling["texts"]]
            sizes["entries"] = sum(map(len, spellings))
        # Sub-configs remember where they were read; a checkpoint must not carry this machine's paths.
        audio_config.name_or_path, text_config.name_or_path = component_id(audio), component_id(text)
        audio_token_id = rows if audio_token_id is None else audio_token_id
        text_config.vocab_size = max(rows, audio_token_id + 1)
        config = AudioPhiConfig(
            audio_config=audio_config,
            text_config=text_config,
            adapter_config=adapter,
            audio_token_id=audio_token_id,
            readout=readout,
            hear_with=hear_with,
            clip_tokens=clip_tokens,
            encoder_layer=encoder_layer,
            align_vocab_size=len(vocab_ids or ()),
            align_spelling=sizes,
            window_frames=window_frames,
            base_vocab_size=rows,
            slim=True,
            base_components={
                "audio": {"id": component_id(audio), "revision": audio_revision},
                "text": {"id": component_id(text), "revision": text_revision},
            },
        )
        check_context(config)
        with torch.device("meta"):
            cls(config)  # what cannot be built says so now
        paths = {"audio": resolve_component(audio, audio_revision), "text": resolve_component(text, text_revision)}
        for part, path in paths.items():
            # A branch moves on; the weights that are being trained upon do not.
            base = config.base_components[part]
            base["revision"] = component_revision(path) or base["revision"]
        model = cls._assemble(config, paths, {}, dtype=dtype, **kwargs)
        model.name_or_path = model.config.name_or_path = ""
        model.model.match_embeddings(vocab_ids, spellings)
        model.generation_config = text_generation_config(paths["text"], text_config, audio_token_id)
        if hear_with != "alignment":
            model.generation_config.tasks = {name: {"verbatim": True} for name in config.decoder_tasks}
        for part, arguments in (lora or {}).items():
            model.add_lora(part, arguments)
        return model

    @classmethod
    def _assemble(cls, config, paths, own, dtype, **kwargs):
        """Load base weights from `paths` and a checkpoint's `own` tensors; an empty `own` leaves new parts at their
        initial values.

        Raises ValueError naming every key that is missing or left over.
        """
        audio_state, missing = encoder_class(config.audio_config).read_base(paths["audio"], dtype)
        text_state, text_missing, table, config.embedding_scale = read_text_weights(paths["text"], dtype)
        if missing or text_missing:
            raise ValueError(f"base components lack weights: {', '.join([*missing, *text_missing])}")
        config.lm_head_bias = "lm_head.bias" in text_state
        own = dict(own)
        add_rows(text_state, config, table, own)
        if config.tie_word_embeddings:
            text_state.pop("lm_head.weight", None)
        with torch.device("meta"):
            skeleton = cls(config)
        tied = set(skeleton.all_tied_weights_keys)
        expected = set(skeleton.state_dict()) - tied
        base = {AUDIO_PREFIX + key: value for key, value in audio_state.items()} | text_state
        base = with_base_layers(base, expected)
        state = base | own
        if not isinstance(config.encoder_layer, str):  # blocks above that layer were not built
            state = {key: value for key, value in state.items() if key in expected or not key.startswith(AUDIO_PREFIX)}
        new = {key for key in expected if is_own_key(key, config)} if not own else set()
        missing, unexpected = expected - state.keys() - new, state.keys() - expected
        if missing or unexpected:
            raise ValueError(
                f"weights do not fit the model; missing: {sorted(missing) or 'none'}; "
                f"unexpected: {sorted(unexpected) or 'none'}"
            )
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # new parts are meant to be missing
        try:
            return super().from_pretrained(None, config=config, state_dict=state, dtype=dtype, **kwargs)
        finally:
            logging.set_verbosity(verbosity)


def is_own_key(key, config):
    """Whether a tensor is not part of a frozen base component."""
    if is_lora_key(key) or ".layer_choice." in key:
        return True
    if key.startswith(AUDIO_PREFIX):
        return config.tuned["audio"] == "full"
    if key.startswith((TEXT_PREFIX, "lm_head.")):
        return config.tuned["text"] == "full"
    return True


def add_rows(text_state, config, table, own):
    """Lengthen the base LLM's tables to the config's vocabulary: rows of the checkpoint (taken out of `own`), else
    their mean."""
    missing = config.text_config.vocab_size - config.base_vocab_size
    names = {"added_input_rows": table, "added_output_rows": "lm_head.weight"}
    for added, name in names.items():
        rows = own.pop(added, None)
        if missing > 0 and name in text_state:
            weight = text_state[name]
            if rows is None:
                rows = weight.float().mean(0, keepdim=True).expand(missing, -1)
            text_state[name] = torch.cat([weight, rows.to(weight.dtype)])
    if missing > 0 and "lm_head.bias" in text_state:
        bias = text_state["lm_head.bias"]
        text_state["lm_head.bias"] = torch.cat([bias, bias.new_zeros(missing)])
