"""How near written texts are to what they should be: ROUGE and chrF, from the packages that the field uses."""

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

    >>> text_metrics(["a cat sat"], ["a cat sat"])["rougeL"]
    1.0
    """
    require_text_metrics()
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.chrf import CHRF

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    found = [scorer.score(reference, text) for text, reference in zip(written, references, strict=True)]
    rouge = {name: sum(one[name].fmeasure for one in found) / len(found) for name in ROUGE}
    return {**rouge, "chrf": CHRF().corpus_score(list(written), [list(references)]).score}
