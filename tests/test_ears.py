"""Two ears: the encoder's own decoder, and the alignment, which chooses among its texts."""

import json

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers import AutoModel, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, pipeline

from audiophi.data.collator import AudioPhiCollator
from audiophi.training.callbacks import Development
from audiophi.training.corpus import BadRows, Corpus
from audiophi.training.ears_fit import choose, fit_ears
from audiophi.training.recipe import Source
from modeling_audiophi import AudioPhiForConditionalGeneration, decoder_whisper
from modeling_audiophi.decoder_whisper import WhisperDecoder
from modeling_audiophi.ears_audiophi import ctc_scores, of_clip, read_instead
from processing import AudioPhiProcessor
from tests.conftest import CORPUS, message, prompts, random_like_trained, tiny_tokenizer


@pytest.fixture(scope="module")
def whisper_dir(tmp_path_factory):
    """Whisper that writes words: as `tiny_whisper_dir`, with a tokenizer."""
    path = tmp_path_factory.mktemp("whisper-with-words")
    tokenizer = tiny_tokenizer()
    config = WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=16, d_model=32, encoder_layers=2, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_source_positions=100, max_target_positions=12, pad_token_id=2, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = random_like_trained(WhisperForConditionalGeneration(config))
    model.generation_config.suppress_tokens = [*range(2), *range(3, 270)]  # words of several letters
    model.save_pretrained(path)
    WhisperFeatureExtractor(feature_size=16, chunk_length=2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def cascade(whisper_dir, tiny_llm_dir):
    """A model of components alone, and its processor."""
    processor = AudioPhiProcessor.from_components(whisper_dir, tiny_llm_dir)
    model = AudioPhiForConditionalGeneration.from_components(
        audio=whisper_dir, text=tiny_llm_dir, hear_with="decoder", audio_token_id=processor.audio_token_id
    )
    return model.eval(), processor.match_model(model.config)


def own_words(whisper_dir, wave, **settings):
    whisper = WhisperForConditionalGeneration.from_pretrained(whisper_dir)
    extractor = WhisperFeatureExtractor.from_pretrained(whisper_dir)
    features = extractor(wave, sampling_rate=16_000, return_tensors="pt").input_features
    written = whisper.generate(features, **settings)
    return [text.strip() for text in tiny_tokenizer().batch_decode(written, skip_special_tokens=True)]


def test_without_training_a_transcript_is_what_whisper_writes(cascade, whisper_dir, waveform, monkeypatch):
    model, processor = cascade
    waves = [waveform(0.7), waveform(1.9, 1)]
    expected = [own_words(whisper_dir, wave)[0] for wave in waves]
    assert expected[0] and expected[1]
    pipe = pipeline("audio-text-to-text", model=model, processor=processor)
    monkeypatch.setattr(model.model.language_model, "forward", None)  # no pass of the LLM
    alone = [pipe(wave, sampling_rate=16_000)["generated_text"] for wave in waves]
    assert alone == expected
    together = pipe(waves, sampling_rate=16_000, batch_size=2)
    assert [result["generated_text"] for result in together] == expected


def test_questions_are_answered_by_the_llm_that_reads_the_words(cascade, whisper_dir, waveform):
    model, processor = cascade
    wave, question = waveform(0.7), "What is said?"
    heard = prompts(processor, [[wave]])
    written = model.generate(**heard, max_new_tokens=5, do_sample=False)[0, heard["input_ids"].shape[1] :]
    ids = heard["input_ids"][0]
    place = (ids == processor.audio_token_id).nonzero().item()
    words = processor.tokenizer.encode(" " + own_words(whisper_dir, wave)[0], return_tensors="pt")[0]
    read = torch.cat([ids[:place], words, ids[place + 1 :]])[None]
    expected = model.generate(read, attention_mask=torch.ones_like(read), max_new_tokens=5, do_sample=False)
    assert torch.equal(written, expected[0, read.shape[1] :])
    pipe = pipeline("audio-text-to-text", model=model, processor=processor)
    assert isinstance(pipe(wave, sampling_rate=16_000, instruction=question, max_new_tokens=3)["generated_text"], str)


def test_both_takes_the_candidate_that_the_alignment_prefers(
    make_tiny_model, whisper_dir, waveform, monkeypatch, tmp_path
):
    model, processor = make_tiny_model(audio=whisper_dir, hear_with="both", readout="collapse")
    inputs = prompts(processor, [[waveform(0.7)]])
    start = inputs["input_ids"].shape[1]
    model.words_decoder()
    words = dict.fromkeys(" ".join(CORPUS).lower().split())
    known = [word for word in words if all(10 <= i < 310 for i in model.words_as_tokens(word))]
    first, second, third = known[:3]
    pairs = [(first, -0.1), (second, -0.2), (third, -0.3)]
    monkeypatch.setattr(model, "_decoder", (lambda *args: [pairs], model.words_decoder()[1]), raising=False)
    heard = model.words_as_tokens(second)  # that the alignment is sure of
    vocab = model.model.alignment.vocab_ids.tolist()

    def align(tokens, table):
        logits = torch.zeros(*tokens.shape[:2], len(vocab) + 1)
        for frame in range(tokens.shape[1]):
            logits[:, frame, vocab.index(heard[frame]) + 1 if frame < len(heard) else 0] = 9.0
        return logits

    monkeypatch.setattr(model.model, "align", align)
    # Development clips say how much the alignment counts: no more than it must.
    audio_inputs = {name: value for name, value in inputs.items() if name.startswith(("input_f", "audio"))}
    fusion = model.decoding_settings(task="transcribe")[2]
    scored = model.score_words(model.hear(audio_inputs, "both"), fusion)
    assert [pair[:2] for pair in scored[0]] == pairs and max(scored[0], key=lambda pair: pair[2])[0] == second
    for said in (second, first):
        folder = tmp_path / said
        folder.mkdir()
        soundfile.write(folder / "a.wav", waveform(0.7), 16_000)
        (folder / "metadata.jsonl").write_text((json.dumps({"audio": "a.wav", "text": said}) + "\n") * 3)
        corpus = Corpus([Source(str(folder))], BadRows(folder / "bad.jsonl", 1.0), "lower", None)
        development = Development(corpus, processor, 3, 1, 8)
        fit_ears(model, development, {"hear_ctc_weight": 0.3, "hear_lm_weight": 0.0}, folder, print)
        assert not (folder / "decoding.json").exists()
        fit_ears(model, development, {"hear_lm_weight": 0.0}, folder, print)
        told = json.loads((folder / "decoding.json").read_text())["ears"]
        chosen = told["chosen"]
        assert (told["clips"], told["domains"]) == (3, 1) and chosen["hear_lm_weight"] == 0.0
        assert (chosen["hear_ctc_weight"] > 0) == (said == second)
        assert {round(trial["error_rate"], 6) for trial in told["tried"]} == {0.0, 100.0}
        assert (told["words"], told["wrong"]) == (3, 0)
        assert {name: getattr(model.generation_config, name) for name in chosen} == chosen

    def transcript(**settings):
        written = model.generate(**inputs, task="transcribe", verbatim=True, **settings)[0, start:]
        return processor.tokenizer.decode(written, skip_special_tokens=True)

    assert transcript(hear_ctc_weight=0.0, hear_lm_weight=0.0) == first
    assert transcript(hear_ctc_weight=1.0, hear_lm_weight=0.0) == second
    assert transcript(hear_ctc_weight=1.0, hear_with="decoder") == first
    # The LLM without audio and LoRA reads all candidates in one pass, short ones as if alone.
    mixed = [(first, 0.0), (f"{second} {third} {first}", 0.0)]
    scores = model._prior_scores(mixed, fusion)
    language_model, begin = model.model.language_model, model.prior_start(fusion)
    for (text, _), score in zip(mixed, scores, strict=True):
        ids = torch.tensor([[begin, *model.words_as_tokens(text, verbatim=True)]])
        likely = model.compute_logits(language_model(input_ids=ids).last_hidden_state)[0, :-1].log_softmax(-1)
        assert torch.isclose(score, likely.gather(-1, ids[0, 1:, None]).mean(), atol=1e-5)
    preferred = int(model._prior_scores(pairs, fusion).argmax())
    assert transcript(hear_ctc_weight=0.0, hear_lm_weight=1e6) == pairs[preferred][0]
    assert len(model._prior_scores([], fusion)) == 0


def test_the_alignment_counts_no_more_than_development_clips_can_tell():
    grid = [(weight, lm) for weight in (0.0, 0.01, 0.1) for lm in (0.0, 0.1)]
    words, domains = torch.full((40,), 10.0), ["a"] * 30 + ["b"] * 10
    errors = torch.ones(6, 40)
    errors[:2, 30:] = 9.0  # without it domain b is lost
    errors[3] = 0.9  # the LLM helps beside it
    errors[5] = 0.9
    errors[5, 0] -= 0.5  # better on a single clip: no more than chance
    rates, place = choose(grid, errors, words, domains)
    assert grid[place] == (0.01, 0.1) and rates[5] < rates[3] == pytest.approx(9.0)
    assert rates[0] == pytest.approx((10 + 90) / 2)  # each domain alike
    errors[5] -= 0.5
    assert grid[choose(grid, errors, words, domains)[1]] == (0.1, 0.1)


def test_the_alignments_own_text_is_a_candidate_and_is_read_as_the_readout(make_tiny_model, whisper_dir, waveform):
    model, processor = make_tiny_model(audio=whisper_dir, hear_with="both", readout="collapse")
    inputs = prompts(processor, [[waveform(0.7)]])
    audio_inputs = {name: value for name, value in inputs.items() if name.startswith(("input_f", "audio"))}
    alone = model.get_audio_features(**audio_inputs, return_dict=True)
    both = model.hear(audio_inputs, "both")
    spelled = both.spelled[0]
    assert spelled and [text for text, _ in both.words[0]].count(spelled) == 1 and len(both.words[0]) > 1
    # The decoder scores it as its own: mean log probability of its tokens and of the end.
    decoder, tokenizer = model.words_decoder()
    features = decoder._padded(inputs["input_features"], model.model._as_mask(inputs["input_features"], None))[0]
    ids = torch.tensor([[1, *decoder.tokenizer.encode(" " + spelled, add_special_tokens=False), 2]])
    logits = decoder.model(input_features=features, decoder_input_ids=ids[:, :-1]).logits.log_softmax(-1)
    expected = logits[0].gather(-1, ids[0, 1:, None]).mean().item()
    assert dict(both.words[0])[spelled] == pytest.approx(expected, abs=1e-4)
    both.words[0].sort(key=lambda pair: pair[0] != spelled)
    assert torch.equal(model.read_words(both).pooler_output, alone.pooler_output)
    both.words[0].reverse()
    read = model.words_as_tokens(both.words[0][0][0])
    assert torch.equal(model.read_words(both).pooler_output, model.model.embed(torch.tensor(read)))


def test_where_the_alignment_hears_nothing_nothing_is_said(make_tiny_model, whisper_dir, waveform, monkeypatch):
    model, processor = make_tiny_model(audio=whisper_dir, hear_with="both", readout="mixed")
    inputs = prompts(processor, [[waveform(0.7)]])
    vocabulary = len(model.model.alignment.vocab_ids) + 1
    blank = torch.eye(vocabulary)[0] * 9
    monkeypatch.setattr(model.model, "align", lambda tokens, table: blank.expand(*tokens.shape[:2], vocabulary))
    decoder, tokenizer = model.words_decoder()
    monkeypatch.setattr(model, "_decoder", (None, tokenizer))  # not even asked
    written = model.generate(**inputs, task="transcribe", verbatim=True)[0, inputs["input_ids"].shape[1] :]
    assert processor.tokenizer.decode(written, skip_special_tokens=True) == ""
    monkeypatch.setattr(model, "_decoder", (decoder, tokenizer))
    words = model.generate(**inputs, task="transcribe", verbatim=True, hear_with="decoder")[0]
    assert len(words) > inputs["input_ids"].shape[1] + 1


def test_a_text_that_does_not_end_is_none(whisper_dir, waveform, monkeypatch):
    decoder = WhisperDecoder(whisper_dir, "cpu", torch.float32)
    extractor = WhisperFeatureExtractor.from_pretrained(whisper_dir)
    given = extractor([waveform(0.7), waveform(1.9, 1)], sampling_rate=16_000, return_tensors="pt",
                      return_attention_mask=True)  # fmt: skip
    features, mask = given["input_features"], given["attention_mask"].bool()
    decoder.model.generation_config.suppress_tokens = [*decoder.model.generation_config.suppress_tokens, 2]
    long = decoder(features, mask, 2)
    assert all(long)  # as long as Whisper can write: the seconds say nothing
    monkeypatch.setattr(decoder_whisper, "TOKENS", 0)
    monkeypatch.setattr(decoder_whisper, "TOKENS_PER_SECOND", 5)
    assert decoder(features, mask, 2) == [[], []]
    decoder.model.generation_config.suppress_tokens = decoder.model.generation_config.suppress_tokens[:-1]


def test_what_is_written_does_not_depend_on_the_batch(whisper_dir, waveform):
    decoder = WhisperDecoder(whisper_dir, "cpu", torch.float32)
    extractor = WhisperFeatureExtractor.from_pretrained(whisper_dir)
    waves = [waveform(seconds, seed) for seed, seconds in enumerate((0.3, 0.7, 1.7, 0.6, 1.9))]
    given = extractor(waves, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True)
    features, mask = given["input_features"], given["attention_mask"].bool()
    others = ["the cat", None, "a dog", "", "birds"]
    together = decoder(features, mask, 2, others)
    for row in range(len(waves)):
        alone = decoder(features[[row]], mask[[row]], 2, others[row : row + 1])[0]
        assert [text for text, _ in alone] == [text for text, _ in together[row]]
        assert [score for _, score in alone] == pytest.approx([score for _, score in together[row]], abs=1e-5)
    # What is longer than Whisper reads is left out.
    assert "a " * 50 not in dict(decoder(features[[0]], mask[[0]], 2, ["a " * 50])[0])


def test_training_reads_written_words_where_the_decoder_would_write_them(make_tiny_model, whisper_dir, waveform):
    model, processor = make_tiny_model(audio=whisper_dir, readout="collapse")
    items = [written_item(processor, waveform(0.5 + number / 4, number), "The dog barks!") for number in range(3)]
    items[1]["transcripts"] = [None]
    collate = AudioPhiCollator(processor, "lm", written=1.0)
    batch = collate(items)
    words = processor.tokenizer.encode(" the dog barks", add_special_tokens=False)
    assert batch["written"] == [words, None, words]
    alone = collate(items[:1])
    ids, labels = alone["input_ids"][0], alone["labels"][0]
    place = (ids == processor.audio_token_id).nonzero().item()
    read = torch.cat([ids[:place], torch.tensor(words), ids[place + 1 :]])[None]
    told = torch.cat([labels[:place], torch.full((len(words),), -100), labels[place + 1 :]])[None]
    expected = model(input_ids=read, attention_mask=torch.ones_like(read), labels=told).loss
    assert model(**alone).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    shares = [AudioPhiCollator(processor, "lm", written=0.5)(
        [{**items[0], "id": row, "epoch": 1} for row in range(64)])["written"] for _ in range(2)]  # fmt: skip
    assert shares[0] == shares[1] and 16 < sum(text is not None for text in shares[0]) < 48


def test_sounds_and_clip_tokens_stay_beside_written_words(make_tiny_model, whisper_dir, waveform):
    model, processor = make_tiny_model(audio=whisper_dir, readout="mixed", clip_tokens=2)
    inputs = prompts(processor, [[waveform(1.9)]])
    audio_inputs = {name: value for name, value in inputs.items() if name.startswith(("input_f", "audio"))}
    audio = model.get_audio_features(**audio_inputs, return_dict=True)
    audio.is_word = torch.arange(len(audio.pooler_output)) >= 3  # two clip tokens, a sound
    words = model.model.embed(torch.tensor([20, 21]))
    read = read_instead(audio, [[20, 21]], [False], model.model.embed, model.device)
    assert torch.equal(read.pooler_output, torch.cat([audio.pooler_output[:3], words])) and read.counts.tolist() == [5]
    own = model.get_audio_features(**audio_inputs, return_dict=True)
    path = own.align_logits.argmax(-1)[own.keep]
    assert own.is_word.tolist() == [False, False, *(path > 0).tolist()]


def written_item(processor, wave, text):
    return {
        "messages": [
            {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "What is said?"}]},
            {"role": "assistant", "content": "a dog"},
        ],
        "clips": [processor.encode_audio((wave, 16_000))], "transcripts": [text], "described": [None], "read": None,
        "sounds": None, "id": "row", "epoch": 0,
    }  # fmt: skip


