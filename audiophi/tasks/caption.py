"""caption: a sentence about what is heard, from captions of the source, or from class labels by templates."""

from audiophi.evaluation import captions

from .base import Report, Row, Task, base_example, need_clips, own_question, silent
from .caption_templates import captions_of


class Caption(Task):
    name = "caption"
    order = 10
    wordings = ("Describe the sound.",)
    test_wordings = ("What can be heard in this recording?", "Say what you hear.", "Describe this audio clip.")
    decoding = {"no_repeat_ngram_size": 3}  # "a recording of a recording of ..." of a sound that it does not know
    command = "Describe the sounds in audio files."
    shown = ("cider_d", "label_accuracy", "label_accuracy_shuffled")
    main_score = "cider_d"
    table = (
        ("CIDEr-D", "cider_d"),
        ("  another clip's audio", "cider_d_shuffled"),
        ("ROUGE-L", "rouge_l"),
        *((f"BLEU-{n}", f"bleu_{n}") for n in range(1, 5)),
        ("label accuracy %", "label_accuracy"),
        ("  another clip's audio", "label_accuracy_shuffled"),
        ("listening gap", "listening_gap"),
        ("clips", "clips"),
        ("captions that differ", "distinct_captions"),
        ("never stopped %", "never_stopped"),
        ("empty %", "empty"),
        ("real-time factor", "rtf"),
    )
    report = Report(
        type="audio-text-to-text",
        name="Audio captioning",
        rows=(
            ("CIDEr-D", "cider_d"),
            ("CIDEr-D with another clip's audio", "cider_d_shuffled"),
            ("ROUGE-L", "rouge_l"),
            ("BLEU-4", "bleu_4"),
            ("label accuracy, %", "label_accuracy"),
            ("label accuracy with another clip's audio, %", "label_accuracy_shuffled"),
            ("listening gap", "listening_gap"),
            ("never stopped, %", "never_stopped"),
        ),
        needed=("listening_gap_of", "clips", "references", "distinct_captions"),
        gap={
            "cider_d": ("cider_d", "cider_d_shuffled"),
            "label_accuracy": ("label_accuracy", "label_accuracy_shuffled"),
        },
        size="clips",
        tag="audio-captioning",
        summary="descriptions of sounds",
        output='a description of the sound (`task="caption"`)',
        example="rain.wav",
    )

    def claims(self, columns, instruction):
        return "references" in columns

    def example(self, row: Row):
        need_clips(row)
        found = tuple(captions_of(row.references, row.text, row.label))
        clips = silent(row.clips) if row.speech is False else row.clips
        return base_example(self, row, clips=clips, messages=own_question(row), references=found)

    def target(self, text, text_case="lower"):
        from audiophi.data.alignment_text import normalise_transcript

        return " " + normalise_transcript(text, text_case)

    def sounds(self, text):
        return text

    def add_arguments(self, parser):
        parser.add_argument("--label_column", help="the class of a sound; default: label, category or class")
        parser.add_argument("--audio_folder", help="where the audio of Clotho or AudioCaps is, if elsewhere")
        parser.add_argument("--official", action="store_true", help="METEOR, SPICE, SPIDEr-FL, FENSE too (Java)")

    def check(self, args):
        captions.check_packages(official=args.official)

    def fields(self, example, hypothesis):
        return {"references": list(example.references), "label": example.label}

    def summarize(self, predictions, **options):
        return captions.summarize(predictions, **options)

    def development(self, predictions):
        return captions.summarize(predictions, with_package=captions.has_metrics())
