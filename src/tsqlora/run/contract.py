"""Prompts as training renders them: for template.json of a run, and for a server that is checked."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from tsqlora.data.chat import Format, Manner
from tsqlora.data.rows import Row
from tsqlora.data.tokens import as_read, pieces_of
from tsqlora.files import write_text
from tsqlora.interop.check import Prompt
from tsqlora.interop.template import CONTRACT_FILE
from tsqlora.run.job import Job
from tsqlora.text.vocabulary import vocabulary_of_answers

PROMPTS, SEEN = 5, 200
"""Prompts of a contract, and training rows whose ends are looked at."""


def prompts_of(job: Job, rows: Iterable[Row], format: Format, *, max_length: int) -> Iterator[Prompt]:
    """Yield the prompts of rows that fit whole."""
    tokenizer = job.tokenizer
    manner = Manner(seq2seq=False, chat=bool(tokenizer.chat_template), targets=False, measured=True)
    how = {"max_length": max_length, "with_targets": False, "measured": True}
    for row in rows:
        sample = job.task.reading.encode([row], format, tokenizer, **how)
        if len(sample) == 1 and not sample.truncated:
            chat = format.read(row, manner)
            pieces = pieces_of(as_read(chat, tokenizer, row.place), tokenizer, row.place)
            tools = {"tools": list(chat.tools)} if chat.tools else {}
            served = None if chat.plain else {"messages": [message.whole for message in chat.messages], **tools}
            yield Prompt("".join(piece.text for piece in pieces), list(sample[0]["input_ids"]), served)


def write_contract(job: Job, run: Path) -> None:
    """Write template.json: the template, prompts of held-out rows with their tokens, and which stops were trained."""
    tokenizer, table = job.tokenizer, job.data["test" if "test" in job.data else "validation"]
    vocabulary = vocabulary_of_answers(tokenizer, job.model)
    if vocabulary is None or not tokenizer.chat_template or table.format is None:
        return
    rows = prompts_of(job, table, table.format, max_length=job.max_length)
    chats = [one for one in islice(rows, PROMPTS) if one.chat is not None]
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
