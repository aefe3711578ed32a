"""Without the paper's wing all else works: audits, training with trusted rows, predictions, exports, the doctor."""

import json
import subprocess
import sys
from pathlib import Path

from days.families import model_folder
from runs import make_rows, set_up, write_jsonl

HIDDEN = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("tsqlora.paper"):
            raise ImportError(f"{name} is hidden")

sys.meta_path.insert(0, Hidden())

import tsqlora
from tsqlora.cli import commands

for line in open(sys.argv.pop()):
    sys.argv[1:] = line.removeprefix("no ").split()
    try:
        commands.main()
        end = None
    except (SystemExit, ImportError) as raised:
        end = getattr(raised, "code", raised)
    print(line, end, file=sys.stderr)
    assert bool(end) == line.startswith("no "), line
    assert not any(name.startswith("tsqlora.paper") for name in sys.modules)
"""
COMMANDS = """\
audit train.jsonl --model model --out audit
audit chats.jsonl --model QWEN --no-model --out texts
train c.yaml --set data.trusted=trusted.jsonl --out run
evaluate run
predict run --data train.jsonl --out predicted.csv
explain run --row 3
report run
score c.yaml --out scores.parquet
export run --format universal --out adapter
doctor adapter
no train c.yaml --set ranks.policy=tsqlora --out published --debug
"""


def test_everything_else_works_without_it_and_a_setting_of_the_paper_asks_for_it(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "trusted.jsonl", make_rows(40, seed=1))
    set_up(tmp_path, rows=120, ranks={"policy": "fixed"})
    turns = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Red, I would say."}]
    write_jsonl(tmp_path / "chats.jsonl", [{"messages": turns} for _ in range(8)])
    (tmp_path / "commands").write_text(COMMANDS.replace("QWEN", str(model_folder("qwen 2.5"))))
    done = subprocess.run([sys.executable, "-c", HIDDEN, "commands"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tsqlora.paper is hidden" in done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
