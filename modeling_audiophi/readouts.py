"""Registry of readouts by exact name: what of the audio the language model gets to read.

To add one: a file `readout_<name>.py` with a class of this interface, and its line here.
    __init__(hidden_size, encoder_size): sizes of the LLM's embeddings and of the encoder's states.
    needs_alignment: whether it looks at the alignment's labels. needs_encoder: likewise at the encoder's states.
    forward(tokens, mask, logits, table, encoded) -> embeds (B, T, D) and keep (B, T) bool, or None for all: `tokens`
        (B, T, D) from the adapter, `mask` (B, T), `logits` (B, T, V' + 1) of the alignment and `table` (V', D), the
        LLM's embeddings of its vocabulary (None each without needs_alignment), `encoded` the encoder's states
        (B, T', E) and their mask (B, T') (None without needs_encoder).
    start_at(rms): fit new parameters to the root mean square of the LLM's embeddings.
    learns_sounds: whether it has sound_loss(embeds, keep, labels, table), see `readout_mixed.py`, which the loss
        `align` trains it with.
"""

from .encoders import encoder_class
from .readout_collapse import CollapseReadout
from .readout_frames import FramesReadout
from .readout_mixed import MixedReadout

READOUTS = {"frames": FramesReadout, "collapse": CollapseReadout, "mixed": MixedReadout}


def build_readout(config):
    """The untrained readout of an `AudioPhiConfig`."""
    encoder_size = encoder_class(config.audio_config).hidden_size(config.audio_config)
    return READOUTS[config.readout](config.text_config.hidden_size, encoder_size)
