"""What may befall a training: does it end as if nothing had happened, or say in a line what to do?

    python bench/faults.py [--groups kill,signal:3,...] [--model tiny] [--seed 0] [--out FILE]

Each case is a `tsqlora train` in separate processes, something that happens to it, and a `tsqlora train --resume`. It
survives where in the end adapter, scores, ranks, metrics and record (but for seconds) have the bytes of a run that was
left alone, where exit codes are those of the documentation, and where nobody was shown a traceback. What is refused is
refused in one line with the words that it must have. Cases that FILE has are not tried again, but for those that did
not survive. Models differ in size and in when they save: tiny, minilm, epochs, accumulating, best.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from faults_child import PHASES, clock_was_ahead
from faults_runs import LIMIT, SAVES, Bench, Lost, manifest, newest, wide
from origin import commit, parser_of, read, write

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
    "tsqlora_manifest.json",
)
FULL = (0.3, 0.5, 0.6, 0.7, 0.85, 0.95)
"""Share of a whole run's bytes that a disk takes."""
RUN_FILES = ("scores.parquet", "config.yaml", "run.json")


def kill(bench: Bench, run: Path, number: int, rng: random.Random) -> dict[str, Any]:
    """SIGKILL at a random moment of a phase; every fifth run once more while it goes on."""
    kills: list[dict[str, Any]] = []
    for again in range(2 if number % 5 == 4 else 1):
        phase = rng.choice(PHASES[2:]) if again else PHASES[number % len(PHASES)]
        process = bench.train(run, signal=signal.SIGKILL, **bench.moment(phase, rng))
        code = process.wait()
        if code == 0 and again:
            break  # what was left of it had no such moment
        if code != -signal.SIGKILL:
            raise Lost(f"exit {code} where SIGKILL was to come in {phase}: {process.output()[-300:]}")
        kills.append({"phase": process.where, "last complete checkpoint": newest(run)})
    bench.resumed(run)
    return {"kills": kills}


