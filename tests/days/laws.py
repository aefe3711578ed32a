"""What holds on every day, whatever its rows: each law is a function that yields what broke it."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from days.doors import Batch, Outcome
from days.oracle import Expected

Line = Mapping[str, Any]
Findings = Mapping[str, Mapping[str, Any]]
BY_MODEL = ("foreign_answer", "cut_answer", "disordered_answer", "swapped_pair")
"""Findings of a model that reads the answers: one with random weights has none."""
MISSING = ("dropped", "template_error", "no_template", "prompt_not_prefix")
"""Findings that say why a row has no tokens."""
CHANCE = 0.1
"""Most of what a model without skill may say that it finds."""
_ROW = re.compile(r"(line|row|rows|message|cell)s? '?\d|\d+ of \d+|\.\w+:\d+")
_CURE = re.compile(r";|\b(set|give|remove|write|correct|use|raise|choose|install|add|type|name|leave)\b")


@dataclass(slots=True)
class Seen:
    """What a day showed: the laws that it broke, and what a user relies on, which is frozen."""

    broken: list[str] = field(default_factory=list)
    unlucky: list[str] = field(default_factory=list)
    """What a model without skill may say on few days."""
    codes: list[int] = field(default_factory=list)
    findings: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, Any] = field(default_factory=dict)

    def hold(self, *broken: Iterable[str]) -> None:
        for law in broken:
            self.broken += law


def no_traceback(outcome: Outcome) -> Iterator[str]:
    """No day ends in a traceback."""
    if outcome.trace:
        yield f"traceback: {outcome.trace}"


def refusal_is_sound(outcome: Outcome, *, of_rows: bool) -> Iterator[str]:
    """A refusal names the thing, the row, and the cure."""
    if not outcome.refusal:
        return
    if of_rows and not _ROW.search(outcome.refusal):
        yield f"refusal without a row: {outcome.refusal}"
    if not _CURE.search(outcome.refusal):
        yield f"refusal without a cure: {outcome.refusal}"


def rows_out_are_rows_in(lines: Sequence[Line], count: int) -> Iterator[str]:
    """As many rows come out as went in, each with a fate."""
    if [line["row"] for line in lines] != list(range(count)):
        yield f"{len(lines)} lines of {count} rows"
    if nameless := [line["row"] for line in lines if not line["fate"]]:
        yield f"rows {nameless[:3]} have no fate"


def of_row(place: int, line: Line, findings: Findings) -> dict[str, str]:
    """The findings of a row with their severities."""
    names = {name for name, one in findings.items() if place in one["places"]} | {*line["findings"]}
    return {name: findings[name]["severity"] if name in findings else "error" for name in names}


def clean_rows_have_no_finding(
    lines: Sequence[Line],
    findings: Findings,
    expected: Sequence[Expected | None],
    planted: Mapping[int, Any],
    limit: int,
    simple: Expected | None = None,
) -> Iterator[str]:
    """A row without a fault, which the template renders, is trained whole, and has nothing worse than a note.

    `simple` is what the template makes of a question and its answer: where a row has no one text.
    """
    for line, one in zip(lines, expected, strict=False):
        place = line["row"]
        if place in planted or (one is not None and (one.refusal or one.lost)):
            continue
        loud = {name for name, severity in of_row(place, line, findings).items() if severity != "note"}
        near = one is None or len(one.ids) > limit - 3
        loud -= {"answer_cut", "dropped"} if near and limit < 8_000 else set()
        if (by_template := one or simple) is not None:  # what the family's template does is no fault of the row
            own = {"stop_not_trained"} if not by_template.stops else set[str]()
            own |= {"prompt_not_prefix"} if by_template.rewrites else set[str]()
            loud -= {name for name in own if of_row(place, line, findings).get(name) != "error"}
        if loud:
            yield f"clean row {place} has {sorted(loud)} ({line['detail'][:200]})"
        elif line["fate"] != "trained" and not near:
            yield f"clean row {place} is '{line['fate']}' ({line['detail'][:200]})"


def refusals_are_the_templates(
    lines: Sequence[Line], findings: Findings, expected: Sequence[Expected | None]
) -> Iterator[str]:
    """What the template refuses is left out, in the template's words."""
    for line, one in zip(lines, expected, strict=False):
        if one is None or not one.refusal:
            continue
        names = of_row(line["row"], line, findings)
        if line["fate"] == "trained" or not {*MISSING, "content_lost", "empty_answer"} & {*names}:
            yield f"row {line['row']}, which the template refuses ({one.refusal}), is '{line['fate']}' with {[*names]}"
        elif "template_error" in names and one.refusal not in line["detail"]:
            yield f"row {line['row']} is refused in other words than the template's ({one.refusal}): {line['detail']}"


