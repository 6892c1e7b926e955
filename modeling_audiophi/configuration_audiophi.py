"""Configuration of AudioPhi: an audio encoder, an adapter and a causal language model."""

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .adapters import adapter_class
from .encoders import encoder_class
from .lengths_audiophi import output_length, shortest_input
from .readouts import READOUTS

# What a repository's config.json tells transformers to load with trust_remote_code=True. The files come along because
# they are imported, from here or from `modeling_audiophi.py`; the processor's are saved by the processor.
AUTO_MAP = {
    "AutoConfig": "configuration_audiophi.AudioPhiConfig",
    "AutoModel": "modeling_audiophi.AudioPhiForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_audiophi.AudioPhiForConditionalGeneration",
    "AutoProcessor": "processing_audiophi.AudioPhiProcessor",
}


class AudioPhiAdapterConfig(PreTrainedConfig):
    """The adapter between encoder and language model.

    Args:
        type: exact key of the registry in `adapters.py`: linear, mlp, mlp2x_gelu, conv_mlp, transformer, qformer,
            resampler, identity.
        stack: encoder frames per token (all but qformer, resampler, identity); 4 turns 50 frames/s into 12.5 tokens/s.
        hidden_size: inner width (mlp2x_gelu: the LLM's).
        kernel_size: width of the depthwise convolutions, odd (conv_mlp, transformer).
        num_layers: convolution, attention or query blocks.
        num_heads: attention heads (transformer, qformer, resampler).
        window, queries: encoder frames per window and tokens made of each (qformer, resampler).
        dropout: probability, in training.
    """

    model_type = "audiophi_adapter"
    base_config_key = "adapter_config"

    type: str = "conv_mlp"
    stack: int = 4
    hidden_size: int = 640
    kernel_size: int = 7
    num_layers: int = 2
    num_heads: int = 8
    window: int = 16
    queries: int = 4
    dropout: float = 0.1

    def __post_init__(self, **kwargs):
        for name in ("stack", "hidden_size", "kernel_size", "num_heads", "window", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"adapter {name} must be at least 1, got {getattr(self, name)}")
        super().__post_init__(**kwargs)


EARS = ("alignment", "decoder", "both")


def check_ears(config, hear_with):
    """ValueError for a value of `hear_with` that there is not, or that a model of `config` cannot have."""
    if hear_with not in EARS:
        raise ValueError(f"hear_with {hear_with!r}: expected one of {', '.join(EARS)}")
    if hear_with == "alignment":
        return
    family = config.audio_config.model_type
    if not hasattr(encoder_class(config.audio_config), "decoder"):
        raise ValueError(f"hear_with {hear_with!r}: the {family} encoder has no decoder of words; use 'alignment'")
    if hear_with == "both" and config.align_vocab_size < 1:
        raise ValueError("hear_with 'both' needs an alignment head (align_vocab_ids); use 'decoder' without one")


