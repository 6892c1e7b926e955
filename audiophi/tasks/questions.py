"""What the tasks share that make questions from what rows have anyway: their words, labels, speakers.

A question is asked in one of many wordings; some are kept for tests and never trained. What is asked, and in which
words, is drawn anew for each row and epoch (`audiophi.data.example.posed`).
"""

from dataclasses import replace

from audiophi.data.example import Clip, Example, Question, RowError

from .answer import Answer
from .base import Row, base_example, plain, saying, silent

YES_NO = (" Answer yes or no.", " Yes or no?")


class Kind:
    """A kind of question.

    Args:
        name: by which scores are reported.
        wordings, test_wordings: with {slots} for what the question is about. No wordings: kept out of training, to see
            what a model makes of a kind of question that it was never asked (tools/make_questions.py).
        metric: see `audiophi/evaluation/answer_metrics.py`.
        forms: what the form of the answer is asked with, one after the other put behind each wording; in training also
            nothing, as people ask.
    """

    def __init__(self, name, wordings, test_wordings, metric="exact", forms=("",)):
        self.name, self.metric = name, metric
        self.wordings = tuple(wording + form for wording in wordings for form in dict.fromkeys((*forms, "")))
        self.test_wordings = tuple(wording + form for wording in test_wordings for form in forms)

    def ask(self, *answers: str, choices=(), **slots: str) -> Question:
        """The question about `slots` with these right answers."""
        return Question(self.name, self.wordings, self.test_wordings, answers, self.metric, tuple(choices), slots)


class Questions(Answer):
    """Base class: a subclass has a name, and `questions`."""

    asked_as = Answer.name
    taught_by_reading = False  # who only reads the words does not know the voice, nor the sound behind it
    what = "that could be asked about"  # for the message about a row without any

    def claims(self, columns, instruction):
        return False

    def questions(self, row: Row) -> list[Question]:
        """All that the row can be asked."""
        raise NotImplementedError

    def clips(self, row: Row) -> tuple[Clip, ...]:
        """What is heard, in order."""
        if row.speech is False:
            return silent(row.clips)
        return saying(row.clips, row.text if row.transcript is None else row.transcript)

    def example(self, row: Row) -> Example:
        clips = self.clips(row)
        if not clips:
            raise RowError(f"{row.id}: has no audio")
        questions = tuple(self.questions(row))
        if not any(question.templates for question in questions):
            raise RowError(f"{row.id}: has nothing {self.what}")
        answers = tuple(dict.fromkeys(answer for question in questions for answer in question.answers[:1]))
        known = [clip.transcript for clip in clips]
        transcript = None if None in known else "\n".join(known) or None
        example = base_example(self, row, clips=clips, questions=questions, references=answers)
        return replace(example, transcript=transcript)


def words_of(text: str | None) -> list[str]:
    """The words of a transcript, without marks and case."""
    return plain((text or "").replace("'", "ʼ")).replace("ʼ", "'").split()
