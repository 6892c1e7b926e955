"""Tiny models by name, each built once."""

import copy

import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM

from tests.conformance.cases import ENCODERS, LLMS
from tests.conftest import random_like_trained, tiny_tokenizer


@pytest.fixture(scope="session")
def tiny_phi_dir(tmp_path_factory):
    """Phi with 2 layers, width 32: an untied output layer with a bias, rotations of half the head; no chat format."""
    path = tmp_path_factory.mktemp("tiny-phi")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = PhiConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        **special,
    )
    model = random_like_trained(PhiForCausalLM(config))
    torch.nn.init.normal_(model.lm_head.bias, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def folders(request, tiny_phi_dir):
    """folders(name) -> folders of the encoder and the language model of a case."""
    return lambda name: (
        request.getfixturevalue(ENCODERS[name.split("-")[0]]),
        request.getfixturevalue(LLMS[name.split("-")[1]]),
    )


@pytest.fixture(scope="session")
def build(make_tiny_model, folders):
    """build(name) -> (model, processor), shared by all tests; build(name, fresh=True): a copy that may be changed."""
    built = {}

    def make(name, fresh=False):
        if name not in built:
            audio, text = folders(name)
            adapter = {"type": "conv_mlp", "dropout": 0.0}
            built[name] = make_tiny_model(adapter, name.split("-")[2], audio=audio, text=text)
        model, processor = built[name]
        return (copy.deepcopy(model) if fresh else model), processor

    return make
