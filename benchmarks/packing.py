"""What packing short chats into full rows saves in a training step of the language model.

    python benchmarks/packing.py [--quick] [--minutes 2] [--output benchmarks/results.json]

Eight chats of text alone, of one to six questions each, as a recipe's `turns` makes them; LoRA of rank 8 in the LLM;
forward and backward pass, packed (`modeling_audiophi/packing_audiophi.py`) and padded to the longest, in turn. Real
tokens per second, and the bytes that are kept for the backward pass, which are counted, not timed.
"""

import sys
from unittest import mock

import torch

from measuring import interleaved, make_model, markdown, median, script
from modeling_audiophi import modeling_audiophi

CHATS, QUESTIONS = 8, 6
QUESTION = "Is the word garden said in what you have heard? Answer yes or no."


def chats(processor) -> dict[str, torch.Tensor]:
    """A batch of CHATS chats, padded on the right; the answers are labelled."""
    texts = []
    for number in range(CHATS):
        turns = []
        for _ in range(1 + number % QUESTIONS):
            turns += [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "yes"}]
        texts.append(processor.apply_chat_template(turns, tokenize=False))
    batch = processor.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    answers = batch["input_ids"] == processor.tokenizer.encode("yes", add_special_tokens=False)[0]
    return {**batch, "labels": batch["input_ids"].masked_fill(~answers, -100)}


def step(model, batch, kept: list | None = None) -> float:
    """One forward and backward pass; the loss. `kept` gets the bytes that autograd keeps, each storage once."""
    storages = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad(set_to_none=True)
    if kept is None:
        loss = model(**batch).loss
    else:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**batch).loss
        kept.append(sum(storages.values()))
    loss.backward()
    return loss.item()


def measure(options, save) -> dict:
    model, processor = make_model(options.weights)
    model.add_lora("text", {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"})
    model.tune("text", "lora")
    model.train()
    batch = chats(processor)
    tokens = int(batch["attention_mask"].sum())

    def padded(*given):
        with mock.patch.object(modeling_audiophi, "pack_rows", lambda *ignored: None):
            return step(model, batch, *given)

    def packed(*given):
        return step(model, batch, *given)

    kept = {"packed": [], "padded": []}
    losses = {name: work(kept[name]) for name, work in (("packed", packed), ("padded", padded))}
    if abs(losses["packed"] - losses["padded"]) > 1e-3:
        raise RuntimeError(f"packing changes the loss: {losses}")
    times = interleaved({"packed": packed, "padded": padded}, 1 if options.quick else 5, 60 * options.minutes)
    seconds = {name: median(values) for name, values in times.items()}
    return {
        "tokens": tokens,
        "share_of_padding": 1 - tokens / batch["attention_mask"].numel(),
        "tokens_per_second": {name: tokens / value for name, value in seconds.items()},
        "kept_bytes": {name: values[0] for name, values in kept.items()},
        "headline": {"packing_ratio": round(seconds["padded"] / seconds["packed"], 2)},
    }


def table(section: dict) -> str:
    rows = [[name, f"{section['tokens_per_second'][name]:.0f}", f"{section['kept_bytes'][name] / 2**20:.0f}"]
            for name in ("packed", "padded")]  # fmt: skip
    about = f"{section['tokens']} tokens; of the padded batch {100 * section['share_of_padding']:.0f} % is padding."
    return about + "\n\n" + markdown(["", "tokens/s", "kept for the backward pass, MiB"], rows)


def main(arguments: list[str]) -> int:
    return script("packing", __doc__, measure, table, 2, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
