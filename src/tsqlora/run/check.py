"""Compare what a running server answers with what PEFT writes, on held-out prompts of a run."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch

from tsqlora.data.tokens import plain_tokens
from tsqlora.errors import SettingsError, TsqLoraError, UnsupportedError
from tsqlora.run.contract import Prompt, prompts_of
from tsqlora.run.finished import FinishedRun, open_run, require_finished
from tsqlora.run.job import read
from tsqlora.run.server import AnswerError, Server
from tsqlora.tasks import get_task
from tsqlora.training.predict import writing

PROMPTS = 32
FIRST = 16
"""Tokens of an answer that must be the same."""
LEAST_SAME = 0.9
"""Share of answers that must be the same: rounding turns some that hardly prefer one token to another."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A text, and whether it stopped by itself."""

    text: str
    stopped: bool


def check_run(
    run: Path,
    url: str | None = None,
    *,
    served_name: str | None = None,
    yes: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Send held-out prompts to a server at temperature 0, and compare its answers with PEFT's; a report for JSON.

    Where an answer differs, the server gets the prompt's tokens, which shows whether its template or its weights
    differ, and the base alone answers too. Without a URL nothing is sent: the report has how often PEFT's answers stop.

    Args:
        served_name: the adapter's name there; needed if the server lists several.
        yes: prompts may leave this machine.

    Raises SettingsError before anything is sent to another machine, TsqLoraError if the server does not answer.
    """
    task = get_task(require_finished(run).task)
    if task.writer is None or not task.reading.causal:
        raise UnsupportedError(f"{run} is of task {task.name}; check compares only what causal language models write")
    if url is None:
        if served_name is not None or yes:
            raise SettingsError("--served-name and --yes are for a server; add --server-url, or leave them out")
        finished = open_run(run)
        written = [write(finished, prompt) for prompt in held_out(finished)]
        stopped = sum(answer.stopped for answer in written) / len(written)
        return {"server": None, "verdict": None, "prompts": len(written), "stopped_peft": stopped}
    server = Server(url)
    if not server.is_loopback:
        if not yes:
            raise SettingsError(f"{PROMPTS} held-out prompts of {run} would go to {server.host}; allow it with --yes")
        say(f"{PROMPTS} held-out prompts go to {server.host}")
    name = _served(server, served_name)
    finished = open_run(run)
    prompts = held_out(finished)
    answers = [_ask(server, name, finished, prompt) for prompt in prompts]
    expected = [write(finished, prompt) for prompt in prompts]
    return {"server": server.url, "model": name} | _compared(server, name, finished, prompts, answers, expected)


def _served(server: Server, name: str | None) -> str:
    try:
        names = [str(model["id"]) for model in server.ask("/v1/models")["data"]]
    except (KeyError, TypeError):
        raise TsqLoraError(f"{server.url}/v1/models lists no models in OpenAI's format") from None
    if name is None and len(names) == 1:
        return names[0]
    if name not in names:
        needed = "--served-name is needed" if name is None else f"--served-name {name} is not on the server"
        raise SettingsError(f"{needed}: {server.url} serves {', '.join(names)}")
    return name


def held_out(finished: FinishedRun) -> list[Prompt]:
    """The first prompts of the test rows, else of the validation rows, that are whole."""
    tables, tokenizer = read(finished.config), finished.pretrained.tokenizer
    table = finished.using(tables["test" if "test" in tables else "validation"])
    assert finished.format is not None
    rows, reading = islice(table, PROMPTS), finished.task.reading
    prompts = [*prompts_of(rows, finished.format, reading, tokenizer, max_length=finished.predictor.prompt_length)]
    if not prompts:
        raise TsqLoraError(f"no held-out prompt of {finished.config.data.train} fits into the model's context")
    return prompts


def write(finished: FinishedRun, prompt: Prompt, *, base: bool = False) -> Answer:
    """What PEFT writes on a prompt; with `base` the first tokens of the base without the adapter."""
    model, tokenizer = finished.model, finished.pretrained.tokenizer
    most = finished.config.task.max_new_tokens
    how = writing(model.get_base_model(), tokenizer, max_new_tokens=min(most, FIRST + 4) if base else most)
    ids = torch.tensor([prompt.ids], device=next(model.parameters()).device)
    with torch.inference_mode(), model.disable_adapter() if base else nullcontext():
        written = model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)
    new, ends = written[0, ids.shape[1] :], how.eos_token_id
    stopped = int(new[-1]) in (ends if isinstance(ends, list) else [ends])
    return Answer(cast(str, tokenizer.decode(new, skip_special_tokens=True)), stopped)


def _ask(server: Server, name: str, finished: FinishedRun, prompt: Prompt, *, ids: bool = False) -> Answer:
    """The server's answer to the messages; with `ids`, or without a template, to the prompt's tokens."""
    how = {"model": name, "max_tokens": finished.config.task.max_new_tokens, "temperature": 0, "seed": 0}
    if prompt.chat is not None and not ids:
        return _answer(server, "/v1/chat/completions", {**how, **prompt.chat})
    try:
        return _answer(server, "/v1/completions", {**how, "prompt": prompt.ids})
    except AnswerError as error:
        if error.status not in (400, 415, 422):
            raise
        return _answer(server, "/v1/completions", {**how, "prompt": prompt.text})


def _answer(server: Server, path: str, body: Mapping[str, Any]) -> Answer:
    try:
        choice = server.ask(path, body)["choices"][0]
        text = choice["message"]["content"] if "chat" in path else choice["text"]
        return Answer(str(text or ""), choice["finish_reason"] == "stop")
    except (KeyError, IndexError, TypeError):
        raise TsqLoraError(f"{server.url}{path} does not answer in OpenAI's format") from None


def _compared(
    server: Server,
    name: str,
    finished: FinishedRun,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    expected: Sequence[Answer],
) -> dict[str, Any]:
    def first(answer: Answer) -> list[int]:
        return plain_tokens([answer.text.strip()], finished.pretrained.tokenizer)[0][:FIRST]

    differ = [j for j, (answer, peft) in enumerate(zip(answers, expected, strict=True)) if first(answer) != first(peft)]
    base = {j: first(write(finished, prompts[j], base=True)) for j in differ}
    by_base = [j for j in differ if base[j] == first(answers[j])]
    by_template = [
        j
        for j in differ
        if prompts[j].chat is not None
        and first(_ask(server, name, finished, prompts[j], ids=True)) == first(expected[j])
    ]
    same = 1 - len(differ) / len(prompts)
    stopped, peft = (sum(answer.stopped for answer in each) / len(prompts) for each in (answers, expected))
    base_answered = len(by_base) > len(differ) / 2
    right = same >= LEAST_SAME and abs(stopped - peft) <= 1 - LEAST_SAME and not (base_answered and same < 1)
    example = differ[0] if differ else 0
    return {
        "prompts": len(prompts),
        "verdict": "right" if right else "wrong",
        "same": same,
        "stopped": stopped,
        "stopped_peft": peft,
        "base_answered": base_answered,
        "by_template": len(by_template),
        "by_weights": len(differ) - len(by_template),
        "prompt_tokens": _first_difference(server, name, finished, prompts[example]),
        "example": {"served": answers[example].text, "peft": expected[example].text} if differ else None,
    }


def _first_difference(server: Server, name: str, finished: FinishedRun, prompt: Prompt) -> dict[str, Any] | None:
    """Where the server's tokens of a chat depart from training's; None if it does not say, or if there is no chat."""
    if prompt.chat is None or (theirs := _their_tokens(server, name, prompt.chat)) is None:
        return None
    pairs = enumerate(zip(prompt.ids, theirs, strict=False))
    at = next((j for j, (own, other) in pairs if own != other), min(len(prompt.ids), len(theirs)))
    if at == len(prompt.ids) == len(theirs):
        return {"same": len(prompt.ids)}
    trained, served = (finished.pretrained.tokenizer.decode(ids[at : at + 4]) for ids in (prompt.ids, theirs))
    return {"at": at, "trained": trained, "served": served}


def _their_tokens(server: Server, name: str, chat: Mapping[str, Any]) -> list[int] | None:
    """The tokens of a chat by llama-server's routes, else by vLLM's."""
    try:
        try:
            text = server.ask("/apply-template", chat)["prompt"]
            answer = server.ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})
        except AnswerError:
            answer = server.ask("/tokenize", {"model": name, "add_generation_prompt": True, **chat})
        return [int(token) for token in answer["tokens"]]
    except (AnswerError, KeyError, TypeError, ValueError):
        return None