def lost_content_is_said(
    lines: Sequence[Line], findings: Findings, expected: Sequence[Expected | None]
) -> Iterator[str]:
    """A row of which the template leaves something out has a finding that says so."""
    for line, one in zip(lines, expected, strict=False):
        if one is None or one.refusal or not one.lost:
            continue
        names = of_row(line["row"], line, findings)
        if line["fate"] != "trained" and names:
            continue  # left out, for what is said
        if not {"content_lost", "reasoning_stripped", *MISSING} & {*names}:
            yield f"row {line['row']} lost {one.lost[0][:40]!r} without a finding ({line['fate']}, {[*names]})"


def planted_faults_are_named(
    lines: Sequence[Line], findings: Findings, planted: Mapping[int, set[str]]
) -> Iterator[str]:
    """A fault that can be read off the row is named in its row."""
    for place, names in planted.items():
        if not names:
            continue
        got = of_row(place, lines[place], findings) if place < len(lines) else {}
        if not names & {*got}:
            yield f"row {place} has none of {sorted(names)}, but {sorted(got)} ({lines[place]['fate']})"


def counts_are_the_templates(
    lines: Sequence[Line], expected: Sequence[Expected | None], limit: int, planted: Mapping[int, Any]
) -> Iterator[str]:
    """A row has as many tokens, and as many trained ones, as its text by the template."""
    for line, one in zip(lines, expected, strict=False):
        if (
            one is None
            or one.refusal
            or line["fate"] != "trained"
            or line["row"] in planted
            or len(one.ids) > limit - 3
        ):
            continue
        slack = 1 + 2 * len(one.targets or ())  # a token may span the places where pieces meet
        if abs(line["tokens"] - len(one.ids)) > slack:
            yield f"row {line['row']} has {line['tokens']} tokens; the template writes {len(one.ids)}"
        elif one.targets is not None and abs(line["trained_tokens"] - one.trained_tokens) > slack:
            yield f"row {line['row']} trains {line['trained_tokens']} tokens; its answers have {one.trained_tokens}"


def batches_are_the_ledgers(lines: Sequence[Line], batches: Sequence[Batch]) -> Iterator[str]:
    """The tokens that the ledger calls trained are those of the batches that the Trainer gets."""
    recorded = Counter(
        (line["tokens"], line["trained_tokens"], line["first_trained"], line["last_trained"])
        for line in lines
        if line["trained_tokens"]
    )
    got = Counter(
        (len(one.ids), len(one.trained), one.trained[0], one.trained[-1]) for one in {*batches} if one.trained
    )
    if untold := [*(got - recorded)]:
        yield f"batches have rows {untold[:2]} that the ledger lacks"
    if lacking := [*(recorded - got)]:
        yield f"the ledger has rows {lacking[:2]} that no batch has"


def batches_are_the_templates(
    batches: Sequence[Batch], expected: Sequence[Expected | None], tokenizer: Any
) -> Iterator[str]:
    """What a template renders from the whole message is what is trained, byte for byte."""
    if any(one is None for one in expected):
        return

    opens = tokenizer.tokenize("a")[0].startswith("▁")  # a text that stands alone, with a blank

    def text_of(ids: Sequence[int]) -> str:
        text = tokenizer.decode(ids, skip_special_tokens=False)
        return "".join(text.split()) if opens else text.strip()

    def read(text: str) -> str:
        return text_of(tokenizer(text, add_special_tokens=False)["input_ids"])

    texts = {
        (text_of(one.ids), None if one.targets is None else read(one.trained))
        for one in expected
        if one is not None and not one.refusal
    }
    wholes = {text for text, _ in texts}
    for one in batches:
        whole, target = text_of(one.ids), text_of([one.ids[k] for k in one.trained])
        if whole not in wholes:
            near = max(wholes, key=lambda text: len(_common(text, whole)), default="")
            at = len(_common(near, whole))
            got, right = (text[max(0, at - 20) : at + 50] for text in (whole, near))
            yield f"a batch reads {got!r}; the template writes {right!r}"
        elif not any(text == whole and (right is None or _is_trained(right, target)) for text, right in texts):
            yield f"of {whole[-60:]!r} is trained {target[:60]!r}; the template's answers are others"


