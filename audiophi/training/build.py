"""Recipe -> model and processor that fit each other, and which parameters a stage trains."""

import json
from collections.abc import Iterable
from functools import partial

import torch
from transformers.utils import is_bitsandbytes_available

from audiophi.data.alignment_text import AlignmentTokenizer
from audiophi.tasks import TASKS, decoding, saved_tasks
from modeling_audiophi import AudioPhiAdapterConfig, AudioPhiConfig, AudioPhiForConditionalGeneration, resolve_component
from modeling_audiophi.configuration_audiophi import check_ears
from modeling_audiophi.generation_audiophi import GENERATION_SETTINGS
from modeling_audiophi.lora_audiophi import is_lora_key
from modeling_audiophi.quantization_audiophi import matrices_for_4bit
from modeling_audiophi.readouts import READOUTS
from processing import AudioPhiProcessor

from .precision import frozen_dtype
from .recipe import Recipe, RecipeError, Stage
from .recipe_checks import check_start

PARTS = ("encoder", "adapter", "llm")


def build_processor(recipe: Recipe) -> AudioPhiProcessor:
    """The processor alone: enough to read the texts that decide the alignment vocabulary. RecipeError where the recipe
    contradicts the checkpoint that it starts from."""
    if recipe.init_from is not None:
        check_start(recipe, AudioPhiConfig.from_pretrained(recipe.init_from))
        return AudioPhiProcessor.from_pretrained(recipe.init_from)
    components = recipe.components
    return AudioPhiProcessor.from_components(
        resolve_component(components.audio, components.audio_revision),
        resolve_component(components.text, components.text_revision),
        chat_template=components.chat_template,
    )


def learns_sounds(recipe: Recipe) -> bool:
    """Whether the recipe's readout learns in the loss `align` from words that say what is heard, so that the alignment
    must know them."""
    name = recipe.readout
    if name is None:
        config = None if recipe.init_from is None else AudioPhiConfig.from_pretrained(recipe.init_from)
        name = "frames" if config is None else config.readout
    return READOUTS[name].learns_sounds


def build_align_tokenizer(recipe: Recipe, processor: AudioPhiProcessor) -> AlignmentTokenizer | None:
    """Tokenises the CTC targets; None for a recipe without an alignment head."""
    return AlignmentTokenizer(processor.tokenizer, recipe.alignment.merges) if recipe.alignment else None


def build_model(
    recipe: Recipe,
    processor: AudioPhiProcessor,
    align_vocab_ids: list[int] | None,
    tasks: Iterable[str] = (),
    questions: Iterable[str] = (),
) -> AudioPhiForConditionalGeneration:
    """An untrained model of the recipe's components, or the checkpoint `init_from`, which is trained on `tasks`, of
    whose free `questions` there is one of each kind; the processor learns its windows and what it is asked.

    Raises RecipeError for adapter settings that do not exist, ValueError for components that do not fit.
    """
    torch.manual_seed(recipe.seed)
    if recipe.init_from is not None:
        model = AudioPhiForConditionalGeneration.from_pretrained(recipe.init_from, dtype=torch.float32)
        if recipe.readout not in (None, model.config.readout):
            model.set_readout(recipe.readout)
        if recipe.clip_tokens not in (None, model.config.clip_tokens):
            try:
                model.set_clip_tokens(recipe.clip_tokens)
            except ValueError as error:
                raise RecipeError(f"clip_tokens: {error}") from None
        if align_vocab_ids is not None:
            model.extend_alignment(align_vocab_ids, partial(decode_token, processor.tokenizer))
    else:
        components = recipe.components
        try:
            check_adapter_keys(recipe.adapter)
            adapter = AudioPhiAdapterConfig(**recipe.adapter)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"adapter: {error}") from None
        model = AudioPhiForConditionalGeneration.from_components(
            audio=components.audio,
            text=components.text,
            adapter=adapter,
            audio_token_id=processor.audio_token_id,
            readout=recipe.readout or "frames",
            clip_tokens=recipe.clip_tokens or 0,
            encoder_layer=recipe.encoder_layer,
            align_vocab_ids=align_vocab_ids,
            align_spelling=align_spelling(recipe, processor, align_vocab_ids),
            audio_revision=components.audio_revision,
            text_revision=components.text_revision,
            audio_settings=components.audio_settings,
        )
    model.config.hear_with = recipe.hear_with or model.config.hear_with
    try:
        check_ears(model.config, model.config.hear_with)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    make_ready(model, recipe, tasks)
    processor.match_model(model.config)
    # The pipeline asks as the model was asked; other usual wordings are known to mean the same.
    known = {**processor.tasks}
    for name, task in saved_tasks(tasks, recipe.instructions, questions).items():
        before = processor.tasks.get(name, {}).get("trained", [])
        known[name] = {**task, "trained": list(dict.fromkeys([*task["trained"], *before]))}
    order = [name for name in sorted(TASKS, key=lambda name: TASKS[name].order) if name in known]
    processor.tasks = {name: known[name] for name in [*order, *(name for name in known if name not in order)]}
    return model


