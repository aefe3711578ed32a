"""What the settings say of the data -> its splits."""

from collections.abc import Collection

from tsqlora.data.dialect import Hints
from tsqlora.data.prepare import Writing
from tsqlora.data.splits import Splits, read_data
from tsqlora.errors import SettingsError
from tsqlora.run.config import Config
from tsqlora.tasks import Task, get_task

OF_ANSWERS: dict[str, str | None] = {"data.label": "data.target", "data.text_pair": "data.prompt"}
"""Settings that only classes and numbers have, and those of texts in their place."""
OF_TEXTS: dict[str, str | None] = {
    "data.format": None,
    "data.prompt": "data.text",
    "data.target": "data.label",
    "data.messages": "data.text",
    "task.max_new_tokens": None,
    "task.beams": None,
}
"""The other way round; None where there is none."""


def read(config: Config) -> Splits:
    """Where the rows of every split are."""
    data, answer = config.data, get_task(config.task.type).answer
    texts = ("format", "prompt", "target", "messages", "text")
    return read_data(
        data.train,
        data.validation,
        data.test,
        answer=answer,
        columns={name: getattr(data, name) for name in (texts if answer == "text" else ("text", "text_pair", "label"))},
        validation_fraction=data.validation_fraction,
        seed=config.training.seed,
        trusted=data.trusted,
        max_bad_rows=data.max_bad_rows,
        hints=hints_of(config),
    )


def hints_of(config: Config) -> Hints:
    """What the settings say of how files are written."""
    return Hints(config.data.delimiter, config.data.encoding)


def trained_task(config: Config) -> Task:
    """The task, with the loss that training uses."""
    smoothing = config.training.further_arguments().get("label_smoothing_factor", 0)
    return get_task(config.task.type, **({"label_smoothing": smoothing} if smoothing else {}))


def require_of_task(config: Config, keys: Collection[str] | None = None) -> None:
    """Raises SettingsError for a setting that only another task reads, and that is not its default; of these keys."""
    task = get_task(config.task.type)
    foreign = dict(OF_ANSWERS if task.answer == "text" else OF_TEXTS)
    causal = task.name == "causal-lm"
    if not causal:
        foreign["data.packing"] = None
    if task.answer == "number" and config.training.further_arguments().get("label_smoothing_factor"):
        raise SettingsError("training.label_smoothing_factor is of classes and tokens, and task.type is regression")
    for key, own in foreign.items():
        section, name = key.split(".")
        settings = getattr(config, section)
        if (keys is None or key in keys) and getattr(settings, name) != type(settings).model_fields[name].default:
            cure = "leave it out" if own is None else f"set {own}, or leave it out"
            raise SettingsError(f"{key} is set, which {task.name} does not read; {cure}")


def writing_of(config: Config) -> Writing | None:
    """How a generating model takes its samples; None for another task."""
    task = get_task(config.task.type)
    if task.answer != "text":
        return None
    return Writing(seq2seq=task.name == "seq2seq", max_target_length=None)
