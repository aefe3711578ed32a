"""Format metrics and differences: accuracies in percent, their differences in points."""


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
    """Format a value.

    >>> value_of("accuracy", 0.8125), value_of("matthews", 0.8125)
    ('81.2%', '0.812')
    """
    return _shown(metric, value, "", "%")


def gain_of(metric: str, value: float) -> str:
    """Format a difference with its sign.

    >>> gain_of("accuracy", -0.0001), gain_of("pearson", 0.02)
    ('+0.0 points', '+0.020')
    """
    return _shown(metric, value, "+z", " points")


def _shown(metric: str, value: float, sign: str, unit: str) -> str:
    scale, digits, unit = (100, 1, unit) if as_points(metric) else (1, 3, "")
    return f"{scale * value:{sign}.{digits}f}{unit}"