def make_ready(model: AudioPhiForConditionalGeneration, recipe: Recipe, tasks: Iterable[str] = ()) -> None:
    """What a run makes of a float32 model on the CPU, be it new or loaded: the precision that frozen weights are kept
    in, 4-bit matrices, generation for `tasks`. Raises RecipeError."""
    for number, stage in enumerate(recipe.stages):
        if stage.optimizer != "adamw" and not is_bitsandbytes_available():
            raise RecipeError(
                f"stages.{number}.optimizer: {stage.optimizer} needs bitsandbytes: pip install it, or use adamw"
            )
    set_frozen_dtype(model, recipe, frozen_dtype(recipe))
    if recipe.components.quantize_text == "4bit":
        quantize_text(model)
    set_generation(model, recipe, tasks)


def set_frozen_dtype(model: AudioPhiForConditionalGeneration, recipe: Recipe, dtype: torch.dtype) -> None:
    """Keeps in `dtype` the weights of the LLM, and of an encoder that runs in every step, but not of one that was tuned
    in full or will be. What is cached of the encoder shall not depend on the machine."""
    parts = {"encoder": "audio", "llm": "text"} if not recipe.cache else {"llm": "text"}
    frozen = {
        part
        for part, name in parts.items()
        if model.config.tuned[name] != "full" and all(getattr(stage.tune, part) != "full" for stage in recipe.stages)
    }
    for name, tensor in model.state_dict(keep_vars=True).items():
        if part_of(name) in frozen and tensor.is_floating_point() and not is_lora_key(name):
            tensor.data = tensor.data.to(dtype)


def set_generation(model: AudioPhiForConditionalGeneration, recipe: Recipe, tasks: Iterable[str] = ()) -> None:
    """The recipe's `generation` as defaults of generate(), for all decoding and for `tasks`: on top of what the model's
    own config says, and that on top of the tasks' defaults. RecipeError for an unknown key."""
    settings = model.generation_config
    common, by_task = decoding(tasks, recipe.generation)
    known = getattr(settings, "tasks", None) or {}
    for given in (common, *by_task.values()):
        unknown = [key for key in given if not hasattr(settings, key) and key not in GENERATION_SETTINGS]
        if unknown:
            raise RecipeError(f"generation: {', '.join(unknown)} is not a setting of transformers' GenerationConfig")
    for key, value in common.items():
        setattr(settings, key, value)
    given = {name: recipe.generation.get(name, {}) for name in by_task}
    settings.tasks = {**known, **{n: {**by_task[n], **known.get(n, {}), **given[n]} for n in by_task}}


def check_adapter_keys(adapter: dict) -> None:
    """ValueError for a key that AudioPhiAdapterConfig does not declare (configs swallow unknown keys)."""
    known = [key for key in AudioPhiAdapterConfig.__annotations__ if key not in ("model_type", "base_config_key")]
    for key in adapter:
        if key not in known:
            raise ValueError(f"unknown key {key!r}; valid keys: {', '.join(known)}")