def _is_trained(right: str, target: str) -> bool:
    """Whether the target is trained; nothing predicts a text's first token."""
    return right == target or (right.endswith(target) and len(right) - len(target) < 16)


def _common(a: str, b: str) -> str:
    k = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:k]


def no_skill_accuses_nobody(findings: Findings) -> Iterator[str]:
    """A model without skill accuses no row."""
    for name in BY_MODEL:
        if name in findings and findings[name]["places"]:
            yield f"random weights list {len(findings[name]['places'])} rows as {name}"


def no_recall_without_skill(text: str) -> Iterator[str]:
    """A model without skill prints no recall above its true one, which is about nothing."""
    # The share, or where there is an interval its lower end; the true one is that of chance.
    shares = [float(percent) / 100 for percent in re.findall(r"(\d+)\s?% of (?:\d+ planted|(?:foreign|cut|dis))", text)]
    shares += [float(x) for part in re.findall(r'"recall": \{([^}]*)\}', text) for x in re.findall(r": ([\d.]+)", part)]
    shares += [float(low) for low in re.findall(r'"between": \[([\d.]+)', text)]
    if shares and max(shares) > CHANCE:
        yield f"random weights print a recall of {max(shares):.0%}"


def ledger_is_the_sets(lines: Sequence[Line], samples: Sequence[Mapping[str, list[int]]]) -> Iterator[str]:
    """Of a prepared row, the ledger has the tokens and labels that are in the set."""
    for line, sample in zip(lines, samples, strict=False):
        places = [k for k, label in enumerate(sample["labels"]) if label != -100 and k]
        ends = (places[0], places[-1]) if places else (None, None)
        right = (len(sample["input_ids"]), len(places), *ends)
        recorded = tuple(line[name] for name in ("tokens", "trained_tokens", "first_trained", "last_trained"))
        if recorded != right:
            yield f"row {line['row']} is {recorded} in the ledger, {right} in the set ({line['fate']}, {line['match']})"


def batches_are_of_the_set(batches: Sequence[Batch], samples: Sequence[Mapping[str, list[int]]]) -> Iterator[str]:
    """A row of a batch is one of the set, with its labels."""
    sources = {
        (tuple(s["input_ids"]), tuple(k for k, label in enumerate(s["labels"]) if label != -100)) for s in samples
    }
    if foreign := [one for one in batches if (one.ids, one.trained) not in sources]:
        yield f"{len(foreign)} rows of batches are not of the set"


def _plain(value: Any, *, texts: bool) -> Any:
    """A cell without fields that hold nothing; of a file of texts as its text."""
    if isinstance(value, dict):
        return {
            key: _plain(inner, texts=texts)
            for key, inner in value.items()
            if inner is not None and (inner != "" or not texts)
        }
    if isinstance(value, list):
        return [_plain(inner, texts=texts) for inner in value]
    if not texts:
        return value
    text = re.sub(r"^(\d+)\.0$", r"\1", str(value))  # a spreadsheet has no 3.0, and writes TRUE
    return text.upper() if text.upper() in ("TRUE", "FALSE") else text


def rows_are_equal(got: Sequence[Any], right: Sequence[Any], *, texts: bool) -> Iterator[str]:
    """Untouched rows stay equal."""
    for place, (one, other) in enumerate(zip(got, right, strict=False)):
        now, was = _plain(one, texts=texts), _plain(other, texts=texts)
        if now != was:
            keys = [key for key in {**was, **now} if now.get(key) != was.get(key)]
            parts = ((key, str(was.get(key))[-150:], str(now.get(key))[-150:]) for key in keys)
            yield f"row {place} changed: " + ", ".join(f"{key} from {a!r} to {b!r}" for key, a, b in parts)
            return


def rows_are_of(got: Sequence[Any], rows: Sequence[Any]) -> Iterator[str]:
    """Each row is one of those that went in."""
    sources = {json.dumps(_plain(row, texts=False), sort_keys=True) for row in rows}
    if changed := [row for row in got if json.dumps(_plain(row, texts=False), sort_keys=True) not in sources]:
        yield f"{len(changed)} rows are none of the file, such as {str(changed[0])[:200]}"
