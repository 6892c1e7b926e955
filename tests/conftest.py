"""Tiny components with random weights, saved as real component folders: nothing here needs a network."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    AutoModel,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    HubertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling_audiophi import (  # noqa: E402
    AudioPhiForConditionalGeneration,
    LanguageBindAudioConfig,
    LanguageBindAudioModel,
)
from processing.feature_extraction_languagebind_audio import LanguageBindAudioFeatureExtractor  # noqa: E402
from tests.tiny_runs import settings, speech  # noqa: E402, F401  fixtures

torch.set_num_threads(1)

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>"]
CORPUS = [
    "the quick brown fox jumps over the lazy dog and runs away from the hungry bear",
    "she sells sea shells by the sea shore while he writes letters to the mayor",
    "Transcribe the speech. Write down what you hear. user assistant system",
    "you are a helpful assistant that listens to the voice and answers with words",
    "it was the best of times it was the worst of times",
]
# ChatML as SmolLM2 has it, without its default system prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# What `make_tiny_model`'s processors and models know of tasks.
PROCESSOR_TASKS = {
    "transcribe": {"instructions": ["Transcribe the speech.", "Write down what is said."], "in_pieces": True},
    "caption": {"instructions": ["Describe the sound."], "in_pieces": False},
}
GENERATION_TASKS = {"transcribe": {"draft_tokens": 16}, "caption": {}}


def tiny_tokenizer(vocab_size=400):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.add_special_tokens({"extra_special_tokens": SPECIAL_TOKENS})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def random_like_trained(model):
    """Larger random weights than the initial ones, so that differences between inputs are visible in outputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1, generator=generator)
    return model


def message(waves, text="Write."):
    """A user's turn: waveforms at 16 kHz, then text."""
    content = [{"type": "audio", "audio": wave, "sampling_rate": 16_000} for wave in waves]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def prompts(processor, clips, side="left"):
    """Model inputs for generation. `clips`: per conversation a list of waveforms."""
    return processor.apply_chat_template(
        [message(waves) for waves in clips],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
        processor_kwargs={"padding_side": side},
    )


