"""How a metric, its mean and a difference are written: accuracies in percent, their differences in points."""

from tsqlora.report.comparison import Mean


def as_points(metric: str) -> bool:
    """Whether a metric is a share of rows."""
    return metric == "accuracy"


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is better."""
    return metric in ("loss", "mse", "perplexity")


def words(name: str) -> str:
    """A name as a phrase."""
    return name.replace("_", " ")


def value_of(metric: str, value: float) -> str:
    """One value.

    >>> value_of("accuracy", 0.8125), value_of("matthews", 0.8125)
    ('81.2%', '0.812')
    """
    return f"{value:.1%}" if as_points(metric) else f"{value:.3f}"


def mean_of(metric: str, value: Mean) -> str:
    """A mean with its interval, where there is one.

    >>> mean_of("accuracy", Mean(0.8125, 0.01, 3))
    '81.2 ± 1.0%'
    """
    if value.half is None:
        return value_of(metric, value.mean)
    if as_points(metric):
        return f"{100 * value.mean:.1f} ± {100 * value.half:.1f}%"
    return f"{value.mean:.3f} ± {value.half:.3f}"


def gain_of(metric: str, value: Mean) -> str:
    """A difference with its sign and its interval, where there is one.

    >>> gain_of("accuracy", Mean(-0.0001, 0.01, 3)), gain_of("pearson", Mean(0.02, None, 1))
    ('+0.0 ± 1.0 points', '+0.020')
    """
    scale, digits, unit = (100, 1, " points") if as_points(metric) else (1, 3, "")
    half = "" if value.half is None else f" ± {scale * value.half:.{digits}f}"
    return f"{scale * value.mean:+z.{digits}f}{half}{unit}"