def test_ctc_scores_are_those_of_all_paths_and_know_every_token():
    from tests.test_ctc_scoring import VOCAB_IDS, random_log_probs, transcripts

    log_probs = random_log_probs(4, 0)
    total = transcripts(log_probs)
    scores = ctc_scores(log_probs[0], [[3, 3], [7, 8], [], [99]], VOCAB_IDS)
    expected = torch.tensor([total[3, 3], total[7, 8], total[()]]).log() / torch.tensor([2, 2, 1])
    assert torch.allclose(scores[:3], expected, atol=1e-5) and torch.isfinite(scores[3])


def test_a_clip_of_several_windows_has_the_best_of_each():
    assert of_clip([[("a", -1.0), ("b", -2.0)], [], [("c", -3.0)]]) == [("a c", -2.0)]
    assert of_clip([[], []]) == []


def test_checkpoints_keep_the_ears_and_stay_slim(make_tiny_model, whisper_dir, waveform, tmp_path):
    model, processor = make_tiny_model(audio=whisper_dir, hear_with="both", readout="collapse")
    inputs = prompts(processor, [[waveform(0.7)]])
    before = model.generate(**inputs, task="transcribe", hear_beams=3)
    model.save_pretrained(tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    assert not [key for key in kept if "decoder" in key or "audio_tower" in key]
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.config.hear_with == "both" and "_decoder" not in vars(loaded)
    loaded.generate(**inputs, hear_with="alignment", max_new_tokens=2)
    assert "_decoder" not in vars(loaded)  # not even read
    assert torch.equal(loaded.generate(**inputs, task="transcribe", hear_beams=3), before)


def test_what_has_no_decoder_is_refused_by_name(make_tiny_model, tiny_wavlm_dir, whisper_dir, tiny_llm_dir, waveform):
    with pytest.raises(ValueError, match="the wavlm encoder has no decoder"):
        AudioPhiForConditionalGeneration.from_components(tiny_wavlm_dir, tiny_llm_dir, hear_with="decoder")
    model, processor = make_tiny_model(audio=tiny_wavlm_dir)
    inputs = prompts(processor, [[waveform(0.7)]])
    with pytest.raises(ValueError, match="the wavlm encoder has no decoder"):
        model.generate(**inputs, hear_with="decoder")
    with pytest.raises(ValueError, match="needs an alignment head"):
        AudioPhiForConditionalGeneration.from_components(whisper_dir, tiny_llm_dir, hear_with="both")
    model, _ = make_tiny_model(audio=whisper_dir)
    with pytest.raises(ValueError, match="expected one of alignment, decoder, both"):
        model.generate(**inputs, hear_with="ears")
    states = {"audio_hidden_states": torch.zeros(1, 10, 32)}
    with pytest.raises(ValueError, match="needs the audio itself"):
        model.generate(inputs["input_ids"], **states, hear_with="decoder")


def test_silence_has_no_words(cascade):
    model, processor = cascade
    pipe = pipeline("audio-text-to-text", model=model, processor=processor)
    assert pipe(np.zeros(16_000, np.float32), sampling_rate=16_000)["generated_text"] == ""
    chat = message([np.zeros(16_000, np.float32)], "What is said?")
    assert isinstance(pipe(chat, max_new_tokens=2)["generated_text"], str)


def test_a_recipe_says_how_its_model_hears(whisper_dir, tiny_llm_dir, tiny_wavlm_dir):
    from audiophi.training.build import build_model, build_processor
    from audiophi.training.recipe import RecipeError, recipe_from_dict

    def built(audio, hear_with):
        stage = {"name": "lm", "loss": "lm", "steps": 1, "batch_size": 1}
        recipe = recipe_from_dict(
            {"name": "ears", "components": {"audio": audio, "text": tiny_llm_dir}, "data": {"train": [{"path": "x"}]},
             "stages": [stage], "hear_with": hear_with}
        )  # fmt: skip
        return build_model(recipe, build_processor(recipe), None)

    assert built(whisper_dir, "decoder").config.hear_with == "decoder"
    assert built(whisper_dir, None).config.hear_with == "alignment"
    with pytest.raises(RecipeError, match="wavlm"):
        built(tiny_wavlm_dir, "decoder")
