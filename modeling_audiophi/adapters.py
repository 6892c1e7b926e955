"""Registry of adapters: exact key (`AudioPhiAdapterConfig.type`) -> class. One small file per idea.

To add one: write `adapter_<name>.py` with `__init__(config, input_size, output_size)`, `length_rule(config)` and
`forward(hidden, mask) -> (tokens, mask)`, add its line here; the relative import is also what makes the file ship to
the Hub.
"""

from .adapter_conv_mlp import ConvMLPAdapter, TransformerAdapter
from .adapter_identity import IdentityAdapter
from .adapter_linear import LinearAdapter
from .adapter_mlp import MLPAdapter
from .adapter_mlp2x_gelu import MLP2xGELUAdapter
from .adapter_qformer import QFormerAdapter
from .adapter_resampler import ResamplerAdapter

ADAPTERS = {
    "linear": LinearAdapter,
    "mlp": MLPAdapter,
    "mlp2x_gelu": MLP2xGELUAdapter,
    "conv_mlp": ConvMLPAdapter,
    "transformer": TransformerAdapter,
    "qformer": QFormerAdapter,
    "resampler": ResamplerAdapter,
    "identity": IdentityAdapter,
}


def adapter_class(adapter_config):
    """Class for `adapter_config`; raises ValueError naming the adapters there are."""
    if adapter_config.type not in ADAPTERS:
        raise ValueError(f"unknown adapter {adapter_config.type!r}; known: {', '.join(sorted(ADAPTERS))}")
    return ADAPTERS[adapter_config.type]
