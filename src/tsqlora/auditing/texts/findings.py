"""What is wrong with the rows of a text audit: names, severities, causes and cures."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tsqlora.auditing.texts.ledger import Line
from tsqlora.errors import Finding, SettingsError, nearest

ERROR, WARNING, NOTE = SEVERITIES = ("error", "warning", "note")
NEARLY_ALL = 0.99
LEAKS = 0.01
"""Share of the training rows in the evaluation file above which a leak is an error."""


def _cures(trl: str, axolotl: str, llamafactory: str) -> dict[str, str]:
    return {"TRL": trl, "axolotl": axolotl, "LLaMA-Factory": llamafactory}


_LONGER = _cures("SFTConfig(max_length={longer})", "sequence_len: {longer}", "cutoff_len: {longer}")

_KINDS: dict[str, tuple[Any, ...]] = {
    "nothing_trained": (
        WARNING,
        "no token of an answer has a loss",
        _cures("SFTConfig(max_length=None)", "train_on_inputs: false, sequence_len: {longer}", "cutoff_len: {longer}"),
    ),
    "answer_cut": (WARNING, "the length limit takes tokens of an answer", _LONGER),
    "cut_then_stop": (
        ERROR,
        "a cut answer is followed by a trained stop: the model learns to stop in the middle",
        _LONGER,
    ),
    "dropped": (WARNING, "the preparation left these rows out", _LONGER),
    "stop_not_trained": (
        WARNING,
        "no stop is trained behind the last answer, so the model does not learn to end it",
        _cures(
            'SFTConfig(eos_token="<|im_end|>"), with the token that the template writes behind an answer',
            "train_on_eos: turn",
            "template: the one that the base model was trained with",
        ),
    ),
    "stop_mismatch": (
        ERROR,
        "the trained stop is not among the tokens at which generation stops",
        _cures(
            "model.generation_config.eos_token_id = tokenizer.eos_token_id",
            "special_tokens: {eos_token: …}, the one that the template writes",
            "replace_eos: true",
        ),
    ),
    "prompt_trained": (
        NOTE,
        "tokens of prompts, system prompts or tool outputs are trained, too",
        _cures("SFTConfig(assistant_only_loss=True)", "train_on_inputs: false", "train_on_prompt: false"),
    ),
    "only_last_answer": (
        NOTE,
        "only the last of several answers is trained",
        _cures("SFTConfig(assistant_only_loss=True)", "roles_to_train: [assistant]", "mask_history: false"),
    ),
    "bos": (
        ERROR,
        "the text begins with its BOS token twice",
        _cures(
            "remove bos_token from the template: the tokenizer adds it",
            "remove bos_token from chat_template_jinja",
            "template: the one of the base model",
        ),
    ),
    "template_twice": (
        WARNING,
        "a text contains special tokens of the tokenizer, as one that a template has rendered already",
    ),
    "template_error": (ERROR, "the chat template refuses these messages"),
    "no_template": (
        ERROR,
        "rows are chats, and the tokenizer has no chat template",
        _cures("SFTConfig(chat_template_path=…)", "chat_template: chatml", "template: chatml"),
    ),
    "content_lost": (
        ERROR,
        "the preparation leaves out content of a message, such as a tool call or the reasoning of the last answer; "
        "give a chat template that writes it",
    ),
    "reasoning_stripped": (
        NOTE,
        "the template leaves out the reasoning of earlier answers, as it does when the model is served",
    ),
    "prompt_not_prefix": (
        WARNING,
        "the template renders what stands before an answer in another way than the prompt of that answer; these rows "
        "are trained on as it renders the whole chat, and earlier answers that it rewrites are not targets (write one "
        "answer a row to train all)",
        _cures("SFTConfig(assistant_only_loss=True)", "roles_to_train: [assistant]", "mask_history: false"),
    ),
    "empty_answer": (WARNING, "an answer is empty"),
    "copies_prompt": (WARNING, "the answer begins with the whole prompt"),
    "vocabulary": (ERROR, "token ids lie beyond the vocabulary"),
    "untrained_tokens": (
        WARNING,
        "turn markers of several tokens, or added tokens that look untrained and that this LoRA does not train",
        _cures(
            'LoraConfig(modules_to_save=["embed_tokens", "lm_head"])',
            "fix_untrained_tokens: true, lora_modules_to_save: [embed_tokens, lm_head]",
            "additional_target: embed_tokens,lm_head",
        ),
    ),
    "foreign_answer": (WARNING, "the answer fits other prompts as well as its own; see how the rows were joined"),
    "cut_answer": (WARNING, "the answer ends in the middle, as generation stopped at a limit"),
    "disordered_answer": (WARNING, "the answer's sentences are out of order, or repeated"),
    "swapped_pair": (WARNING, "chosen and rejected answer differ as in most other pairs, but the other way round"),
    "roles": (WARNING, "no user turn, two in a row, no answer to the last one, or a tool call without a result"),
    "duplicate": (WARNING, "the row is a copy of an earlier one, or near to it in prompt and answer"),
    "eval_leak": (WARNING, "the row contains a prompt of the evaluation file"),
    "conflicting_answers": (WARNING, "the same prompt has different answers"),
    "one_answer": (NOTE, "many prompts have the same answer"),
    "broken_characters": (WARNING, "mojibake, control characters, or role markers written as text"),
    "html": (NOTE, "a text has HTML tags outside code"),
    "pair_equal": (ERROR, "chosen and rejected answer are the same"),
    "pair_prompt": (ERROR, "chosen and rejected answer have different prompts"),
    "pair_conflict": (ERROR, "another row prefers the answer that this one rejects"),
    "lengths": (
        NOTE,
        "much of a random batch is padding, since rows differ in length",
        _cures("SFTConfig(packing=True)", "sample_packing: true", "packing: true"),
    ),
    "length_bias": (NOTE, "the chosen answer is the longer one far more often than not"),
}
"""Severity of single rows, cause, and cure as a line for each trainer."""
FINDINGS = {name: Finding(name, one, (), cause, *cure or ({},)) for name, (one, cause, *cure) in _KINDS.items()}
"""By name; the names are a contract."""
IF_ALL = frozenset({"nothing_trained", "dropped", "stop_not_trained"})
"""An error where (nearly) all rows have it."""
REASONS = 3
"""For which rows were left out, to show of them all."""
OF_TOKENS = frozenset({"nothing_trained", "bos", "vocabulary", "untrained_tokens"})
"""What tokens show without the rows that they were made of."""
OF_LABELS = OF_TOKENS | {
    *("answer_cut", "stop_not_trained", "stop_mismatch", "empty_answer", "broken_characters", "html"),
    *("duplicate", "eval_leak", "conflicting_answers", "one_answer", "pair_equal", "pair_prompt", "pair_conflict"),
    *("foreign_answer", "cut_answer", "disordered_answer", "swapped_pair"),
}
"""What tokens and labels show, which say where the answers are."""
OF_ALL = ("lengths", "length_bias")
"""What all rows have together, so that none can be left out for it."""


def impossible(finds: Collection[str], *, evaluation: bool, answers: bool) -> dict[str, str]:
    """Return the findings that no row of an audit can have, and why; `finds` are those that its kind of rows shows."""
    why = dict.fromkeys(OF_ALL, "it is of all rows together")
    why |= {name: "only the source rows show it (--data)" for name in FINDINGS if name not in (*finds, *why)}
    why |= {} if evaluation else {"eval_leak": "it needs evaluation rows (--eval)"}
    faults = ("foreign_answer", "cut_answer", "disordered_answer", "swapped_pair")
    return why | ({} if answers else dict.fromkeys(faults, "no model has read the answers"))


def require_possible(names: Collection[str], why_not: Mapping[str, str]) -> None:
    """Raise SettingsError for a name that no finding has, or that no row of an audit can have."""
    for name in names:
        if name not in FINDINGS:
            raise SettingsError(f"unknown finding '{name}'; {nearest(name, FINDINGS)}")
        if name in why_not:
            cure = "leave the name out, or audit with what it needs"
            raise SettingsError(f"no row can have the finding '{name}' here: {why_not[name]}; {cure}")


def findings_of(
    lines: Sequence[Line], further: Mapping[str, Sequence[int]] | None = None, *, limit: int = 0
) -> list[Finding]:
    """Gather the lines' findings, and those of rows among each other (`further`, row numbers by name), worst first.

    `limit` is the most tokens of a row, by default those of the longest; a cure names a power of two that holds what
    the limit took.
    """
    limit = limit or max((line.tokens for line in lines), default=0)
    longer = str(1 << (limit + max((line.lost_tokens or 0 for line in lines), default=0)).bit_length())
    rows: dict[str, list[int]] = {name: sorted(places) for name, places in (further or {}).items()}
    dropped = [line for line in lines if line.fate == "dropped"]
    left_out = Counter(name for line in dropped for name in line.findings)
    errs = any(FINDINGS[name].severity == ERROR for line in dropped for name in line.findings)
    none_left = len(dropped) == len(lines) and not errs
    without_cause = [line for line in dropped if none_left or not line.findings or "dropped" in line.findings]
    details = [line.detail for line in without_cause if "answer_cut" not in line.findings]
    for line in lines:
        for name in line.findings:
            rows.setdefault(name, []).append(line.row)
    rows["dropped"] = [line.row for line in without_cause]
    # Only final, uncut answers can end with a stop.
    final_answers = {"stop_not_trained": sum(line.stop_trained is not None for line in lines)}
    findings = []
    for name, places in rows.items():
        if not places:
            continue
        kind = FINDINGS[name]
        severity = kind.severity
        shown = next((f"row {line.row}: {line.shows[name]}" for line in lines if name in line.shows), None)
        # What a template leaves out by its own rule is no error of all rows.
        able = sum(line.fate != "dropped" or name in line.findings for line in lines)
        if name in IF_ALL and shown is None and len(places) >= NEARLY_ALL * final_answers.get(name, able):
            severity = ERROR
        if name == "eval_leak" and len(places) > LEAKS * len(lines):
            severity = ERROR
        cause, cures = kind.cause, {one: cure.replace("{longer}", longer) for one, cure in kind.cure.items()}
        if name == "nothing_trained" and (
            prompts := sum(line.trained_tokens > 0 for line in lines if name in line.findings)
        ):
            cause, cures = f"{cause}; {prompts} of these rows train their prompt: is the mask inverted?", {}
        if name in ("answer_cut", "prompt_not_prefix") and left_out[name]:
            cause += f"; {left_out[name]} of these rows are left out whole"
        cause += f" ({shown})" if shown else ""
        if name == "dropped" and any(details):
            # A longer limit helps those alone that it cuts.
            cut, why = len(without_cause) - len(details), Counter(filter(None, details))
            first = why.most_common(REASONS)
            reasons = [f"{cut:,} by the length limit"] if cut else []
            reasons += [f"{count:,} for this reason: {reason}" for reason, count in first]
            if more := why.total() - sum(count for _, count in first):
                reasons.append(f"{more:,} for others (the ledger has them)")
            cause += f": {'; '.join(reasons) if cut or len(why) > 1 else first[0][0]}"
            cures = cures if cut or not all(details) else {}
        if name in ("template_error", "content_lost"):
            own = [line for line in lines if name in line.findings]
            cause = _reasons((line.fate == "dropped" and line.detail) or cause for line in own)
        findings.append(Finding(name, severity, tuple(places), cause, cures))
    return sorted(findings, key=lambda one: (SEVERITIES.index(one.severity), -len(one.where)))


def _reasons(details: Iterable[str]) -> str:
    """The reasons of rows, each as its first row has it; what is quoted is of one row."""
    alike = defaultdict[str, list[str]](list)
    for detail in details:
        alike[re.sub(r"\(.*?\)|\d+", "", detail)].append(detail)
    reasons = sorted(alike.values(), key=len, reverse=True)
    shown = [f"{len(some):,} of these: {some[0]}" if len(reasons) > 1 else some[0] for some in reasons[:REASONS]]
    return "; ".join([*shown, *(["others (the ledger has them)"] if len(reasons) > REASONS else [])])


def lengths_of(lengths: Sequence[int], batch: int, limit: int) -> dict[str, Any] | None:
    """Summarise the tokens of rows; rows without tokens do not count, and None is of no rows.

    `padding` is the share of padding tokens in batches of random rows, and `packed` the least number of rows of
    `limit` tokens that hold all.

    >>> lengths_of([10, 30, 0], 2, 40)["padding"]
    0.333
    """
    tokens = np.array([length for length in lengths if length])
    if not len(tokens):
        return None
    order = np.random.default_rng(0).permutation(tokens)
    padded = sum(len(part) * int(part.max()) for part in np.split(order, range(batch, len(order), batch)))
    edges = [0, *(2**k for k in range(4, math.ceil(math.log2(tokens.max() + 1)) + 1))]
    counts, _ = np.histogram(tokens, edges if len(edges) > 1 else [0, 16])
    return {
        "rows": len(tokens),
        "median": int(np.median(tokens)),
        "longest": int(tokens.max()),
        "histogram": [{"below": below, "rows": int(count)} for below, count in zip(edges[1:], counts, strict=False)],
        "batch": batch,
        "padding": round(1 - int(tokens.sum()) / padded, 3),
        "packed": math.ceil(int(tokens.sum()) / max(limit, int(tokens.max()))),
    }
