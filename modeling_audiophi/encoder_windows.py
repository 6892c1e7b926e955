"""What the encoders of a fixed window have in common (LanguageBind, AST, CLAP): sound encoders that read pictures.

The processor gives whole windows, filled up as the encoder's makers did, and a mask of the real frames. All of a window
goes through the encoder, as in its training; only tokens of real frames come out. So a clip's tokens never depend on
its batch, and filling makes no token.
"""

from torch import nn

from .frequency_pooling import check_pooling
from .lengths_audiophi import length_mask, output_length


class WindowEncoder(nn.Module):
    """Base class; a family adds the static methods of the interface (see encoders.py), `window_size`, and `tokens`."""

    feature_key = "input_features"
    time_axis = 1
    fixed_window = True
    settings = ("frequency_pooling",)  # what a recipe's components.audio_settings may change

    def __init__(self, config):
        super().__init__()
        check_pooling(self.pooling(config))
        self.config = config

    @staticmethod
    def pooling(config):
        """How patches of one moment become a token; see frequency_pooling.py."""
        return getattr(config, "frequency_pooling", "mean")

    @staticmethod
    def window_size(config):
        """Frames in the features of a window, real and filled up."""
        raise NotImplementedError

    @staticmethod
    def feature_rate(config):
        """Feature frames per second of audio."""
        return 100

    def tokens(self, features):
        """Whole windows (B, window_size, bins) -> (B, T, hidden_size)."""
        raise NotImplementedError

    def forward(self, features, mask):
        """`features` (B, window_size, bins), `mask` (B, window_size) bool, True on the real frames, which come first
        -> hidden (B, T, D), mask (B, T) bool.

        Raises ValueError for features that are not whole windows.
        """
        size = self.window_size(self.config)
        if features.shape[1] != size:
            raise ValueError(
                f"{self.config.model_type} takes whole windows of {size} frames, got {features.shape[1]} frames: make "
                "features with the processor, which cuts and fills up windows"
            )
        lengths = mask.sum(1).clamp(max=self.window_frames(self.config))
        out_lengths = output_length(lengths, self.length_rule(self.config))
        hidden = self.tokens(features.to(next(self.parameters()).dtype))
        hidden = hidden[:, : max(1, int(out_lengths.max()))]
        return hidden, length_mask(out_lengths, hidden.shape[1])
