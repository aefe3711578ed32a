"""The command that serves an adapter or a merged model, for each server that is right."""

from pathlib import Path
from shlex import quote

from tsqlora.interop.gguf import FILE
from tsqlora.interop.health import vllm_rank
from tsqlora.interop.lora import LoraAdapter
from tsqlora.interop.servers import CONSUMERS, BaseFacts, Consumer, judge

NAME = "adapter"
"""The adapter's name on the server."""


def serve_line(consumer: Consumer, adapter: LoraAdapter, base: BaseFacts, folder: Path, *, kind: str) -> str | None:
    """The command for what lies in a folder; None if this server does not serve it.

    The server may lack the base; a classifier has a command for its merged model alone, where the server has such.

    Args:
        kind: "adapter", which was judged right; "gguf" or "merged".
    """
    command, rank = (consumer.merged if kind == "merged" else consumer.serve), vllm_rank(adapter.named_rank)
    if (kind == "adapter" and consumer.file) or (kind == "gguf" and not consumer.file) or not command:
        return None
    if consumer.only and not base.is_one_of(consumer.only):
        return None
    if base.is_classifier and not (kind == "merged" and base.is_one_of(consumer.serves, perhaps=True)):
        return None
    if (rank is None and "{rank}" in command) or not (base.is_classifier or _writes(adapter, base)):
        return None
    template = folder / "chat_template.jinja"
    words = {"base": adapter.base or "BASE", "adapter": f"{NAME}={folder}", "file": str(folder / FILE)}
    words |= {"merged": str(folder), "template": str(template), "rank": str(rank)}
    whole = f"{command} {consumer.template}" if template.is_file() else command
    return whole.strip().format(**{name: quote(word) for name, word in words.items()})


def _writes(adapter: LoraAdapter, base: BaseFacts) -> bool:
    return adapter.config.get("task_type") == "CAUSAL_LM" or base.name.endswith("ForCausalLM")


def serve_lines(adapter: LoraAdapter, base: BaseFacts, folder: Path, format: str) -> dict[str, str]:
    """The command of each server that serves an export in this format right, by its newest rule."""
    kind = format if format in ("gguf", "merged") else "adapter"
    lines = dict[str, str]()
    for consumer in (one for one in CONSUMERS if not one.until):
        line = serve_line(consumer, adapter, base, folder, kind=kind)
        if line and (kind != "adapter" or judge(consumer, adapter, base).verdict == "right"):
            lines[consumer.server] = line
    return lines
