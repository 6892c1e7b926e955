"""Configuration of XEUS (https://arxiv.org/abs/2407.00837), a self-supervised speech encoder for 4,057 languages.

The defaults are the released model, `espnet/xeus` on the Hub (weights: CC-BY-NC-SA-4.0). Importing this file registers
the model type with transformers, because transformers resolves the configs inside another config through AutoConfig
only.
"""

from transformers import AutoConfig, PreTrainedConfig


class XeusConfig(PreTrainedConfig):
    """Sizes and behaviour of a XEUS encoder.

    Args:
        conv_dim, conv_kernel, conv_stride: channels, kernel (samples or frames) and stride of each convolution of the
            waveform frontend; together they make one frame of 320 samples at 16 kHz.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: of the E-Branchformer blocks.
        cgmlp_size: inner width of the convolutional gating MLP, even; half of it is gated by the other half.
        cgmlp_kernel_size, merge_kernel_size: frames that the depthwise convolutions see, odd.
        num_conv_pos_embeddings, num_conv_pos_embedding_groups: frames and groups of the positional convolution.
        layer_norm_eps: of the blocks' LayerNorms; 1e-12 in ESPnet. The frontend's have 1e-5, PyTorch's default.
        hidden_dropout, attention_dropout: probabilities, in training.
        espnet_exact: True does as ESPnet does: waveforms are normalised over the whole batch, padding included, and
            the convolutions see padding, so that a clip's features depend on the clips it is batched with. False (the
            default) normalises each clip over its own samples and hides padding; both are equal for one clip without
            padding.

    Raises ValueError for sizes that do not fit together.
    """

    model_type = "xeus"

    conv_dim: list[int] | tuple[int, ...] = (512, 512, 512, 512, 512, 512, 512)
    conv_kernel: list[int] | tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: list[int] | tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    hidden_size: int = 1024
    num_hidden_layers: int = 19
    num_attention_heads: int = 8
    intermediate_size: int = 4096
    cgmlp_size: int = 4096
    cgmlp_kernel_size: int = 31
    merge_kernel_size: int = 31
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    layer_norm_eps: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.02
    espnet_exact: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride):
            raise ValueError(
                f"xeus: conv_dim, conv_kernel and conv_stride have {len(self.conv_dim)}, {len(self.conv_kernel)} and "
                f"{len(self.conv_stride)} entries; each needs one per convolution"
            )
        for name in ("num_attention_heads", "num_conv_pos_embedding_groups"):
            if self.hidden_size % getattr(self, name):
                raise ValueError(f"xeus: hidden_size {self.hidden_size} is no multiple of {name} {getattr(self, name)}")
        for name in ("cgmlp_kernel_size", "merge_kernel_size"):
            if getattr(self, name) % 2 == 0:
                raise ValueError(f"xeus: {name} must be odd, got {getattr(self, name)}")
        if self.cgmlp_size % 2:
            raise ValueError(f"xeus: cgmlp_size must be even, got {self.cgmlp_size}")


# The same file may come twice, from this package and from a checkpoint's remote code: the later one takes over.
AutoConfig.register("xeus", XeusConfig, exist_ok=True)
