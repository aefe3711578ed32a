"""What a family's template makes of a row, by the template alone: nothing of ours is imported."""

import copy
import json
from dataclasses import dataclass, replace
from typing import Any

from days.rows import CHATS, Row

_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{further}### Response:\n"
)
_PAIRED = ", paired with an input that provides further context"
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True, slots=True)
class Expected:
    """The whole text of a row, and what of it is trained (None where prefixes do not say); or the refusal."""

    text: str = ""
    targets: tuple[str, ...] | None = None
    refusal: str = ""
    lost: tuple[str, ...] = ()
    """Texts of the row that the template leaves out."""
    ids: tuple[int, ...] = ()
    trained_tokens: int = 0
    stops: bool = True
    """Whether an end token closes the last answer."""
    rewrites: bool = False
    """Whether the template writes a turn in another way once others follow, or once it is answered."""
    plain: bool = False
    """Whether the tokenizer writes the special tokens, and no template."""

    @property
    def trained(self) -> str:
        return "".join(self.targets or ())


def expected(row: Row, kind: str, tokenizer: Any, *, arrow: bool = False) -> Expected | None:
    """What training makes of the row; None for kinds that have no one text."""
    if kind in ("pairs", "pair chats"):
        return None
    chat = _chat(row, kind, bool(tokenizer.chat_template), arrow=arrow)
    end = str(tokenizer.eos_token)
    if chat is None:
        prompt, target = _plain(row, kind)
        target = target if target.endswith(end) else target + end
        return _counted(Expected(prompt + target, (target,)), tokenizer, plain=True)
    if not tokenizer.chat_template:
        return Expected(refusal="no chat template")
    messages, tools, context = chat
    last = max((k for k, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    return _rendered(messages[: last + 1], tools, context, tokenizer)


def _plain(row: Row, kind: str) -> tuple[str, str]:
    match kind:
        case "alpaca":
            further = row.get("input") or ""
            shown = f"### Input:\n{further}\n\n" if further else ""
            paired = _PAIRED if further else ""
            return _ALPACA.format(instruction=row["instruction"], paired=paired, further=shown), row["output"]
        case "orca":
            return f"{row['system_prompt']}\n\n{row['question']}", row["response"]
        case "squad":
            return f"{row['context']}\n\n{row['question']}", row["answers"]["text"][0]
        case "summary":
            return f"{row['document']}\n\nTL;DR:", f" {row['summary']}"
        case "text":
            return "", row["text"]
        case _:
            prompt_name, answered = {"math": ("query", "response"), "turns": ("user", "assistant")}.get(
                kind, ("prompt", "completion")
            )
            return row[prompt_name], row[answered]


def _chat(row: Row, kind: str, template: bool, *, arrow: bool) -> tuple[list[Row], list[Row], int] | None:
    """Messages, tools, and how many of the messages are a prompt; None for plain texts."""
    if kind == "sharegpt":
        return [{"role": _ROLES.get(m["from"], m["from"]), "content": m["value"]} for m in row["conversations"]], [], 0
    if kind == "prompt chat":
        return [*row["prompt"], *row["completion"]], [], len(row["prompt"])
    if kind in CHATS:
        messages, tools = copy.deepcopy((row["messages"], row.get("tools") or []))
        return (_without_none(messages), _without_none(tools), 0) if arrow else (messages, tools, 0)
    if kind == "alpaca" and template:
        further = row.get("input") or ""
        ask = f"{row['instruction']}\n\n{further}" if further else row["instruction"]
        return [{"role": "user", "content": ask}, {"role": "assistant", "content": row["output"]}], [], 0
    if kind == "orca" and template:
        texts = (row["system_prompt"], row["question"], row["response"])
        return [{"role": r, "content": t} for r, t in zip(("system", "user", "assistant"), texts, strict=True)], [], 0
    return None


def _without_none(value: Any) -> Any:
    """As Arrow's rows are read: fields without a value are those that other rows have; contents stay."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None or key == "content"}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def _rendered(messages: list[Row], tools: list[Row], context: int, tokenizer: Any) -> Expected:
    end = str(tokenizer.eos_token)

    def render(count: int, prompt: bool = False) -> str:
        named: dict[str, Any] = {"tools": copy.deepcopy(tools)} if tools else {}
        chat = copy.deepcopy(messages[:count])
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt, **named))

    def closed(text: str) -> str:
        """Up to the end token, where one closes the text: the line feed behind it belongs to the next turn."""
        return text.rstrip() if text.rstrip().endswith(end) else text

    try:
        whole = render(len(messages))
    except Exception as error:  # a template refuses by raising, in its own words or in jinja's
        return Expected(refusal=str(error).split("\n")[0] or type(error).__name__)
    answers = [k for k, message in enumerate(messages) if message["role"] == "assistant" and k >= context]
    targets: list[str] | None = []
    for k in answers:
        try:
            prompt, upto = render(k, prompt=True), render(k + 1)
        except Exception:
            targets = None
            break
        if not upto.startswith(prompt):
            targets = None
            break
        target = closed(upto[len(prompt) :])
        # Some templates close a whole text, and so a part of it, with one more end token.
        if k != answers[-1] and not whole.startswith(prompt + target):
            target = target.removesuffix(end)
        if not whole.startswith(prompt + target):
            targets = None
            break
        targets.append(target)
    rewrites = targets is None
    if rewrites:
        try:
            prompt = render(answers[-1], prompt=True)
            targets = [closed(whole[len(prompt) :])] if whole.startswith(prompt) else None
        except Exception:
            targets = None
    lost = tuple(_lost(messages, whole))
    if rewrites and lost:
        targets = None  # a prompt has what the whole text lacks: a prefix does not say where an answer begins
    made = Expected(closed(whole), None if targets is None else tuple(targets), lost=lost)
    return replace(_counted(made, tokenizer), rewrites=rewrites)


def _counted(one: Expected, tokenizer: Any, *, plain: bool = False) -> Expected:
    """With its tokens; a template writes the special tokens of a chat, the tokenizer those of a plain text."""
    ids = tokenizer(one.text, add_special_tokens=plain)["input_ids"]
    trained = sum(len(tokenizer(target, add_special_tokens=False)["input_ids"]) for target in one.targets or ())
    stops = one.text.endswith(str(tokenizer.eos_token))
    return replace(one, ids=tuple(ids), trained_tokens=trained, stops=stops, plain=plain)


def _lost(messages: list[Row], whole: str) -> list[str]:
    """Contents, reasoning and names of called functions that the text does not have."""
    texts = list[str]()
    for message in messages:
        content = message.get("content") or ""
        texts += [part for part in content.replace("<think>", "</think>").split("</think>") if part.strip()]
        texts += [message[key] for key in ("reasoning_content", "reasoning", "thinking") if message.get(key)]
        texts += [call["function"]["name"] for call in message.get("tool_calls") or []]
    return [text for text in texts if text.strip() not in whole and json.dumps(text)[1:-1] not in whole]
