"""When each word is said: forced alignment of what is written, across windows, and against a synthesiser's truth."""

import difflib
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import pipeline

import audiophi  # noqa: F401
from modeling_audiophi import AudioPhiForConditionalGeneration
from modeling_audiophi.word_times_audiophi import spelling_of, word_times
from processing import AudioPhiProcessor

RATE = 16_000
SHORT = {"max_new_tokens": 8}
CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoints" / "audiophi-tiny"
PIECES = {" the": 1, " fox": 2, "fox": 3, " f": 4, "o": 5, "x": 6, "'s": 7}


def frames(*classes, sure=8.0):
    """Log probabilities (T, 8) of frames that each sound like one of the classes, 0 the blank."""
    logits = torch.zeros(len(classes), 8)
    logits[range(len(classes)), list(classes)] = sure
    return logits.log_softmax(-1)


def test_words_are_spelt_in_as_few_pieces_as_there_are():
    assert spelling_of("fox", PIECES) == [2] and spelling_of("fox's", PIECES) == [2, 7]
    assert spelling_of("Fox,", PIECES) == [2] and spelling_of("foxo", PIECES) == [2, 5]
    assert spelling_of("dog", PIECES) == [] == spelling_of("—", PIECES)


def test_each_word_is_where_its_frames_are():
    heard = frames(0, 0, 1, 1, 0, 2, 2, 2, 0, 0)
    times = word_times(["the", "fox"], heard, PIECES, 0.1, blank_penalty=0.0)
    assert times == [pytest.approx((0.2, 0.4)), pytest.approx((0.5, 0.8))]


def test_a_peak_lasts_till_the_next_word_where_blank_is_less_likely():
    (_, end), (start, _) = word_times(["the", "fox"], frames(0, 1, 0, 0, 0, 2), PIECES, 0.1)
    assert end == pytest.approx(start)


def test_words_that_cannot_be_spelt_lie_between_their_neighbours():
    times = word_times(["dogs", "the", "big", "cats", "fox", "dog"], frames(0, 0, 1, 0, 0, 0, 2, 0), PIECES, 0.1, 0.0)
    flat = [value for pair in times for value in pair]
    assert flat == sorted(flat) and times[1] == pytest.approx((0.2, 0.3)) and times[4] == pytest.approx((0.6, 0.7))
    assert times[0][0] == 0 and times[2][0] == pytest.approx(0.3) and times[5][1] == pytest.approx(0.8)
    assert times[3][1] - times[3][0] == pytest.approx(0.3 * 4 / 7)


def test_more_words_than_frames_share_the_clip():
    times = word_times(["the", "the", "the"], frames(1, 0, 1), PIECES, 0.1)
    assert times[0][0] == 0 and times[-1][1] == pytest.approx(0.3) and len(times) == 3
    assert word_times([], frames(0, 0), PIECES, 0.1) == []


@pytest.fixture(scope="module")
def pipe(make_tiny_model):
    """Of a tiny random model, which writes words whatever it hears."""
    model, processor = make_tiny_model(readout="collapse")
    processor.tasks = {"transcribe": {"instructions": ["Transcribe the speech."], "in_pieces": True}}
    return pipeline("audio-text-to-text", model=model, processor=processor)


def test_words_of_a_long_recording_have_times_in_order_within_their_pieces(pipe, waveform):
    long = waveform(5.0, seed=5)
    pieces = pipe((long, RATE), return_timestamps=True, **SHORT)["chunks"]
    result = pipe((long, RATE), return_timestamps="word", **SHORT)
    words = result["chunks"]
    assert len(pieces) > 2 and [word["text"] for word in words] == result["generated_text"].split() and len(words) > 2
    flat = [value for word in words for value in word["timestamp"]]
    assert flat == sorted(flat) and flat[0] >= 0 and flat[-1] <= 5.0
    spoken = iter(words)
    for piece in pieces:
        for text in piece["text"].split():
            word = next(spoken)
            assert word["text"] == text
            assert piece["timestamp"][0] <= word["timestamp"][0] <= word["timestamp"][1] <= piece["timestamp"][1]
    both = pipe([(long, RATE), (long[:RATE], RATE)], batch_size=4, return_timestamps="word", **SHORT)
    alone = pipe((long[:RATE], RATE), return_timestamps="word", **SHORT)
    for one, other in zip(both, (result, alone), strict=True):
        assert [word["text"] for word in one["chunks"]] == [word["text"] for word in other["chunks"]]
        for word, same in zip(one["chunks"], other["chunks"], strict=True):
            assert word["timestamp"] == pytest.approx(same["timestamp"], abs=0.1)
    assert "chunks" not in pipe((long, RATE), instruction="Who speaks?", return_timestamps="word", **SHORT)


