"""How often a training step makes the CPU wait for the device: counted on the CPU, where each such operation is known
by name. On a GPU a small LLM's step is bounded by them."""

import traceback
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import prompts
from tests.test_model import labelled

# Their results are on the CPU, or decide a shape: `.item()`, `int()`, `bool()`, `.tolist()`; boolean indexing; ...
WAITING = {
    *("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.masked_select", "aten.is_nonzero"),
    *("aten._unique2", "aten.unique_consecutive", "aten.unique_dim", "aten.repeat_interleave.Tensor"),
}
MOST = {"lm": 28, "align": 6}  # one of them in a batch that is not packed: has its mask any padding?


class Waits(TorchDispatchMode):
    """Counts the operations of WAITING by who calls them."""

    def __init__(self):
        super().__init__()
        self.places = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        by_mask = name.startswith(("aten.index.", "aten.index_put")) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or name in WAITING or name.rsplit(".", 1)[0] in WAITING:
            own = [frame for frame in traceback.extract_stack() if "modeling_audiophi" in frame.filename]
            place = own[-1] if own else None
            self.places[f"{place.filename.rsplit('/', 1)[-1]}:{place.lineno} {name}" if place else name] += 1
        return func(*args, **(kwargs or {}))


def waits_of(model, inputs):
    with Waits() as waits:
        model(**inputs).loss.backward()
    return waits.places


@pytest.mark.parametrize("loss", ["lm", "align"])
@pytest.mark.parametrize("readout", ["frames", "mixed"])
def test_a_step_waits_as_often_for_many_clips_as_for_few(make_tiny_model, waveform, readout, loss):
    model, processor = make_tiny_model(readout=readout, clip_tokens=2)
    model.train()
    found = []
    for count in (2, 7):
        inputs = prompts(processor, [[waveform(0.6 + 0.1 * i, i)] for i in range(count)], "right")
        labels = labelled(processor, inputs)
        if loss == "lm":
            found.append(waits_of(model, {**inputs, "labels": labels}))
        else:
            audio = {name: value for name, value in inputs.items() if name.startswith("input_features")}
            found.append(waits_of(model, {**audio, "align_labels": torch.randint(20, 40, (count, 3))}))
    few, many = found
    assert sum(many.values()) <= sum(few.values()), many - few
    assert sum(many.values()) <= MOST[loss], many
