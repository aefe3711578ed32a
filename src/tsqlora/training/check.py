"""Prompts as training renders them, for template.json of a run, and to compare a server's answers with PEFT's."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch

from tsqlora.adapter.check import FIRST, Answer, Prompt, Served, Server, compare_answers, name_on
from tsqlora.adapter.template import CONTRACT_FILE
from tsqlora.auditing.texts.vocabulary import vocabulary_of_answers
from tsqlora.errors import DataError, SettingsError, TsqLoraError, UnsupportedError
from tsqlora.files import write_text
from tsqlora.model.named import read
from tsqlora.rows.chat import Format, Manner
from tsqlora.rows.rows import Row
from tsqlora.rows.tokens import causal_rows
from tsqlora.tasks import get_task
from tsqlora.training.job import Job, open_run, require_finished
from tsqlora.training.predict import generation_config, predictor_of

PROMPTS = 32
CONTRACT_PROMPTS, SEEN = 5, 200
"""Prompts of template.json, and training rows whose ends are looked at."""


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
    how = generation_config(model.get_base_model(), tokenizer, max_new_tokens=min(most, FIRST + 4) if base else most)
    ids = torch.tensor([prompt.ids], device=next(model.parameters()).device)
    with torch.inference_mode(), model.disable_adapter() if base else nullcontext():
        written = model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)
    new, ends = written[0, ids.shape[1] :], how.eos_token_id
    stopped = int(new[-1]) in (ends if isinstance(ends, list) else [ends])
    return Answer(cast(str, tokenizer.decode(new, skip_special_tokens=True)), stopped)


def prompts_of(job: Job, rows: Iterable[Row], format: Format, *, max_length: int) -> Iterator[Prompt]:
    """Yield the prompts of rows that fit whole."""
    tokenizer = job.tokenizer
    manner = Manner(seq2seq=False, chat=bool(tokenizer.chat_template), targets=False, measured=True)
    for row in rows:
        (one,) = causal_rows([format.parse(row, manner)], tokenizer, max_length)
        if isinstance(one, DataError):
            raise one
        if not one.cut:
            chat = one.chat
            tools = {"tools": list(chat.tools)} if chat.tools else {}
            served = None if chat.plain else {"messages": [message.whole for message in chat.messages], **tools}
            yield Prompt("".join(piece.text for piece in one.pieces), list(one.sample["input_ids"]), served)


def write_contract(job: Job, run: Path) -> None:
    """Write template.json: the template, prompts of held-out rows with their tokens, and which stops were trained."""
    tokenizer, table = job.tokenizer, job.data["test" if "test" in job.data else "validation"]
    vocabulary = vocabulary_of_answers(tokenizer, job.model)
    if vocabulary is None or not tokenizer.chat_template or table.format is None:
        return
    rows = prompts_of(job, table, table.format, max_length=job.max_length)
    chats = [one for one in islice(rows, CONTRACT_PROMPTS) if one.chat is not None]
    if not chats:
        return
    stops, samples = vocabulary.stops, job.train.samples
    seen = [[k for k in samples[j]["labels"] if k >= 0] for j in range(min(SEEN, len(samples)))]
    ends = [not stops or any(k in stops for k in labels) for labels in seen]
    prompts = [{**one.chat, "text": one.text, "ids": one.ids} for one in chats if one.chat is not None]
    contract = {
        "base": job.config.model.path,
        "template": tokenizer.chat_template,
        "sha256": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items() if token},
        "stops": sorted(stops),
        "stop_tokens": tokenizer.convert_ids_to_tokens(sorted(stops)),
        "stops_trained": sum(ends) / max(len(ends), 1),
        "prompts": prompts,
    }
    write_text(run / CONTRACT_FILE, json.dumps(contract, indent=1, ensure_ascii=False) + "\n", private=True)