def save_llama(path, **sizes):
    """Llama with 2 layers, width 32, context 512, and a byte-level BPE tokenizer with ChatML's tokens."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **{"hidden_size": 32, "intermediate_size": 64, **sizes},
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    random_like_trained(LlamaForCausalLM(config)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def tiny_llm_dir(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("tiny-llm"))


@pytest.fixture(scope="session")
def tiny_whisper_dir(tmp_path_factory):
    """Whisper with 2 encoder layers, width 32, 16 mel bins, windows of 2 s."""
    path = tmp_path_factory.mktemp("tiny-whisper")
    config = WhisperConfig(
        vocab_size=60,
        num_mel_bins=16,
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=100,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    random_like_trained(WhisperForConditionalGeneration(config)).save_pretrained(path)
    WhisperFeatureExtractor(feature_size=16, chunk_length=2).save_pretrained(path)
    return str(path)


WAVEFORM_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
}


def save_waveform_encoder(path, config):
    random_like_trained(AutoModel.from_config(config)).save_pretrained(path)
    normalize = config.feat_extract_norm == "layer"
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=normalize).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def tiny_wav2vec2_dir(tmp_path_factory):
    """wav2vec 2.0 with the group-norm feature extractor of the base models."""
    config = Wav2Vec2Config(feat_extract_norm="group", **WAVEFORM_SIZES)
    return save_waveform_encoder(tmp_path_factory.mktemp("tiny-wav2vec2"), config)


@pytest.fixture(scope="session")
def tiny_wav2vec2_layer_dir(tmp_path_factory):
    """wav2vec 2.0 with the layer-norm feature extractor of the large models."""
    config = Wav2Vec2Config(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True, **WAVEFORM_SIZES)
    return save_waveform_encoder(tmp_path_factory.mktemp("tiny-wav2vec2-layer"), config)


@pytest.fixture(scope="session")
def tiny_hubert_dir(tmp_path_factory):
    config = HubertConfig(feat_extract_norm="layer", do_stable_layer_norm=True, **WAVEFORM_SIZES)
    return save_waveform_encoder(tmp_path_factory.mktemp("tiny-hubert"), config)


@pytest.fixture(scope="session")
def tiny_wavlm_dir(tmp_path_factory):
    config = WavLMConfig(feat_extract_norm="layer", do_stable_layer_norm=True, **WAVEFORM_SIZES)
    return save_waveform_encoder(tmp_path_factory.mktemp("tiny-wavlm"), config)


@pytest.fixture(scope="session")
def tiny_w2v_bert_dir(tmp_path_factory):
    """w2v-BERT 2.0 with 2 layers; features of 2 x 80 mel bins."""
    path = tmp_path_factory.mktemp("tiny-w2v-bert")
    config = Wav2Vec2BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        feature_projection_input_dim=160,
        conv_depthwise_kernel_size=7,
        vocab_size=32,
        output_hidden_size=32,
    )
    random_like_trained(AutoModel.from_config(config)).save_pretrained(path)
    SeamlessM4TFeatureExtractor(feature_size=80, num_mel_bins=80, stride=2, padding_value=0.0).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def make_tiny_model(tiny_whisper_dir, tiny_llm_dir):
    """Factory: make_tiny_model(adapter=..., readout=..., align=True, audio=folder, text=folder, **from_components
    arguments) -> (model, processor)."""

    def make(adapter="conv_mlp", readout="frames", align=True, audio=None, text=None, seed=0, **kwargs):
        from processing import AudioPhiProcessor

        audio, text = audio or tiny_whisper_dir, text or tiny_llm_dir
        processor = AudioPhiProcessor.from_components(audio, text)
        sizes = {
            "stack": 4,
            "hidden_size": 32,
            "kernel_size": 3,
            "num_layers": 1,
            "num_heads": 4,
            "window": 8,
            "queries": 2,
        }
        adapter = {"type": adapter} if isinstance(adapter, str) else adapter
        torch.manual_seed(seed)
        model = AudioPhiForConditionalGeneration.from_components(
            audio=audio,
            text=text,
            adapter={**sizes, **adapter},
            audio_token_id=processor.audio_token_id,
            readout=readout,
            align_vocab_ids=range(10, 310) if align or readout != "frames" else None,
            **kwargs,
        )
        processor.match_model(model.config)
        processor.tasks = copy.deepcopy(PROCESSOR_TASKS)
        model.generation_config.tasks = copy.deepcopy(GENERATION_TASKS)
        return model.eval(), processor

    return make


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, make_tiny_model):
    """Folder of a tiny slim model and its processor; tests that change it work on a copy."""
    model, processor = make_tiny_model(adapter="mlp", readout="frames")
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def waveform():
    """Factory: waveform(seconds, seed) -> float32 noise with a little structure, at 16 kHz."""

    def make(seconds=1.0, seed=0):
        samples = int(seconds * 16_000)
        time = np.arange(samples) / 16_000
        noise = np.random.default_rng(seed).normal(size=samples)
        tone = np.sin(2 * np.pi * (200 + 150 * seed) * time * (1 + time))
        return (0.1 * noise + 0.3 * tone).astype(np.float32)

    return make


@pytest.fixture(scope="session")
def tiny_languagebind_dir(tmp_path_factory):
    """LanguageBind-Audio with 3 layers, width 32, windows of 84 frames x 28 mel bins: 2 x 6 patches, 0.84 s."""
    path = tmp_path_factory.mktemp("tiny-languagebind")
    config = LanguageBindAudioConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_mel_bins=28,
        target_length=84,
    )
    random_like_trained(LanguageBindAudioModel(config)).save_pretrained(path)
    LanguageBindAudioFeatureExtractor(feature_size=28, target_length=84).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def tiny_ast_dir(tmp_path_factory):
    """AST classifier with 2 layers, width 32, windows of 104 frames x 26 mel bins: 2 x 9 patches, 1.04 s."""
    path = tmp_path_factory.mktemp("tiny-ast")
    config = ASTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_mel_bins=26,
        max_length=104,
    )
    random_like_trained(ASTForAudioClassification(config)).save_pretrained(path)
    ASTFeatureExtractor(num_mel_bins=26, max_length=104).save_pretrained(path)
    return str(path)


def save_clap(path, fused):
    """CLAP whose last audio stage has width 32; windows of 10 s at 48 kHz."""
    audio = {"patch_embeds_hidden_size": 4, "hidden_size": 32, "depths": [1, 1, 1, 1]}
    audio |= {"num_attention_heads": [1, 1, 2, 2], "enable_fusion": fused}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ClapConfig(audio_config=audio, text_config={**text, "vocab_size": 20}, projection_dim=8)
    random_like_trained(ClapModel(config)).save_pretrained(path)
    ClapFeatureExtractor(truncation="fusion" if fused else "rand_trunc").save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def tiny_clap_dir(tmp_path_factory):
    return save_clap(tmp_path_factory.mktemp("tiny-clap"), fused=False)


@pytest.fixture(scope="session")
def tiny_fused_clap_dir(tmp_path_factory):
    return save_clap(tmp_path_factory.mktemp("tiny-fused-clap"), fused=True)
