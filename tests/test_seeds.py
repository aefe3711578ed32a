import numpy as np
import pytest

from tsqlora.auditing.draw.subset import QualitySubset
from tsqlora.rows.datasets import reference_rows
from tsqlora.seeds import STREAMS, stream

PLACES: list[tuple[int, ...]] = [(), (0,), (1,), (0, 0)]


def test_no_two_streams_give_the_same_draws() -> None:
    draws = {tuple(stream(name, 1, *place).random(4)) for name in STREAMS for place in PLACES}
    draws.add(tuple(np.random.default_rng(1).random(4)))  # data/split.py
    assert len(draws) == len(STREAMS) * len(PLACES) + 1


@pytest.mark.parametrize("name", STREAMS)
def test_a_draw_is_a_function_of_name_seed_and_place(name: str) -> None:
    first, again = (stream(name, 7, 3).permutation(50).tolist() for _ in range(2))  # type: ignore[arg-type]
    assert first == again
    assert first != stream(name, 8, 3).permutation(50).tolist()  # type: ignore[arg-type]


def test_reference_rows_are_not_the_rows_of_the_first_epoch() -> None:
    epoch = QualitySubset(range(1000), 0.5).draw(0)
    assert set(reference_rows(500, range(1000), seed=0)[0]) != set(epoch.tolist())
