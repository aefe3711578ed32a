"""ROUGE and chrF of generated text against references, by the packages that the field uses."""

import unicodedata
from collections.abc import Sequence

from tsqlora.errors import SettingsError

ROUGE = ("rouge1", "rouge2", "rougeL")
TEXT_METRICS = (*ROUGE, "chrf")


def require_text_metrics() -> None:
    """Raise SettingsError where rouge-score or sacrebleu is not installed."""
    try:
        import rouge_score  # noqa: F401
        import sacrebleu  # noqa: F401
    except ImportError:
        raise SettingsError(
            "metrics of generated text need rouge-score and sacrebleu; pip install 'tsqlora[generation]'"
        ) from None


def text_metrics(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return rouge1, rouge2, rougeL (F1 with stemming, mean over texts, 0 to 1) and chrf (corpus, 0 to 100).

    >>> text_metrics(["кошка сидит"], ["кошка сидит"])["rougeL"]
    1.0
    """
    require_text_metrics()
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.chrf import CHRF

    scorer = RougeScorer(list(ROUGE), tokenizer=_AnyScript())
    scores = [scorer.score(reference, text) for text, reference in zip(written, references, strict=True)]
    rouge = {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE}
    return {**rouge, "chrf": CHRF().corpus_score(list(written), [list(references)]).score}


class _AnyScript:
    """Tokenises ASCII words as rouge-score does, with stemming, and keeps words of other scripts, which it drops."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._ascii = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        words = "".join(map(_spaced, text.lower())).split()
        return [token for word in words for token in (self._ascii.tokenize(word) if word.isascii() else [word])]


def _spaced(letter: str) -> str:
    """Replace a separator by a space, and isolate a letter of a script that is written without spaces."""
    if any(first <= letter <= last for first, last in _WITHOUT_SPACES):
        return f" {letter} "
    return letter if letter.isalnum() or unicodedata.category(letter).startswith("M") else " "


_WITHOUT_SPACES = (("\u0e00", "\u0eff"), ("\u1000", "\u109f"), ("\u3040", "\u30ff"), ("\u3400", "\u9fff"))
"""Thai and Lao, Burmese, the Japanese syllabaries, Chinese characters."""
