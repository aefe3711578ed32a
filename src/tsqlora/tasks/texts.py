"""How near written texts are to what they should be: ROUGE and chrF, from the packages that the field uses."""

import unicodedata
from collections.abc import Sequence

from tsqlora.errors import SettingsError

ROUGE = ("rouge1", "rouge2", "rougeL")
TEXT_METRICS = (*ROUGE, "chrf")


def require_text_metrics() -> None:
    """Raises SettingsError where the packages are not installed."""
    try:
        import rouge_score  # noqa: F401
        import sacrebleu  # noqa: F401
    except ImportError:
        raise SettingsError(
            "generated text is measured by rouge-score and sacrebleu; install them with: pip install "
            "'tsqlora[generation]'"
        ) from None


def text_metrics(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """rouge1, rouge2, rougeL (F1 with stemming, mean over texts, 0 to 1) and chrf (of the corpus, 0 to 100).

    >>> text_metrics(["кошка сидит"], ["кошка сидит"])["rougeL"]
    1.0
    """
    require_text_metrics()
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.chrf import CHRF

    scorer = RougeScorer(list(ROUGE), tokenizer=_AnyScript())
    found = [scorer.score(reference, text) for text, reference in zip(written, references, strict=True)]
    rouge = {name: sum(one[name].fmeasure for one in found) / len(found) for name in ROUGE}
    return {**rouge, "chrf": CHRF().corpus_score(list(written), [list(references)]).score}


class _AnyScript:
    """rouge-score's own words of ASCII, stemmed; beside them those of other scripts, which it drops, as they are."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._ascii = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        words = "".join(map(_spaced, text.lower())).split()
        return [token for word in words for token in (self._ascii.tokenize(word) if word.isascii() else [word])]


def _spaced(letter: str) -> str:
    """Space for what parts words; a letter of a script that is written without spaces is a word."""
    if any(first <= letter <= last for first, last in _WITHOUT_SPACES):
        return f" {letter} "
    return letter if letter.isalnum() or unicodedata.category(letter).startswith("M") else " "


_WITHOUT_SPACES = (("\u0e00", "\u0eff"), ("\u1000", "\u109f"), ("\u3040", "\u30ff"), ("\u3400", "\u9fff"))
"""Thai and Lao, Burmese, the Japanese syllabaries, Chinese characters."""
