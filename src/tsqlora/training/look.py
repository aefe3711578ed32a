"""Take a look and put it into a folder: of the settings of a run, or of a model in Python."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tsqlora import distributed
from tsqlora.auditing.draw.subset import suspects_of
from tsqlora.auditing.labels.question import why_unasked
from tsqlora.auditing.look import look as take
from tsqlora.auditing.look import scoring_request
from tsqlora.auditing.saved_look import SavedLook, columns_of_rows, require_free, save_look, scores_of_rows
from tsqlora.auditing.scores import Scores
from tsqlora.auditing.texts.look import AnswerLook
from tsqlora.auditing.texts.unfit import answer_columns, answers_of, even_scores, look_before, without_unfit
from tsqlora.auditing.texts.vocabulary import vocabulary_of_answers
from tsqlora.errors import SettingsError, UnsupportedError, of_loaded_model
from tsqlora.files import parents_of, write_text, writing
from tsqlora.model.named import device_of, trained_task
from tsqlora.model.request import Compute, RowNames, ScoringRule
from tsqlora.progress import Progress
from tsqlora.rows.datasets import Dataset
from tsqlora.rows.labels import LabelMap
from tsqlora.rows.rows import Columns
from tsqlora.rows.sources import open_table
from tsqlora.rows.splits import complete
from tsqlora.rows.table import stored_in
from tsqlora.rows.write import require_place
from tsqlora.run_dir import CONFIG_FILE
from tsqlora.settings import Config, dump_config, load_config
from tsqlora.tasks import Collate, Task
from tsqlora.training.job import format_of, load, scoring_rule, with_start, without_rows
from tsqlora.training.live_record import half_precision
from tsqlora.training.run import arguments


@of_loaded_model
def look(
    model: nn.Module,
    dataset: Dataset,
    collate: Collate,
    *,
    out: str | Path,
    rule: ScoringRule | None = None,
    task: Task | None = None,
    rows: RowNames | None = None,
    compute: Compute | None = None,
    trusted: Dataset | None = None,
    processing_class: Any = None,
) -> SavedLook:
    """Take the look that `QualityCallback` takes, and save it in a folder, for `QualityCallback(data, look=out)`.

    The folder has the scores, the fitted head and what they were made of; the model is left unchanged. It may be the
    model before it is sharded, the same one in 4 bits, or a smaller one with the same tokenizer, whose head is then
    left out.

    Args:
        dataset: the rows that a QualitySubset draws from, in its order.
        out: the folder to write.
        processing_class: the tokenizer; with it the answers of a causal model are looked at, too.
        trusted: the trusted rows of the QualitySubset.
        rule, task, rows, compute: as in `tsqlora.paper.score`; by default the rule of QualityCallback.

    Raises UnsupportedError for a model that is sharded already; SettingsError for a folder that is not empty.
    """
    out = Path(out)
    require_free(out)
    require_place(out / "look.json")
    names = rows or RowNames()
    request = scoring_request(
        model,
        dataset,
        collate,
        rule=rule or ScoringRule(),
        task=task,
        rows=names,
        compute=compute or Compute(),
        trusted=trusted,
    )
    inner = distributed.unwrapped(model)
    if trusted is not None and request.rule.select:
        why_not = why_unasked(trusted, suspects_of(trusted), request.task, inner, request.collate)
        request = replace(request, asks=why_not is None)
    answers, judges, result = AnswerLook([]), dict[str, np.ndarray](), None
    if (vocabulary := vocabulary_of_answers(processing_class, inner)) is not None:
        options = {"collate": collate, "seed": request.rule.seed}
        answers = look_before(inner, dataset, vocabulary, request.compute, **options)
        judges = answers_of(answers, vocabulary, len(dataset))
    if request.rule.decides(request.task, trusted is not None):
        result = take(model, request)
        result.undo()
        scores = without_unfit(result.scores, answers) if answers.turns else result.scores
    else:
        scores = even_scores(dataset, collate, names, answers, seed=request.rule.seed)
    return save_look(out, model, request, scores, result, judges)


def look_at(config: Config, out: Path, *, progress: Progress | None = None) -> SavedLook:
    """Take the look of a run with these settings, as `tsqlora look` does."""
    require_free(out)
    require_place(out / "look.json")
    config = with_start(config)
    args, rule = arguments(config, out), replace(scoring_rule(config), select=True)
    job = load(config, gpus=gpus_of(config)).with_adapter().on_device()
    taken = look(
        job.model,
        job.train.samples,
        job.collate,
        out=out,
        rule=rule,
        task=job.task,
        rows=job.row_names(),
        compute=Compute(args.per_device_eval_batch_size, half_precision(args, rule), progress=progress),
        trusted=job.trusted,
        processing_class=job.tokenizer,
    )
    if distributed.is_first():
        write_text(out / CONFIG_FILE, dump_config(config))
    return taken


def score_by_look(data: str, path: Path, out: Path, *, progress: Progress | None = None) -> Scores:
    """Score the rows of a file by a look, row by row; a row of the look gets its own columns.

    Raises SettingsError for a look that was taken in Python, which has no settings, and for one that draws by Q or by
    trusted texts.
    """
    require_place(out)
    saved = SavedLook.load(path)
    if not (path / CONFIG_FILE).is_file():
        raise SettingsError(
            f"the look in {path} was taken in Python and has no settings; use its `of`, or tsqlora.apply"
        )
    config = load_config(path / CONFIG_FILE, [f"data.train={json.dumps(data, ensure_ascii=False)}"])
    labels = _classes_of(saved, config)
    record = saved.scores.record
    assert record.columns is not None
    used = Columns(**record.columns)
    with (
        writing(out),
        tempfile.TemporaryDirectory(dir=out.parent if out.parent.is_dir() else None) as folder,
        stored_in(Path(folder)),
    ):
        table = open_table(data, split="train", hints=config.data.hints)
        lenient = None if labels is None else replace(labels, strict=not labels.kind.single)
        table = table.using(used, lenient, format_of(config, record.format, used))
        table = complete(table, config.data.max_bad_rows, tags=False)
        job = without_rows(config, labels, gpus=gpus_of(config)).with_rows({"train": table}).on_device()
        rows, samples = job.row_names(), job.train.samples
        how: dict[str, Any] = {"rows": rows, "compute": Compute(config.training.batch_size, progress=progress)}
        if labels is None:
            columns = answer_columns(job.model, saved.answers, saved.scores, samples, job.collate, **how)
        else:
            columns = columns_of_rows(job.model, saved, samples, job.collate, samples.labels, task=job.task, **how)
        scores = scores_of_rows(columns, saved, rows, task=job.task)
        with parents_of(out):
            scores.save(out)
    return scores


def _classes_of(saved: SavedLook, config: Config) -> LabelMap | None:
    """Return the classes of a look; None for answers.  Raises an error for a look that is not applied by row."""
    record = saved.scores.record
    classes = None if record.columns is None else trained_task(config).reading.classes(record.classes)
    if saved.answers and saved.scores.even:
        return None
    if saved.answers:
        raise SettingsError(
            f"the look in {saved.path} draws by trusted texts, which compares all rows with each other; take one "
            "without data.trusted, or score all rows together: tsqlora score CONFIG"
        )
    if classes is None:
        raise UnsupportedError(
            f"a look is applied to rows with a class each, or to answers that it has judged, and the task is "
            f"{config.task.type}; score all rows together: tsqlora score CONFIG"
        )
    return classes


def gpus_of(config: Config) -> list[int]:
    """Return the free bytes of each GPU, if this is the only process and may use them."""
    alone = distributed.launched() == 1 and device_of(config).type == "cuda"
    return [torch.cuda.mem_get_info(j)[0] for j in range(torch.cuda.device_count())] if alone else []
