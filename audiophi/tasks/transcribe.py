"""transcribe: the words of one clip, in order."""

from dataclasses import replace

from audiophi.data.alignment_text import normalise_transcript
from audiophi.data.example import RowError
from audiophi.evaluation import transcripts
from audiophi.evaluation.transcripts import of_characters

from .base import Report, Row, Task, base_example, need_clips, own_question, saying


def renamed(rows: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """(label, key) of scores of words as those of characters, each once."""
    return tuple(dict.fromkeys((of_characters(label), of_characters(key)) for label, key in rows))


class Transcribe(Task):
    name = "transcribe"
    order = 0
    wordings = (
        "Transcribe the speech.",
        "Write down what is said.",
        "What does the speaker say?",
        "Transcribe this recording.",
        "Turn the speech into text.",
    )
    test_wordings = (
        "Please write out the words in this recording.",
        "Give me a transcript of the audio.",
        "Transcribe the audio.",
        "Type what you hear the speaker say.",
    )
    in_pieces = about_words = True
    decoding = {"draft_tokens": 16, "verbatim": True}
    command = "Write down what is said in audio files."
    reads_alignment = True
    conditions = ("silence",)
    shown = ("wer", "wer_align", "listening_gap", "listening_gap_align", "never_stopped")
    main_score = "wer"
    table = (
        ("WER %", "wer"),
        ("  95 % interval", "wer_ci95"),
        ("CER %", "cer"),
        ("substitutions", "substitutions"),
        ("deletions", "deletions"),
        ("insertions", "insertions"),
        ("words", "words"),
        ("utterances", "utterances"),
        ("WER %, alignment head alone", "wer_align"),
        ("WER %, another clip's audio", "wer_shuffled_audio"),
        ("WER %, silence", "wer_silence"),
        ("listening gap", "listening_gap"),
        ("never stopped %", "never_stopped"),
        ("empty %", "empty"),
        ("real-time factor", "rtf"),
    )
    report = Report(
        type="automatic-speech-recognition",
        name="Speech recognition",
        rows=(
            ("word error rate, %", "wer"),
            ("character error rate, %", "cer"),
            ("word error rate of the alignment head alone, %", "wer_align"),
            ("word error rate with another clip's audio, %", "wer_shuffled_audio"),
            ("word error rate with silence, %", "wer_silence"),
            ("listening gap, points", "listening_gap"),
            ("never stopped, %", "never_stopped"),
        ),
        needed=("wer_ci95", "wer_ci95_unit", "utterances", "words", "normalizer"),
        optional=("cer",),
        gap={None: ("wer_shuffled_audio", "wer")},
        size="utterances",
        tag="automatic-speech-recognition",
        summary="speech to text",
        output="the words that were said",
    )

    def example(self, row: Row):
        need_clips(row)
        if len(row.clips) > 1:
            raise RowError(f"{row.id}: has {len(row.clips)} clips, a transcript is of one")
        text = row.text if row.text is not None else row.answers[0] if row.answers else None
        if not (text or "").strip():
            raise RowError(f"{row.id}: has no text")
        return base_example(
            self, row, clips=saying(row.clips, text), messages=own_question(row), references=(text,), transcript=text
        )

    def target(self, text, text_case="lower"):
        # With a space, as in running text: so its tokens are the alignment's, first word included.
        return " " + normalise_transcript(text, text_case)

    def fields(self, example, hypothesis):
        return transcripts.errors_of(example.reference, hypothesis, example.language)

    def so_far(self, predictions):
        return f"error rate so far {transcripts.rate_so_far(predictions)} %"

    def summarize(self, predictions, **options):
        return transcripts.summarize(predictions, **options)

    def development(self, predictions):
        scores = transcripts.summarize(predictions)
        if (align := scores[f"{scores['main_score']}_align"]) is not None:
            shuffled = transcripts.shuffled_error_rate(predictions, "hypothesis_align")
            scores["listening_gap_align"] = None if shuffled is None else shuffled - align
        return scores

    def scored_as(self, metrics):
        return TranscribeCharacters() if metrics.get("main_score") == "cer" else self


class TranscribeCharacters(Transcribe):
    """The same in languages without spaces between words, where characters are counted."""

    main_score = "cer"
    shown = tuple(map(of_characters, Transcribe.shown))
    table = renamed(Transcribe.table)
    report = replace(
        Transcribe.report,
        rows=renamed(Transcribe.report.rows),
        needed=tuple(map(of_characters, Transcribe.report.needed)),
        optional=(),
        gap={None: ("cer_shuffled_audio", "cer")},
    )
