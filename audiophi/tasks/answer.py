"""answer: whatever a row itself asks, about any number of clips or none, over any number of turns, answered word for
word as its author wrote it."""

import re

from audiophi.data.example import RowError
from audiophi.evaluation import answers

from .base import Report, Row, Task, base_example, own_question, saying, silent

# What is no question: the number of a sentence, which some corpora call its prompt ("a0001" of CMU ARCTIC).
NUMBER = re.compile(r"[a-z]*[-_]?\d+", re.IGNORECASE)


class Answer(Task):
    name = "answer"
    order = 90
    taught_by_reading = True
    conditions = ("shuffled_audio", "silence", "text")
    shown = ("accuracy", "answer_loss_unparsed", "never_stopped")
    main_score = "accuracy"
    table = (
        ("accuracy %", "accuracy"),
        ("  95 % interval", "accuracy_ci95"),
        ("accuracy %, another clip's audio", "accuracy_shuffled_audio"),
        ("accuracy %, silence", "accuracy_silence"),
        ("accuracy %, reading the transcript", "accuracy_text"),
        ("listening gap", "listening_gap"),
        ("reading minus hearing", "delta_text"),
        ("unparsed %", "unparsed"),
        ("never stopped %", "never_stopped"),
        ("rows", "rows"),
        ("real-time factor", "rtf"),
    )
    report = Report(
        type="audio-text-to-text",
        name="Answers to questions",
        rows=(
            ("accuracy, %", "accuracy"),
            ("accuracy with another clip's audio, %", "accuracy_shuffled_audio"),
            ("accuracy with silence, %", "accuracy_silence"),
            ("accuracy of the same LLM reading the transcript, %", "accuracy_text"),
            ("listening gap, points", "listening_gap"),
            ("unparsed, %", "unparsed"),
            ("never stopped, %", "never_stopped"),
        ),
        needed=("accuracy_ci95", "accuracy_by_kind", "rows"),
        gap={None: ("accuracy", "accuracy_shuffled_audio")},
        size="rows",
        tag="audio-question-answering",
        summary="answers to questions about audio",
        output="an answer to any question",
    )

    def claims(self, columns, instruction):
        return "messages" in columns or "instruction" in columns or instruction is not None

    def example(self, row: Row):
        right = row.answers or row.references or ((row.text,) if row.text is not None else ())
        if not row.messages and not row.instruction:
            raise RowError(f"{row.id}: has an answer, but no question")
        if NUMBER.fullmatch(row.instruction or ""):
            raise RowError(
                f"{row.id}: its question would be {row.instruction!r}, which asks nothing. Name the column that asks "
                "(instruction_column), or what is to be learned of such rows (task)"
            )
        if not any(text.strip() for text in right):
            raise RowError(f"{row.id}: has a question, but no answer")
        clips = silent(row.clips) if row.speech is False else saying(row.clips, row.transcript)
        return base_example(self, row, clips=clips, messages=own_question(row), references=right)

    def fields(self, example, hypothesis):
        return answers.fields(example, hypothesis)

    def so_far(self, predictions):
        return f"accuracy so far {answers.rate_so_far(predictions)} %"

    def summarize(self, predictions, **options):
        return answers.summarize(predictions, **options)