def align_spelling(recipe: Recipe, processor: AudioPhiProcessor, align_vocab_ids: list[int] | None) -> dict | None:
    """What `from_components` needs to score spelling; None for a recipe that does not want it."""
    if align_vocab_ids is None or not recipe.alignment.spelling:
        return None
    texts = [decode_token(processor.tokenizer, index) for index in align_vocab_ids]
    return {"texts": texts, "buckets": recipe.alignment.ngrams, "size": recipe.alignment.spelling}


def decode_token(tokenizer, index: int) -> str:
    """One token's text, with its leading space."""
    return tokenizer.decode([index], clean_up_tokenization_spaces=False)


def full_align_vocab(tokenizer, merges: int | None) -> list[int]:
    """Every id that the first `merges` merges of a BPE can produce, for streams whose texts are not known beforehand.

    Raises RecipeError for `merges: null`: the head would span the whole vocabulary.
    """
    if merges is None:
        raise RecipeError("alignment.merges: a stream's texts are not known beforehand, so give a number, e.g. 400")
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in bpe["merges"][:merges]]
    units = {unit for unit in bpe["vocab"] if len(unit) == 1} | {"".join(pair) for pair in pairs}
    return sorted(bpe["vocab"][unit] for unit in units)


def quantize_text(model: AudioPhiForConditionalGeneration) -> None:
    """NF4 weights in the LLM's linear layers (QLoRA, Dettmers et al. 2023); LoRA is then trained on top of them.

    Raises RecipeError without bitsandbytes, or for an LLM none of whose matrices fits.
    """
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise RecipeError(
            "components.quantize_text: 4bit needs bitsandbytes: pip install bitsandbytes, or set it to none"
        ) from None
    language_model = model.model.language_model
    try:
        names, _ = matrices_for_4bit(language_model)
    except ValueError as error:
        raise RecipeError(f"components.quantize_text: {error}") from None
    for name in names:
        module = language_model.get_submodule(name)
        has_bias = module.bias is not None
        small = bnb.nn.Linear4bit(
            module.in_features, module.out_features, has_bias, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        small.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
        small.bias = module.bias
        parent, _, child = name.rpartition(".")
        setattr(language_model.get_submodule(parent), child, small)
    language_model.is_loaded_in_4bit = True  # peft then picks its 4-bit LoRA layers


def part_of(name: str) -> str:
    """Which part a parameter belongs to: "encoder", "adapter" (with all else that is new and small: alignment, readout,
    clip tokens, layer mix) or "llm"."""
    if ".layer_choice." in name:
        return "adapter"
    if name.startswith("model.audio_tower."):
        return "encoder"
    return "llm" if name.startswith(("model.language_model.", "lm_head.")) else "adapter"


def apply_tuning(model: AudioPhiForConditionalGeneration, stage: Stage) -> None:
    """Sets `requires_grad` for a stage, adding LoRA layers where it asks for them and there are none yet, or widening
    those that there are."""
    for part, how in (("audio", stage.tune.encoder), ("text", stage.tune.llm)):
        if how == "lora" and model.config.lora.get(part) is None:
            model.add_lora(part, stage.lora_arguments)
        elif how == "lora" and stage.lora is not None:
            model.widen_lora(part, stage.lora_arguments)
        model.tune(part, how)
    unused = unused_parameters(model, stage)
    for name, parameter in model.named_parameters():
        if part_of(name) == "adapter":
            readout = name.startswith(("model.readout.", "model.clip_tokens.")) and stage.tune.readout
            parameter.requires_grad_((readout or stage.tune.adapter) == "full" and not name.startswith(unused))
        if parameter.requires_grad:  # peft makes LoRA layers in the precision of what they change
            parameter.data = parameter.data.float()


def unused_parameters(model: AudioPhiForConditionalGeneration, stage: Stage) -> tuple[str, ...]:
    """Prefixes of adapter parameters that a stage's loss does not reach."""
    readout = model.model.readout
    if stage.loss == "align":
        return () if readout.learns_sounds else ("model.readout.",)
    if not stage.aligns and readout.learns_sounds:
        return ("model.readout.sound_words.",)
    if not stage.aligns and model.config.readout == "frames":
        return ("model.alignment.",)
    return ()
