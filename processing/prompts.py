"""Instructions given to the LLM beside the audio."""

TRANSCRIBE = "Transcribe the speech."

TRANSCRIBE_PARAPHRASES = (
    TRANSCRIBE,
    "Write down what is said.",
    "What does the speaker say?",
    "Transcribe this recording.",
    "Turn the speech into text.",
)

DESCRIBE = "Describe the sound."

# What a row can be trained on and evaluated for, how a user may ask for it, and how one does by default: the first.
WORDINGS = {"transcribe": TRANSCRIBE_PARAPHRASES, "caption": (DESCRIBE,)}
INSTRUCTIONS = {task: wordings[0] for task, wordings in WORDINGS.items()}
# "no_speech": asked to transcribe audio in which nobody speaks. Training alone: without words there is no error rate.
TASKS = (*INSTRUCTIONS, "no_speech")
