"""How near written captions are to the data's own: BLEU-4 and CIDEr-D, over the whole split, in the papers' scale.

Both count n-grams of words. The field's program takes words from a tokenizer in Java; here they are runs of letters
and digits in lower case, which differs on few captions ("don't"). What needs Java or a download (METEOR, SPICE) is left
out.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest

from sacrebleu.metrics import BLEU

MAX_N = 4
SIGMA = 6.0
Grams = Counter[tuple[str, ...]]


def caption_metrics(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`bleu4` and `cider`, both times 100; `references` are each video's own captions."""
    words = [split(caption) for caption in captions]
    right = [[split(sentence) for sentence in sentences] for sentences in references]
    return {"bleu4": bleu(words, right), "cider": 100 * cider(words, right)}


def bleu(captions: Sequence[list[str]], references: Sequence[Sequence[list[str]]]) -> float:
    """BLEU-4 (Papineni et al., ACL 2002), in percent."""
    columns = zip_longest(*([" ".join(words) for words in sentences] for sentences in references))  # None: it has fewer
    metric = BLEU(tokenize="none", smooth_method="none", force=True)
    return float(metric.corpus_score([" ".join(words) for words in captions], [list(c) for c in columns]).score)


def split(sentence: str) -> list[str]:
    return re.findall(r"'?\w+", sentence.lower())


def cider(captions: Sequence[list[str]], references: Sequence[Sequence[list[str]]]) -> float:
    """CIDEr-D (Vedantam et al., CVPR 2015, Eq. 1 and 4): mean over videos, up to 10 of one.

    An n-gram weighs more, the fewer of these videos' references have it; so a value belongs to its split.
    """
    videos_with: Grams = Counter()
    for sentences in references:
        videos_with.update(
            {gram for sentence in sentences for n in range(1, MAX_N + 1) for gram in _grams(sentence, n)}
        )

    def weighted(sentence: list[str], n: int) -> dict[tuple[str, ...], float]:
        logs = {gram: math.log(len(references) / max(1, videos_with[gram])) for gram in _grams(sentence, n)}
        return {gram: count * logs[gram] for gram, count in _grams(sentence, n).items()}

    total = 0.0
    for caption, sentences in zip(captions, references, strict=True):
        for n in range(1, MAX_N + 1):
            mine = weighted(caption, n)
            for sentence in sentences:
                near = math.exp(-((len(caption) - len(sentence)) ** 2) / (2 * SIGMA**2))
                total += 10 * near * _clipped_cosine(mine, weighted(sentence, n)) / (MAX_N * len(sentences))
    return total / len(captions)


def _grams(words: list[str], n: int) -> Grams:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _clipped_cosine(mine: dict[tuple[str, ...], float], theirs: dict[tuple[str, ...], float]) -> float:
    """A caption gains nothing by repeating a word more often than the reference does."""
    norms = math.hypot(*mine.values()) * math.hypot(*theirs.values())
    dot = sum(min(weight, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, weight in mine.items())
    return dot / norms if norms else 0.0
