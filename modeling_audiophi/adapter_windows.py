"""What `qformer` and `resampler` share: learned queries that read the encoder's frames window by window."""

from torch import nn

from .lengths_audiophi import length_mask


class WindowAdapter(nn.Module):
    """LayerNorm -> Linear -> `read` each window of `window` frames -> LayerNorm -> Linear; ceil(T / window) * queries
    tokens.

    So tokens grow with duration and never see beyond their window. A subclass owns the learned queries and says in
    `read` how its `block`s use them. Raises ValueError for a hidden_size that the heads do not divide.
    """

    def __init__(self, config, input_size, output_size, block):
        super().__init__()
        if config.hidden_size % config.num_heads:
            raise ValueError(
                f"adapter hidden_size {config.hidden_size} is not a multiple of num_heads {config.num_heads}"
            )
        self.window, self.num_queries = config.window, config.queries
        self.norm = nn.LayerNorm(input_size)
        self.proj_in = nn.Linear(input_size, config.hidden_size)
        self.frame_positions = nn.Embedding(config.window, config.hidden_size)
        self.blocks = nn.ModuleList(
            block(config.hidden_size, config.num_heads, config.dropout) for _ in range(config.num_layers)
        )
        self.norm_out = nn.LayerNorm(config.hidden_size)
        self.proj_out = nn.Linear(config.hidden_size, output_size)

    @staticmethod
    def length_rule(config):
        return [[config.window, config.window, config.window - 1, config.queries]]

    def read(self, frames, real):
        """`frames` (N, window, D), `real` (N, window) bool, where there is a frame -> (N, queries, D), finite also for
        a window of padding only."""
        raise NotImplementedError

    def forward(self, hidden, mask):
        """`hidden` (B, T, input_size), `mask` (B, T) bool -> tokens (B, T', output_size), mask (B, T')."""
        batch, missing = len(hidden), -hidden.shape[1] % self.window
        hidden = nn.functional.pad(self.proj_in(self.norm(hidden)), (0, 0, 0, missing))
        frames = hidden.reshape(-1, self.window, hidden.shape[-1]) + self.frame_positions.weight
        real = nn.functional.pad(mask, (0, missing)).reshape(-1, self.window)
        tokens = self.proj_out(self.norm_out(self.read(frames, real)))
        tokens = tokens.reshape(batch, -1, tokens.shape[-1])
        windows = (mask.sum(1) + self.window - 1) // self.window
        return tokens, length_mask(windows * self.num_queries, tokens.shape[1])
