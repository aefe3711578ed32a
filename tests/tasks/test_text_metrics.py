"""ROUGE of every script."""

import pytest

pytest.importorskip("rouge_score")
pytest.importorskip("sacrebleu")

from rouge_score.rouge_scorer import RougeScorer

from tsqlora.tasks.text_metrics import ROUGE, text_metrics


@pytest.mark.parametrize(
    "text",
    [
        "кошка сидит на окне",
        "η γάτα κάθεται",
        "القط على النافذة",
        "बिल्ली खिड़की पर",
        "猫坐在垫子上",
        "แมวนั่ง",
        "고양이가 앉아",
    ],
)
def test_a_text_of_any_script_is_like_itself(text: str) -> None:
    result = text_metrics([text, "a"], [text, "b"])
    assert {name: result[name] for name in ("rouge1", "rougeL")} == {"rouge1": 0.5, "rougeL": 0.5}
    assert text_metrics(["собака"], [text])["rouge1"] == 0.0


def test_of_ascii_it_is_what_rouge_score_says() -> None:
    text, reference = "The cats' owner_name sat, running 3 dogs.", "A cat owner sits; the dog runs 3 times"
    theirs = RougeScorer(list(ROUGE), use_stemmer=True).score(reference, text)
    ours = text_metrics([text], [reference])
    assert {name: ours[name] for name in ROUGE} == {name: theirs[name].fmeasure for name in ROUGE}
    assert ours["rouge1"] > 0.5
