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

# What a row can be trained on and evaluated for, and what the user then asks by default.
INSTRUCTIONS = {"transcribe": TRANSCRIBE, "caption": DESCRIBE}
# "no_speech": asked to transcribe audio in which nobody speaks. Training alone: without words there is no error rate.
TASKS = (*INSTRUCTIONS, "no_speech")
