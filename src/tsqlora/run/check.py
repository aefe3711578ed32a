"""Compare what a running server answers with what PEFT writes, on held-out prompts of a run."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch

from tsqlora.errors import SettingsError, TsqLoraError, UnsupportedError
from tsqlora.interop.check import FIRST, Answer, Prompt, Served, Server, compare_answers, name_on
from tsqlora.run.contract import prompts_of
from tsqlora.run.job import Job, open_run, read, require_finished
from tsqlora.run.predict import predictor_of
from tsqlora.tasks import get_task
from tsqlora.training.predict import writing

PROMPTS = 32


def check_run(
    run: Path,
    url: str | None = None,
    *,
    served_name: str | None = None,
    yes: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Send held-out prompts to a server at temperature 0, and compare its answers with PEFT's; a report for JSON.

    Without a URL nothing is sent: the report has how often PEFT's answers stop.

    Args:
        served_name: the adapter's name there; needed if the server lists several.
        yes: prompts may leave this machine.

    Raises SettingsError before anything is sent to another machine, TsqLoraError if the server does not answer.
    """
    task = get_task(require_finished(run).task)
    if task.reading.pipeline != "text-generation":
        raise UnsupportedError(f"{run} is of task {task.name}; check compares only what causal language models write")
    if url is None:
        if served_name is not None or yes:
            raise SettingsError("--served-name and --yes are for a server; add --server-url, or leave them out")
        job = open_run(run)
        written = [write(job, prompt) for prompt in held_out(job)]
        stopped = sum(answer.stopped for answer in written) / len(written)
        return {"server": None, "verdict": None, "prompts": len(written), "stopped_peft": stopped}
    server = Server(url)
    if not server.is_loopback:
        if not yes:
            raise SettingsError(f"{PROMPTS} held-out prompts of {run} would go to {server.host}; allow it with --yes")
        say(f"{PROMPTS} held-out prompts go to {server.host}")
    name = name_on(server, served_name)  # before the model is loaded
    job = open_run(run)
    served = Served(server, name, job.config.task.max_new_tokens)
    return compare_answers(served, held_out(job), partial(write, job), job.tokenizer)


def held_out(job: Job) -> list[Prompt]:
    """The first prompts of the test rows, else of the validation rows, that are whole."""
    tables = read(job.config)
    table = job.using(tables["test" if "test" in tables else "validation"])
    assert table.format is not None
    longest = predictor_of(job).prompt_length
    prompts = [*prompts_of(job, islice(table, PROMPTS), table.format, max_length=longest)]
    if not prompts:
        raise TsqLoraError(f"no held-out prompt of {job.config.data.train} fits into the model's context")
    return prompts


def write(job: Job, prompt: Prompt, *, base: bool = False) -> Answer:
    """What PEFT writes on a prompt; with `base` the first tokens of the base without the adapter."""
    model, tokenizer = job.model, job.tokenizer
    most = job.config.task.max_new_tokens
    how = writing(model.get_base_model(), tokenizer, max_new_tokens=min(most, FIRST + 4) if base else most)
    ids = torch.tensor([prompt.ids], device=next(model.parameters()).device)
    with torch.inference_mode(), model.disable_adapter() if base else nullcontext():
        written = model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)
    new, ends = written[0, ids.shape[1] :], how.eos_token_id
    stopped = int(new[-1]) in (ends if isinstance(ends, list) else [ends])
    return Answer(cast(str, tokenizer.decode(new, skip_special_tokens=True)), stopped)
