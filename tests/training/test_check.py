"""`tsqlora check` against a small server on 127.0.0.1 that answers as PEFT, as the base, or with another template."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from adapter.test_check import say, serving
from byte_tokenizers import CHATML, END
from runs import write_jsonl
from training.test_generation import PLAIN, TRAINING, config_of
from tsqlora.errors import SettingsError, TsqLoraError, UnsupportedError
from tsqlora.settings import load_config
from tsqlora.training import check
from tsqlora.training import command as pipeline
from tsqlora.training.check import Prompt, check_run, held_out, write
from tsqlora.training.job import Job, open_run

Run = Callable[..., tuple[int, str, str]]
OTHER = CHATML.replace("<|im_start|>assistant", "<|im_start|>bot")


def chats(n: int) -> list[dict[str, Any]]:
    words = ("pink", "blue", "grey", "teal")
    pairs = [(words[j % 4], words[j % 4][:2]) for j in range(n)]
    return [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in pairs]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt to answer with two letters."""
    folder = tmp_path_factory.mktemp("check")
    sections = PLAIN | {"training": {**TRAINING, "epochs": 8}, "ranks": {"policy": "fixed", "mean": 8.0}}
    config = config_of(folder, "causal-lm", chats(40), task={"max_new_tokens": 6}, **sections)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template, tokenizer.eos_token = CHATML, "<|im_end|>"
    tokenizer.save_pretrained(folder / "model")
    for name in ("config.json", "generation_config.json"):  # generation stops where the template does
        settings = json.loads((folder / "model" / name).read_text()) | {"eos_token_id": END}
        (folder / "model" / name).write_text(json.dumps(settings))
    write_jsonl(folder / "test.jsonl", chats(8))
    pipeline.train(load_config(config, [f"data.test={folder / 'test.jsonl'}", "data.max_length=96"]), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def finished(run: Path) -> Job:
    return open_run(run)


@contextmanager
def server(
    finished: Job, *, base: bool = False, template: str = CHATML, names: tuple[str, ...] = ("adapter",)
) -> Iterator[tuple[str, list[str]]]:
    """Its URL, and the paths of its requests: a server of this run, by its own template."""
    paths, tokenizer = list[str](), finished.pretrained.tokenizer

    def rendered(body: Any) -> str:
        return tokenizer.apply_chat_template(
            body["messages"], chat_template=template, tokenize=False, add_generation_prompt=True
        )

    def answer(handler: Any, body: Any) -> None:
        paths.append(handler.path)
        match handler.path:
            case "/v1/models":
                return say(handler, {"data": [{"id": name} for name in names]})
            case "/apply-template":
                return say(handler, {"prompt": rendered(body)})
            case "/tokenize":
                return say(handler, {"tokens": tokenizer(body["content"], add_special_tokens=False).input_ids})
            case "/v1/chat/completions":
                ids = tokenizer(rendered(body), add_special_tokens=False).input_ids
            case _:
                ids = body["prompt"]
        done = write(finished, Prompt("", ids, None), base=base or body["model"] == "base")
        text = {"message": {"content": done.text}} if "chat" in handler.path else {"text": done.text}
        say(handler, {"choices": [{**text, "finish_reason": "stop" if done.stopped else "length"}]})

    with serving(answer) as url:
        yield url, paths


def test_a_server_that_answers_as_peft_is_right(run: Path, finished: Job) -> None:
    with server(finished) as (url, paths):
        report = check_run(run, url)
    assert (report["verdict"], report["prompts"], report["same"]) == ("right", 8, 1.0)
    assert report["stopped"] == report["stopped_peft"]
    assert report["prompt_tokens"]["same"] > 10
    assert "/v1/completions" not in paths, "only where an answer differs"
    (prompt, *_) = held_out(finished)
    assert prompt.text == "<|im_start|>user\npink<|im_end|>\n<|im_start|>assistant\n"
    assert finished.pretrained.tokenizer.decode(prompt.ids) == prompt.text


def test_without_a_server_it_says_how_often_answers_stop(run: Path, tsqlora: Run) -> None:
    report = check_run(run)
    assert (report["verdict"], report["prompts"]) == (None, 8)
    code, out, _ = tsqlora("check", run)
    assert (code, out.split(" of ")[0]) == (0, f"{report['stopped_peft']:.0%}")


def test_another_template_is_told_from_other_weights(run: Path, finished: Job) -> None:
    finished.model.eval()
    with server(finished, template=OTHER) as (url, paths):
        report = check_run(run, url)
    different = round((1 - report["same"]) * 8)
    assert (report["by_template"], report["by_weights"]) == (different, 0)
    assert paths.count("/v1/completions") == different
    tokens = report["prompt_tokens"]
    assert tokens["trained"].startswith("a")
    assert tokens["served"].startswith("b")


def test_several_models_need_a_name(run: Path, finished: Job) -> None:
    with server(finished, names=("base", "adapter")) as (url, _):
        with pytest.raises(SettingsError, match=r"served-name is needed.*base, adapter"):
            check_run(run, url)
        with pytest.raises(SettingsError, match="served-name mine"):
            check_run(run, url, served_name="mine")
        assert check_run(run, url, served_name="adapter")["verdict"] == "right"
        report = check_run(run, url, served_name="base")
    assert (report["verdict"], report["base_answered"], report["by_weights"]) == ("wrong", True, 8)


def test_what_cannot_be_asked_is_one_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"32 held-out prompts.*example.invalid.*--yes"):
        check_run(run, "http://example.invalid:1")
    with (
        serving(lambda handler, _: say(handler, {"models": []})) as url,
        pytest.raises(TsqLoraError, match="/v1/models"),
    ):
        check_run(run, url)
    monkeypatch.setattr(check, "require_finished", lambda run: SimpleNamespace(task="sequence-classification"))
    with pytest.raises(UnsupportedError):
        check_run(tmp_path, "http://127.0.0.1:9")


def test_a_run_holds_the_prompts_of_its_template(run: Path, tmp_path: Path, tsqlora: Run) -> None:
    contract = json.loads((run / "template.json").read_text(encoding="utf-8"))
    assert len(contract["prompts"]) == 5
    assert contract["prompts"][0]["text"].endswith("<|im_start|>assistant\n")
    assert (contract["stop_tokens"], contract["stops_trained"]) == (["<|im_end|>"], 1.0)
    assert (run / "template.json").stat().st_mode & 0o077 == 0
    for name, template, expected in (("same", CHATML, 0), ("other", OTHER, 4)):
        (tmp_path / name).write_text(template)
        code, out, _ = tsqlora("doctor", run, "--template", tmp_path / name, "--json")
        assert code == expected
        assert (json.loads(out)["template"]["first"] is None) == (code == 0)
    _, out, _ = tsqlora("doctor", run, "--template", tmp_path / "other")
    assert "0 of 5 prompts are those of training" in out


def test_a_script_gets_the_exit_code(run: Path, finished: Job, tsqlora: Run) -> None:
    with server(finished) as (url, _):
        code, out, _ = tsqlora("check", run, "--server-url", url, "--json")
        assert (code, json.loads(out)["verdict"]) == (0, "right")
    with server(finished, base=True) as (url, _):
        code, out, _ = tsqlora("check", run, "--server-url", url)
    assert code == 4
    assert "the base answered" in out
    code, _, err = tsqlora("check", run, "--server-url", url)
    assert (code, len(err.strip().splitlines())) == (1, 1)
