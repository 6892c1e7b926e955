"""Write a checkpoint as another program wants it: for vLLM's Transformers backend.

vLLM builds the base model that `auto_map["AutoModel"]` names, asks it for audio embeddings, and has an output layer,
a cache and a sampler of its own. So the export is a full checkpoint with LoRA merged and that one line changed, and
everything that vLLM looks for said explicitly. It follows vLLM's sources
(vllm/model_executor/models/transformers/multimodal.py); vLLM itself was never run on one.
"""

import json
from pathlib import Path

BASE_MODEL = "modeling_audiophi.AudioPhiModel"
# Where vLLM looks, in this order, for the most tokens that a clip can make.
TOKEN_LIMITS = ("max_source_positions", "max_position_embeddings", "max_pos_emb")


def add_arguments(parser) -> None:
    parser.add_argument("--vllm", action="store_true", required=True, help="for vLLM (the only form there is)")
    parser.add_argument("folder", metavar="DIR", help="checkpoint")
    parser.add_argument("--output", metavar="OUT", help="new folder (default: DIR-vllm)")
    parser.add_argument(
        "--include_noncommercial", action="store_true", help="encoder weights too whose licence restricts their use"
    )


def run(args) -> int:
    folder = Path(args.folder)
    output = Path(args.output) if args.output else folder.resolve().with_name(f"{folder.resolve().name}-vllm")
    for line in export_for_vllm(folder, output, args.include_noncommercial):
        print(line)
    return 0


def export_for_vllm(folder: Path, output: Path, include_noncommercial: bool = False) -> list[str]:
    """Write `folder`'s checkpoint to `output` for vLLM. Returns what the user has to know, a sentence each.

    Raises ValueError for a model that vLLM cannot serve, and for an `output` that holds something already.
    """
    from audiophi.publishing.architecture import read_config
    from modeling_audiophi import AudioPhiForConditionalGeneration
    from processing import AudioPhiProcessor

    config = read_config(folder)
    if config.readout != "frames":
        raise ValueError(
            f"{folder}: vLLM cannot serve the readout {config.readout!r}: how many tokens a clip makes follows from what "  # noqa: E501
            "was heard in it, but vLLM has the prompt expanded before the encoder runs and drops nothing afterwards. A "
            "model trained with `readout: frames` can be exported; this one runs in transformers"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder: name another one with --output")
    model = AudioPhiForConditionalGeneration.from_pretrained(folder)
    processor = AudioPhiProcessor.from_pretrained(folder)
    if not model.model.language_model.is_backend_compatible():
        raise ValueError(
            f"{folder}: transformers' {config.text_config.model_type} does not let another program compute its attention "  # noqa: E501
            "(_supports_attention_backend), which vLLM needs"
        )
    notes = leave_out_alignment(model)
    seconds = state_limits(model.config, processor)
    model.save_pretrained(output, slim=False, merge_lora=True, include_noncommercial=include_noncommercial)
    processor.save_pretrained(output)
    path = output / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written["auto_map"]["AutoModel"] = BASE_MODEL
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [
        f"written: {output}",
        f"to be served with: vllm serve {output} --trust-remote-code --model-impl transformers",
        "Serving was not run: vLLM has never been tried on such an export. What was tested are config, weight names and "  # noqa: E501
        "the calls that vLLM's Transformers backend makes (transformers 5.15 or newer), in plain transformers.",
        f"A clip may last {seconds:g} s at most, one window of the encoder: vLLM takes one row of features for each clip.",  # noqa: E501
        "vLLM's environment needs torchaudio and soundfile for the processor.",
        *notes,
    ]


def leave_out_alignment(model) -> list[str]:
    """Without its alignment head, which frames do not pass through and whose buffers vLLM's loader may not know.

    Returns what is lost with it, and what else vLLM does not do of how this model is decoded.
    """
    from modeling_audiophi.generation_audiophi import GENERATION_SETTINGS

    settings, notes = model.generation_config, []
    if getattr(settings, "ctc_weight", 0):
        notes.append(
            f"Words are the language model's alone: ctc_weight {settings.ctc_weight} has no counterpart in vLLM."
        )
    for name in GENERATION_SETTINGS:
        if hasattr(settings, name):
            delattr(settings, name)
    if (settings.num_beams or 1) > 1:
        notes.append(f"vLLM samples or decodes greedily: the checkpoint's {settings.num_beams} beams are not used.")
    model.model.alignment = None
    for config in (model.config, model.model.config):
        config.align_vocab_size, config.align_spelling, config.transcribe_endings = 0, None, None
    return notes


def state_limits(config, processor) -> float:
    """Say in config and processor what vLLM looks for: most tokens of a clip, its longest duration, the arrays' rate.

    Returns the duration in seconds, one window.
    """
    from modeling_audiophi.encoders import encoder_class
    from modeling_audiophi.lengths_audiophi import output_length

    audio, extractor = config.audio_config, processor.feature_extractor
    if all(getattr(audio, name, None) is None for name in TOKEN_LIMITS):
        audio.max_source_positions = output_length(config.window_frames, config.audio_length_rule)
    seconds = config.window_frames / encoder_class(audio).feature_rate(audio)
    # vLLM measures its memory on a clip of this length, or of 30 s where it is not said.
    if (getattr(extractor, "chunk_length", None) or 30) > seconds or not hasattr(extractor, "chunk_length"):
        extractor.chunk_length = seconds
    processor.array_rate = processor.sampling_rate  # vLLM resamples, and passes arrays without saying their rate
    return seconds
