"""Configuration of LanguageBind-Audio's encoder; see modeling_languagebind_audio.py."""

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .frequency_pooling import check_pooling


class LanguageBindAudioConfig(PreTrainedConfig):
    """A CLIP ViT-L/14 over spectrograms; the defaults are `LanguageBind/LanguageBind_Audio_FT`.

    Args:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, hidden_act, layer_norm_eps,
            attention_dropout, initializer_range: as in transformers' CLIPVisionConfig.
        num_channels: colour channels of the patch embedding, all fed with the same spectrogram.
        patch_size: mel bins and frames of a patch.
        num_mel_bins, target_length: bins and 10 ms frames of a window.
        frequency_pooling: "mean" or "concat" of the patches that share a moment; see frequency_pooling.py.
    """

    model_type = "languagebind_audio"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    num_mel_bins: int = 112
    target_length: int = 1036
    frequency_pooling: str = "mean"

    def __post_init__(self, **kwargs):
        check_pooling(self.frequency_pooling)
        for name in ("num_mel_bins", "target_length"):
            if getattr(self, name) < self.patch_size:
                raise ValueError(f"{name} {getattr(self, name)} is less than one patch of {self.patch_size}")
        super().__post_init__(**kwargs)

    @property
    def grid(self):
        """Patches of a window: (frequency, time), 8 x 74."""
        return self.num_mel_bins // self.patch_size, self.target_length // self.patch_size


# AudioPhi's sub-config resolves through this mapping. The first registration stays: when a checkpoint's own copy of
# this file is loaded beside the installed package, the package's class goes on being what transformers makes.
if LanguageBindAudioConfig.model_type not in CONFIG_MAPPING:
    AutoConfig.register(LanguageBindAudioConfig.model_type, LanguageBindAudioConfig)
