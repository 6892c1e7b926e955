"""When each written word is said: forced alignment of the words by the alignment head's CTC.

The path through the frames that reads exactly these words, and is likeliest to the head, is torchaudio's
`forced_align`. CTC gives a word one sharp peak and calls the rest of it blank, so the blank is made less likely first
(`BLANK_PENALTY`): a word then lasts until the next one, or until its frames resemble silence far more than the word.
"""

import re

import torch

# Subtracted from the blank's log probability. Chosen on 40 sentences of festival's, whose word times are known, and 20
# of them with a second of silence in the middle (dev/LOG.md).
BLANK_PENALTY = 16.0
MARKS = re.compile(r"[^\w']+")


def spelling_of(word, pieces):
    """A word in as few `pieces` (text of a token → its class) as possible, a list of classes; none where it cannot be
    spelt. As it is written, else in small letters without marks."""
    for text in dict.fromkeys((word, word.lower(), MARKS.sub("", word.lower()))):
        for form in (f" {text}", text):
            best = [[]] + [None] * len(form)
            for end in range(1, len(form) + 1):
                for start in range(end):
                    if best[start] is not None and (piece := pieces.get(form[start:end])) is not None:
                        longer = [*best[start], piece]
                        if best[end] is None or len(longer) < len(best[end]):
                            best[end] = longer
            if text and best[-1]:
                return best[-1]
    return []


def word_times(words, log_probs, pieces, seconds_per_frame, blank_penalty=BLANK_PENALTY):
    """Start and end of each of `words` in seconds, [(start, end), …], in order and without overlaps.

    Args:
        words: as they are written. log_probs: (T, V' + 1) of the clip's frames, class 0 the blank.
        pieces: text of each token of the alignment → its class.
        seconds_per_frame: of `log_probs`.
    Words that the alignment cannot spell share the time between their neighbours evenly. Where there are more words
    than frames could hold, all share the whole clip by their letters.
    """
    from torchaudio.functional import forced_align, merge_tokens

    spelt = [spelling_of(word, pieces) for word in words]
    classes = [piece for word in spelt for piece in word]
    repeats = sum(one == two for one, two in zip(classes, classes[1:], strict=False))
    total = len(log_probs) * seconds_per_frame
    if not classes or len(classes) + repeats > len(log_probs):
        return shared(words, 0.0, total)
    log_probs = log_probs.float().cpu().clone()
    log_probs[:, 0] -= blank_penalty
    path, scores = forced_align(log_probs[None], torch.tensor([classes], dtype=torch.int32), blank=0)
    spans, times, place = merge_tokens(path[0], scores[0]), [], 0
    for word in spelt:
        own = spans[place : place + len(word)]
        place += len(word)
        times.append((own[0].start * seconds_per_frame, own[-1].end * seconds_per_frame) if own else None)
    return filled(words, times, total)


def filled(words, times, total):
    """`times` with those that are None between their neighbours'."""
    result, number = [], 0
    while number < len(words):
        if times[number] is not None:
            result.append(times[number])
            number += 1
            continue
        end = next((n for n in range(number, len(words)) if times[n] is not None), len(words))
        start = result[-1][1] if result else 0.0
        result += shared(words[number:end], start, times[end][0] if end < len(words) else total)
        number = end
    return result


def shared(words, start, end):
    """A stretch of time divided among words by their letters."""
    letters = [max(1, len(word)) for word in words]
    places = [start + (end - start) * sum(letters[:n]) / max(1, sum(letters)) for n in range(len(words) + 1)]
    return list(zip(places[:-1], places[1:], strict=True))
