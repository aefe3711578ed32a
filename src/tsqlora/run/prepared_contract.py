"""The template's contract of an adapter of another trainer, by the set that the trainer prepared."""

from itertools import islice
from pathlib import Path
from typing import Any

from tsqlora.errors import DataError
from tsqlora.interop.checkpoint import base_path
from tsqlora.interop.files import is_own, read_adapter
from tsqlora.interop.template import messages_in, read_template
from tsqlora.run.contract import PROMPTS, SEEN, contract_for
from tsqlora.run.text_audit import load_vocabulary, prepared_set
from tsqlora.text.prepared import sequences_of


def contract_of_prepared(adapter: Path, prepared: Path, file: Path) -> dict[str, Any]:
    """The contract of an adapter of another trainer, by the set that the trainer prepared.

    A prompt is the tokens before the first one that was trained. Its messages are read back by the adapter's or the
    base's own template, else by the one in `file`.

    Raises SettingsError for a base that is not here, DataError for a set without prompts or of another template.
    """
    base = base_path(read_adapter(adapter), None)
    vocabulary, _ = load_vocabulary(base, None)
    tokenizer: Any = vocabulary.tokenizer
    own = adapter / "chat_template.jinja"
    templates = [
        read_template(own) if is_own(own, adapter) else str(tokenizer.chat_template or ""),
        read_template(file),
    ]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if token}
    questions, ends, prompts, text = [], [], [], ""
    for one in islice(sequences_of(prepared_set(prepared)), SEEN):
        if (trained := one.trained).size:
            ends.append(not vocabulary.stops or bool({*one.targets[trained].tolist()} & vocabulary.stops))
            if trained[0] > 1 and len(questions) < PROMPTS:
                questions.append(one.ids[: trained[0]].tolist())
    for ids in questions:
        text = vocabulary.text(ids).decode(errors="replace")
        variants = [text, text.removeprefix(str(tokenizer.bos_token))]  # which a tokenizer may add to the template's
        fitting = [
            (part, *read)
            for part in dict.fromkeys(variants)
            for template in dict.fromkeys(templates)
            if (read := messages_in(part, template, special))
        ]
        if fitting:
            part, messages, _ = max(fitting, key=lambda one: one[2])
            prompts.append({"messages": messages, "text": part, "ids": ids})
    if not prompts:
        why = f"the first one is {text!r:.200}" if questions else "all of their tokens were trained"
        raise DataError(f"no template here gives the prompts in {prepared} ({why}); compare them by eye")
    return contract_for(base, vocabulary, templates[0], ends, prompts)
