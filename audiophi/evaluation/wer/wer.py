"""Corpus-level word error rate in percent as a metric for Hugging Face's `evaluate`, which works without the Hub:

    import evaluate
    evaluate.load("audiophi/evaluation/wer").compute(predictions=["the cat"], references=["the cat sat"])

`evaluate.load("wer")` downloads its module, returns a fraction and does not normalise; this one is what eval.py
reports.
"""

import datasets
import evaluate

from audiophi.evaluation.metrics import count_errors, word_error_rate
from audiophi.evaluation.text_normalization import normalizer_name


class WER(evaluate.Metric):
    """`predictions` and `references`: texts, normalised here. Gives wer (percent), S/D/I, words and the normaliser."""

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=type(self).__doc__,
            features=datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("string"))),
        )

    def _compute(self, predictions, references):
        counts = [count_errors(said, heard) for said, heard in zip(references, predictions, strict=True)]
        kinds = ("substitutions", "deletions", "insertions", "words")
        totals = {kind: sum(getattr(count, kind) for count in counts) for kind in kinds}
        return {"wer": word_error_rate(counts), **totals, "normalizer": normalizer_name()}