def test_a_model_without_an_alignment_head_says_so(make_tiny_model, waveform):
    model, processor = make_tiny_model(align=False)
    with pytest.raises(ValueError, match="needs an alignment head"):
        pipeline("audio-text-to-text", model=model, processor=processor)(
            (waveform(1.0), RATE), instruction="Write.", return_timestamps="word"
        )


@pytest.mark.slow
def test_words_are_within_80_ms_of_when_the_synthesiser_says_them(tmp_path):
    """festival tells when each word ends, and within a sentence the next one begins then."""
    if shutil.which("festival") is None:
        pytest.skip("festival is not installed")
    sentences = (CHECKPOINT.parents[1] / "data" / "sentences.txt").read_text().splitlines()[100:1300:60]
    script = "".join(
        f'(set! u (SynthText "{text}")) (utt.save.wave u "{tmp_path}/{number}.wav" \'riff) '
        f'(utt.save.words u "{tmp_path}/{number}.words")\n'
        for number, text in enumerate(sentences)
    )
    (tmp_path / "all.scm").write_text(script)
    subprocess.run(["festival", "-b", str(tmp_path / "all.scm")], check=True)
    model = AudioPhiForConditionalGeneration.from_pretrained(CHECKPOINT)
    pipe = pipeline("audio-text-to-text", model=model, processor=AudioPhiProcessor.from_pretrained(CHECKPOINT))
    clips, truths, starts, total = [], [], [], 0.0
    for number in range(len(sentences)):
        rows = [line.split() for line in (tmp_path / f"{number}.words").read_text().splitlines()[1:]]
        truths.append([(row[2], float(row[0])) for row in rows])
        samples, rate = soundfile.read(tmp_path / f"{number}.wav", dtype="float32")
        clips.append(np.pad(samples, (0, rate // 2)))
        starts.append(total)
        total += len(clips[-1]) / rate
    alone = [error for clip, truth in zip(clips, truths, strict=True) for error in late(pipe, clip, rate, truth)]
    # The same as one recording that is cut into windows. When the first word of a sentence begins is not known.
    truth = [
        (word, end + start if place < len(own) - 1 else None)
        for own, start in zip(truths, starts, strict=True)
        for place, (word, end) in enumerate(own)
    ]
    together = late(pipe, np.concatenate(clips), rate, truth)
    for name, errors in (("alone", alone), ("across windows", together)):
        size = np.abs(errors)
        print(
            f"{name}: {len(errors)} words begin late by {np.median(errors):.3f} s, error: "
            f"median {np.median(size):.3f} s, 90 % within {np.quantile(size, 0.9):.3f} s, largest {size.max():.3f} s"
        )
        assert len(errors) > 20 and np.median(size) < 0.08


def late(pipe, clip, rate, truth):
    """Seconds by which words begin after the end of the word before them; `truth`: (word, its end or None), …"""
    chunks = pipe((clip, rate), return_timestamps="word")["chunks"]
    written, said = [chunk["text"] for chunk in chunks], [word for word, _ in truth]
    errors = []
    # Words that were heard wrongly have no time in the truth.
    for place, own, size in difflib.SequenceMatcher(None, said, written, autojunk=False).get_matching_blocks():
        for step in range(0 if place else 1, size):
            if truth[place + step - 1][1] is not None:
                errors.append(chunks[own + step]["timestamp"][0] - truth[place + step - 1][1])
    return errors