def stop(bench: Bench, run: Path, number: int, rng: random.Random) -> dict[str, Any]:
    """SIGTERM or Ctrl-C: it ends after the step, with a checkpoint of it."""
    which = (signal.SIGTERM, signal.SIGINT)[number % 2]
    phase = PHASES[number // 2 % len(PHASES)]
    process = bench.train(run, signal=which, **bench.moment(phase, rng))
    process.wait()
    if "report      tsqlora report" in process.output():  # its last line: all files are written
        bench.same(run)
        return {"phase": phase, "told": "the run was over"}
    message = process.refused(128 + which, f"stopped by {which.name}", "--resume")
    if "after step" in message and f"after step {newest(run)}," not in message:
        raise Lost(f"the newest whole checkpoint is {newest(run)}, and: {message}")
    bench.resumed(run)
    return {"phase": phase, "told": message}


def disk(bench: Bench, run: Path, number: int, rng: random.Random) -> dict[str, Any]:
    """Full, out of inodes, or read-only from the beginning: a tmpfs; or from some moment on: a folder. As root."""
    if number == 8:
        process, folder = bench.train(run), run / "checkpoints"
        process.until(lambda: process.counts[1 + PHASES.index("checkpointing")] >= 3)
        subprocess.run(["chattr", "+i", str(folder)], check=True)
        try:
            message = process.refused(1, "cannot be written", "not permitted", "--resume")
        finally:
            subprocess.run(["chattr", "-i", str(folder)], check=True)
        bench.resumed(run)
        return {"told": message}
    whole = sum(path.stat().st_size for path in bench.alone.rglob("*") if path.is_file())
    with mounted(bench.place / "disk") as place:
        inner = place / run.name
        if number == 7:
            remount(place, "ro")
            message, back = bench.train(inner).refused(2, "cannot be written", "Read-only", "name another"), "rw"
        else:
            remount(place, f"size={int(whole * FULL[number])}" if number < len(FULL) else "nr_inodes=40")
            message = bench.train(inner).refused(1, "cannot be written", "--resume")
            back = "size=64m,nr_inodes=9999"
        remount(place, back)
        bench.resumed(inner)
    return {"told": message}


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
    """One file of the newest checkpoint: the one before is used, with a note. One of the run's: refused."""
    checkpoint, harm = bench.killed(run), HARMS[number % 3]
    name = (*CHECKPOINT_FILES, *RUN_FILES)[number // 3]
    entry: dict[str, Any] = {"file": name, "how": harm.__name__}
    if name in CHECKPOINT_FILES:
        harm(checkpoint / name)
        if f"{checkpoint} is passed over: " not in bench.resumed(run):
            raise Lost("no note about the damaged checkpoint")
        return entry
    content = (run / name).read_bytes()
    harm(run / name)
    process = bench.train(run)
    code = process.wait()
    if code == 0:
        process.end(0)
        bench.same(run)
        return entry | {"told": "nothing: it was not needed"}
    entry["told"] = process.refused(code, name)
    if code not in (1, 2, 3):
        raise Lost(f"exit {code}")
    (run / name).write_bytes(content)
    bench.resumed(run)
    return entry


def lock(bench: Bench, run: Path, number: int, rng: random.Random) -> dict[str, Any]:
    """Two at the same moment; or a second one while the first trains."""
    first = bench.train(run)
    if number % 2:
        first.until(lambda: first.counts[0] >= 0)
    second = bench.train(run, log="-second")
    codes = (first.wait(), second.wait())
    if sorted(codes) != [0, 2]:
        raise Lost(f"exit codes {codes}")
    loser = first if codes[0] else second
    message = loser.refused(2, "another process is training into", "name another --out")
    bench.same(run)
    return {"told": message}


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
    """Resumed in a locale without UTF-8 and another time zone; labels and names are not ASCII.

    Python takes UTF-8 there all the same, unless PYTHONUTF8=0: then files have ASCII names, or are refused.
    """
    run, strict = run.with_name(f"{run.name}-{'a' if number == 2 else 'ä'}"), number >= 2
    odd = {"LC_ALL": "POSIX", "TZ": "Pacific/Kiritimati"} | ({"PYTHONUTF8": "0"} if strict else {})
    command = [sys.executable, "-m", "tsqlora.cli", "train", str(bench.config), "--out", str(run), "--resume"]
    begun = bench.train(run, signal=signal.SIGKILL, **bench.moment("training", rng)) if number < 3 else None
    if begun is not None and begun.wait() != -signal.SIGKILL:
        raise Lost("it was over before it was killed")
    done = subprocess.run(command, capture_output=True, env=os.environ | odd, timeout=LIMIT)
    output = done.stderr.decode(errors="replace")
    if number == 3 and done.returncode == 2 and "PYTHONUTF8=1" in output:
        return {"told": output.strip()}
    if done.returncode or "Traceback" in output:
        raise Lost(f"exit {done.returncode}: {output[-600:]}")
    bench.same(run)
    return {}


def process(bench: Bench, run: Path, number: int, rng: random.Random) -> dict[str, Any]:
    """Of two processes one is killed: the other ends with a message; both go on."""
    other, victim = (0, 1) if number % 2 else (1, 0)
    plans: list[dict[str, Any]] = [{}, {}]
    plans[victim] = {"signal": signal.SIGKILL, **bench.moment(("training", "look")[number // 2 % 2], rng)}
    alone, both = bench.pair_alone, bench.pair(run, plans=(plans[0], plans[1]))
    if both[victim].wait() != -signal.SIGKILL:
        raise Lost(f"it was over before it was killed: {both[victim].output()[-300:]}")
    died = time.monotonic()
    message = both[other].refused(1, "another of the 2 processes has ended", "--resume")
    seconds = time.monotonic() - died
    for each in bench.pair(run):
        each.end(0)
    bench.same(run, alone)
    return {"killed": victim, "seconds": seconds, "told": message}


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
    if [step["step"] for step in skipped["steps"]] != list(chosen):
        raise Lost(f"skipped {skipped}, not {chosen}")
    return {"steps": chosen}


def memory(bench: Bench, run: Path, number: int, rng: random.Random) -> dict[str, Any]:
    """Allocations that fail from some pass on, and a real limit: the same steps, in smaller parts."""
    if number == 0:
        plan: dict[str, Any] = {"prepare": "limit", "bytes": 16 << 20, "config": wide(bench.place)}
    else:
        plan = {"prepare": "memory", "first": rng.randrange(1, 24), "rows": (1, 2, 4)[number % 3]}
    output = bench.train(run, **plan).end(0)
    record = json.loads((run / "run.json").read_text())
    newest_state = json.loads((manifest(run, newest(run) or 0).parent / "trainer_state.json").read_text())
    result = {"steps": newest_state["global_step"], "planned": record["plan"]["steps"]}
    result["rows at once"] = newest_state["stateful_callbacks"]["tsqlora"]["rows"]
    if "memory does not suffice" not in output or result["steps"] != result["planned"] or not record["rank_events"]:
        raise Lost(f"{result}: {output[-300:]}")
    return result | {name: plan[name] for name in ("bytes", "first", "rows") if name in plan}


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


def main() -> None:
    parser = parser_of(__doc__, "faults")
    parser.add_argument("--groups", default=",".join(GROUPS), help="NAME:N for the first N cases")
    parser.add_argument("--model", choices=SAVES, default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import tsqlora.training.command  # noqa: F401  (what is forked has it then)

    previous = read(args.out)
    cells, lost = previous.setdefault("cells", {}), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        bench: Bench | None = None
        for group_range in args.groups.split(","):
            group, _, most = group_range.partition(":")
            for number in range(int(most or GROUPS[group][1])):
                key = f"{group}/{args.model}/{args.seed}/{number}"
                if cells.get(key, {}).get("survived"):
                    continue
                bench = bench or Bench(Path(folder), args.model)
                result = tried(bench, group, number, args.seed)
                cells[key] = json.loads(json.dumps(result).replace(f"{folder}/", ""))
                write(args.out, previous | {"cores": os.cpu_count()})
                print(key, "survived" if result["survived"] else f"LOST: {result['lost']}", flush=True)
                lost += [] if result["survived"] else [key]
    print(f"{len(cells)} cases, lost: {lost}")
    sys.exit(1 if lost else 0)


def tried(bench: Bench, group: str, number: int, seed: int) -> dict[str, Any]:
    """What came of one case; its files go."""
    run, begun = bench.place / f"{group}-{number}", time.monotonic()
    result: dict[str, Any] = {"survived": False}
    try:
        result |= GROUPS[group][0](bench, run, number, random.Random(f"{seed} {group} {number}")) | {"survived": True}
    except Lost as loss:
        result["lost"] = str(loss)
    except Exception:
        traceback.print_exc()
        result["lost"] = traceback.format_exc()[-600:]
    for left in bench.place.glob(f"{run.name}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
    return result | {"took": round(time.monotonic() - begun, 1), "commit": commit()}


if __name__ == "__main__":
    main()