class AudioPhiConfig(PreTrainedConfig):
    """Everything that shapes an AudioPhi model.

    Args:
        audio_config, text_config: configs of the encoder and the language model (dict or config).
        adapter_config: `AudioPhiAdapterConfig` or dict.
        audio_token_id: id of the placeholder that stands for a clip in the prompt.
        encoder_layer: "last", an index into the encoder's hidden states, or "mix" (learned softmax mix).
        readout: "frames" (every adapter token goes to the LLM), "collapse" (blanks dropped, repeats merged) or "mixed"
            (collapsed words, and a token per second without words).
        hear_with: "alignment" (adapter and readout), "decoder" (the words of the encoder's own decoder, where its
            family has one) or "both" (its candidates, chosen from with the alignment): what `generate` hears with.
        clip_tokens: tokens of each clip as a whole that the LLM reads before the readout's; 0: none.
        align_vocab_size: tokens of the alignment head, the blank not counted; 0 means no head.
        align_spelling: sizes of the head's `Spelling` (entries, buckets, size); None: it knows embeddings only.
        embedding_scale: what the LLM's embeddings are multiplied by (Gemma).
        window_frames: longest encoder window in feature frames; None takes the encoder's own limit (30 s).
        base_components: {"audio": {"id", "revision"}, "text": {...}}: where frozen weights come from.
        tuned: {"audio": ..., "text": ...}: "frozen", "lora" or "full"; what a slim checkpoint has to keep.
        lora: {"audio": ..., "text": ...}: arguments of peft's LoraConfig, or None.
        base_vocab_size: rows of the base LLM's embedding table, before a placeholder was added.
        lm_head_bias: whether the LLM's output layer has a bias (Phi-2).
        slim: whether a checkpoint holds only what differs from its base components; also how `save_pretrained` saves if
            it is not told.

    `audio_length_rule` (feature frames -> audio tokens, see `lengths_audiophi.py`) always follows from encoder and
    adapter.
    """

    # True where the package is installed, which registers the pipeline: transformers must not ask for remote code then.
    pipeline_is_registered = False

    # What a model that hears with its encoder's decoder does without training, as `AudioPhiProcessor.tasks` has it.
    decoder_tasks = {"transcribe": {"instructions": ["Transcribe the speech."], "in_pieces": True}}
    # Of the outputs beside the loss, Trainer's `predict` collects the logits alone.
    keys_to_ignore_at_inference = [
        "past_key_values", "cache", "hidden_states", "attentions", "lm_loss", "align_loss", "sound_loss", "clip_loss",
        "distill_loss", "align_skipped", "align_logits", "audio_counts",
    ]  # fmt: skip
    model_type = "audiophi"
    _auto_class = "AutoConfig"  # its files are saved with it
    sub_configs_defaults = {
        "audio_config": SubConfigSpec(config_class=AutoConfig, model_type="whisper"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "adapter_config": AudioPhiAdapterConfig,
    }

    audio_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    adapter_config: dict | PreTrainedConfig | None = None
    audio_token_id: int = 0
    encoder_layer: str | int = "last"
    readout: str = "frames"
    hear_with: str = "alignment"
    clip_tokens: int = 0
    align_vocab_size: int = 0
    align_spelling: dict | None = None
    embedding_scale: float = 1.0
    window_frames: int | None = None
    audio_length_rule: list | None = None
    base_components: dict | None = None
    tuned: dict | None = None
    lora: dict | None = None
    base_vocab_size: int | None = None
    lm_head_bias: bool = False
    slim: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if self.pipeline_is_registered:
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        encoder = encoder_class(self.audio_config)
        self.audio_length_rule = [
            *encoder.length_rule(self.audio_config),
            *adapter_class(self.adapter_config).length_rule(self.adapter_config),
        ]
        limit = encoder.window_frames(self.audio_config)
        if self.window_frames is None:
            self.window_frames = limit
        fixed = self.audio_config.model_type == "whisper" or getattr(encoder, "fixed_window", False)
        if fixed and self.window_frames > limit:
            raise ValueError(f"window_frames {self.window_frames} is more than the encoder's limit of {limit}")
        if self.readout not in READOUTS:
            raise ValueError(f"readout {self.readout!r}: expected one of {', '.join(READOUTS)}")
        if READOUTS[self.readout].needs_alignment and self.align_vocab_size < 1:
            raise ValueError(
                f"readout {self.readout!r} needs an alignment head: set align_vocab_size (align_vocab_ids)"
            )
        check_ears(self, self.hear_with)
        if self.clip_tokens < 0:
            raise ValueError(f"clip_tokens must be 0 or more, got {self.clip_tokens}")
        if self.audio_token_id >= self.text_config.vocab_size:
            raise ValueError(
                f"audio_token_id {self.audio_token_id} is outside the language model's "
                f"{self.text_config.vocab_size} embeddings"
            )
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        self.base_components = self.base_components or {}
        self.tuned = {"audio": "frozen", "text": "frozen", **(self.tuned or {})}
        self.lora = {"audio": None, "text": None, **(self.lora or {})}

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """As in transformers; names the classes that load the repository anew, whatever it was loaded from."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def shortest_frames(self):
        """Feature frames that a window needs to make a token."""
        return shortest_input(self.audio_length_rule)

    def num_audio_tokens(self, frame_counts):
        """Adapter tokens of a clip whose windows have so many feature frames (ints)."""
        return sum(output_length(frames, self.audio_length_rule) for frames in frame_counts)

    @property
    def audio_tokens_per_second(self):
        """Audio tokens that one second of a long clip makes."""
        rate = encoder_class(self.audio_config).feature_rate(self.audio_config)
        return output_length(1000 * rate, self.audio_length_rule) / 1000
