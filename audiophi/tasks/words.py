"""words: questions about what is said, made from transcripts. First or last word, is a word said, which of two comes
first, how many words, in capital letters, as JSON; and whether anybody speaks at all."""

import json

from .base import Row
from .questions import YES_NO, Kind, Questions, words_of

SHORT, COUNTED = 8, 12  # words that are to be repeated to the letter; that can be counted
CONTENT = 4  # letters of a word that is worth asking for
SPEAKING = 3  # of so many rows one is asked whether anybody speaks: in most sources the answer never changes

FIRST = Kind(
    "first_word",
    (
        "What is the first word?",
        "Which word does the speaker begin with?",
        "Name the first word that is said. Answer with one word.",
        "Write only the first word of this recording.",
        "What word comes first in the recording?",
    ),
    ("Tell me the very first word you hear.", "With which word does it start? One word only."),
)
LAST = Kind(
    "last_word",
    (
        "What is the last word?",
        "Which word does the speaker end with?",
        "Name the last word that is said. Answer with one word.",
        "Write only the last word of this recording.",
        "What word comes last in the recording?",
    ),
    ("Tell me the very last word you hear.", "With which word does it end? One word only."),
)
SAID = Kind(
    "is_said",
    (
        'Is the word "{word}" said?',
        'Does the speaker say "{word}"?',
        'Can you hear the word "{word}"?',
        'Does "{word}" occur in what is said?',
        'Is "{word}" one of the words?',
    ),
    ('Do you hear "{word}" anywhere in this recording?', 'Was "{word}" mentioned?'),
    "yes_no",
    YES_NO,
)
BEFORE = Kind(
    "which_first",
    (
        'Which word is said first, "{one}" or "{two}"?',
        'Which comes earlier, "{one}" or "{two}"?',
        'What does the speaker say first: "{one}" or "{two}"?',
    ),
    ('Of "{one}" and "{two}", which do you hear before the other?',),
    "choice",
)
MANY = Kind(
    "how_many_words",
    (
        "How many words are said? Answer with a number.",
        "Count the words of the speaker.",
        "How many words does the speaker say?",
        "Give the number of words in this recording.",
    ),
    ("What is the number of words that you hear?", "How many words long is it? Only the number."),
    "number",
)
CAPITALS = Kind(
    "capitals",
    (
        "Repeat what is said in capital letters.",
        "Write the words in capitals.",
        "Transcribe the speech in upper case.",
        "WRITE WHAT IS SAID, ALL IN CAPITAL LETTERS.",
    ),
    ("Type out the speech using only capital letters.", "Give me the words, all upper case."),
    "written",
)
AS_JSON = Kind(
    "json",
    (
        'Answer as JSON with the key "words": what is said?',
        'Transcribe as JSON: {{"words": ...}}',
        'Give what is said as a JSON object with one key, "words".',
    ),
    ('Write down what you hear as JSON, under the key "words".',),
    "written",
)
LISTED = Kind(
    "list",
    (
        "List the words that are said, separated by commas.",
        "Write the words with commas between them.",
        "Give the words as a list, with commas.",
    ),
    ("Separate the words that you hear by commas.",),
    "written",
)
SPEAKS = Kind(
    "is_speech",
    ("Does anybody speak?", "Is somebody talking in this recording?", "Is there speech?", "Can you hear a voice?"),
    ("Do you hear anyone speaking?", "Is this recording of someone speaking?"),
    "yes_no",
    YES_NO,
)
SECOND = Kind("second_word", (), ("Which word comes second?", "Tell me the second word that you hear."))
AFTER = Kind(
    "which_last",
    (
        'Which word is said last, "{one}" or "{two}"?',
        'Which comes after the other, "{one}" or "{two}"?',
        'What does the speaker say last: "{one}" or "{two}"?',
    ),
    ('Of "{one}" and "{two}", which is said later?',),
    "choice",
)
NOTHING = Kind(
    "nothing_said",
    (
        "What is the first word?",
        "What is said here?",
        "Repeat what is said in capital letters.",
        "Name the last word that is said. Answer with one word.",
        "What is the last word?",
        "Which word does the speaker begin with?",
        "Write only the last word of this recording.",
        "Write the words in capitals.",
        "Transcribe the speech in upper case.",
        "List the words that are said, separated by commas.",
        "Which words do you hear?",
        "Tell me what is said.",
    ),
    ("Tell me the very first word you hear.", "Type out the speech using only capital letters."),
)


class Words(Questions):
    name = "words"
    others, about_words = 3, True
    taught_by_reading = True
    what = "said in it"

    def questions(self, row: Row):
        if row.speech is False:
            return [SPEAKS.ask("no"), NOTHING.ask("Nothing is said.", "Nothing.", "Nothing")]
        words = words_of(row.text)
        if not words:
            return []
        asked = [FIRST.ask(words[0]), LAST.ask(words[-1])]
        if row.number % SPEAKING == 0:
            asked.append(SPEAKS.ask("yes"))
        known = list(dict.fromkeys(word for word in words if len(word) >= CONTENT))
        foreign = [word for other in row.others for word in words_of(other.text)]
        foreign = [word for word in dict.fromkeys(foreign) if len(word) >= CONTENT and word not in words]
        # As many of one as of the other, or "yes" would be the better guess.
        for word, absent in zip(known, foreign, strict=False):
            asked += [SAID.ask("yes", word=word), SAID.ask("no", word=absent)]
        if len(words) > 1:
            asked.append(SECOND.ask(words[1]))
        once = [word for word in known if words.count(word) == 1]
        for one, two in zip(once[::2], once[1::2], strict=False):
            asked += [BEFORE.ask(one, one=one, two=two, choices=(one, two)),
                      BEFORE.ask(one, one=two, two=one, choices=(one, two)),
                      AFTER.ask(two, one=one, two=two, choices=(one, two)),
                      AFTER.ask(two, one=two, two=one, choices=(one, two))]  # fmt: skip
        if len(words) <= COUNTED:
            asked.append(MANY.ask(str(len(words))))
        if len(words) <= SHORT:
            text = " ".join(words)
            asked += [CAPITALS.ask(text.upper()), AS_JSON.ask(json.dumps({"words": text}, ensure_ascii=False)),
                      LISTED.ask(", ".join(words))]  # fmt: skip
        return asked
