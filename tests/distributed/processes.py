"""Three processes: what two of them do together, the third does alone, then all three score. Run by test_processes.py.

Each writes what came of it: 0.pt and 1.pt of the two, 2.pt of the one; three-0.pt and so on of the three.
"""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from peft import PeftModel, TaskType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

import tsqlora as tsq
from models import GENERATORS, collate, lora, samples, text_collator, texts, tiny_bert
from scoring import quality_by, score_by, teach
from slotted import POOLER, QUERY, WIDE, backward, trained, wrapped
from stock import base_bert, make_trainer, moods, slotted_bert
from texts.test_before import model as repeats
from texts.test_before import samples as foreign_samples
from training.test_question import Handed, answer_of, make
from tsqlora import distributed, paper
from tsqlora.auditing.texts.answers import turns_in
from tsqlora.auditing.texts.look import look_at_answers
from tsqlora.auditing.texts.prepared import sequences_of
from tsqlora.auditing.texts.vocabulary import vocabulary_of
from tsqlora.model import passes
from tsqlora.model.request import Compute
from tsqlora.paper.change import Importance, change_ranks, drop_slots, grow_slot, moments
from tsqlora.paper.probe import Probe
from tsqlora.paper.sites import lora_layers
from tsqlora.paper.slots import Slots, active_ranks, find_slots
from tsqlora.settings import Config
from tsqlora.training.run import arguments
from words import tokenizer

ROWS = samples(8, 3)
MOODS = moods(96)


def quiet(model: PeftModel) -> PeftModel:
    """In double precision and without dropout, so that what is left are sums in another order."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.double()


def halves(rows: list[Any], rank: int, world: int) -> list[Any]:
    size = len(rows) // world
    return rows[rank * size :][:size]


# --- what the processes do, alone with world 1 ---------------------------------------------


def measured(rank: int, world: int) -> Any:
    """Sensitivities of the rows, each process with its own, through DDP where there are several."""
    model = wrapped()
    trains = DistributedDataParallel(model) if world > 1 else model
    return dict(paper.sensitivity(trains, halves(ROWS, rank, world), collate).values)


def measured_in_training(rank: int, world: int) -> Any:
    """The same of passes over batches of five and of three, whose losses are means; then of five in one process."""
    return [in_training(rank, world, batches) for batches in ([ROWS[:5], ROWS[5:]], [ROWS[:5]])]


def in_training(rank: int, world: int, batches: list[Any]) -> Any:
    model = wrapped()
    probe = Probe(lora_layers(model), "sampled")
    with probe.watch(model):
        for batch in batches if world == 1 else batches[rank : rank + 1]:
            model(**collate(batch)).loss.backward()
    return dict(probe.sensitivity().values), {name: rows.clone() for name, rows in probe.directions().items()}


def changed(rank: int, world: int) -> Any:
    """Ranks after a change, with gradients, so sketches and importance, that differ between the processes."""
    model = wrapped()
    layers = find_slots(model)
    importance = Importance(layers)
    for step in range(2):
        backward(model, samples(4, 3, seed=10 * rank + step))
        importance.update()
    sketches = {name: (-1) ** rank * torch.randn(4, slots.shape[0]).double() for name, slots in layers.items()}
    target = active_ranks(model) | {QUERY: 2, WIDE: 6}
    change_ranks(layers, target, importance=importance, sketches=sketches, optimizer=None, min_age=0, seed=0)
    return active_ranks(model), {n: t.clone() for n, t in model.state_dict().items() if "lora_" in n}


def other_ranks(rank: int, world: int) -> Any:
    """A change in models that differ between the processes."""
    model = wrapped(ranks={QUERY: 4 - rank})
    layers = find_slots(model)
    target = active_ranks(model) | {WIDE: 6}
    options: dict[str, Any] = {"sketches": {}, "optimizer": None, "min_age": 0, "seed": 0}
    return error_of(lambda: change_ranks(layers, target, importance=Importance(layers), **options))


def in_trainer(rank: int, world: int, folder: Path) -> Any:
    """The stock Trainer with both callbacks, a global batch of 8; of our arguments what several processes need."""
    model = quiet(slotted_bert())
    data = tsq.QualitySubset(moods(), fraction=0.5, seed=0)
    ranks = paper.RankCallback(interval=2, finalize=False, schedule=paper.RankSchedule(warmup=0.0, freeze=0.2))
    quality = quality_by(data, reference=32, terms=["gradient_norm"])
    ours = arguments(Config.model_validate({"model": {"path": "m"}, "data": {"train": "t"}}), folder)
    options = {"per_device_train_batch_size": 8 // world, "learning_rate": 0.02}
    options |= {"average_tokens_across_devices": ours.average_tokens_across_devices}
    make_trainer(model, data, folder, [ranks, quality], **options).train()
    assert data.scores is not None
    return {
        "events": [asdict(event) for event in ranks.events],
        "importance": {} if ranks.loop is None else ranks.loop.importance.tables(),
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "quality": data.scores.quality.copy(),
        "terms": dict(data.scores.terms),
        "drawn": data.indices.tolist(),
    }


def questioned(world: int, folder: Path) -> list[Any]:
    """A run whose pool contradicts the trusted rows, under the Trainer's own sampler; and its end, resumed."""
    options = {"per_device_train_batch_size": 8 // world, "num_train_epochs": 2, "save_strategy": "steps"}
    options |= {"average_tokens_across_devices": False}  # else the gradient of two is twice that of one
    runs = []
    for resumed in (None, str(folder / "checkpoint-18")):
        trainer, quality = make(folder, handed := Handed(), save_steps=18, **options)
        quiet(trainer.model)
        trainer.train(resume_from_checkpoint=resumed)
        assert quality.data.scores is not None
        runs.append(
            {
                "steps": handed.steps,
                "question": {k: v for k, v in answer_of(quality).items() if isinstance(v, (int, float))},
                "notes": quality.notes,
                "kept": quality.data.scores.kept.copy(),
                "weights": {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()},
            }
        )
    return runs


def exchanged(rank: int) -> Any:
    """Arrays of all kinds, from every process to all, to the first and from it."""
    matrix = np.random.default_rng(rank).normal(size=(40 * (rank + 1), 500))
    value = {
        "matrix": matrix,
        "few": matrix.T[::100],  # not contiguous
        "half": matrix.astype(np.float16),
        "flags": matrix > 0,
        "none": np.empty((0, 4), np.int32),
        "fixed": np.frombuffer(matrix.tobytes(), np.int64),
        "tags": np.array(["a", "bc"]),
        "name": rank,
    }
    everywhere, first = distributed.gathered(value), distributed.to_first([value, matrix])
    return {"gathered": everywhere, "first": first, "shared": distributed.from_first(value)}


def scored(rank: int, world: int, folder: Path) -> Any:
    """The files of four scorings, through DistributedDataParallel where there are several processes."""
    model = lora(tiny_bert(layers=1))
    rows = samples(30, 3)
    teach(model, rows)
    request: dict[str, dict[str, Any]] = {
        "default": {"terms": ()},
        "gradients": {"weights": {"convergence": 1.0}},
        "cut off": {"parts": folder / f"parts-{world}", "hashes": [str(j) for j in range(30)]},
    }
    files = {}
    for name, options in request.items():
        seen: list[int] = []

        def count(batch: list[Any], seen: list[int] = seen) -> dict[str, Tensor]:
            seen.append(len(batch))
            return collate(batch)

        path = folder / f"{name}-{world}-{rank}.parquet"
        trains = DistributedDataParallel(model) if world > 1 else model
        if name == "cut off":  # every batch is on disk, and in each process the last ones get lost
            passes.FLUSH_SECONDS = 0
            score_by(trains, rows, collate, reference=[0, 3, 4, 6, 8, 9, 12], batch_size=4, **options)
            distributed.wait()
            for part in sorted(options["parts"].glob("*/*.safetensors"))[1::2] if rank == 0 else ():
                part.unlink()
            distributed.wait()
        score_by(trains, rows, count, reference=[0, 3, 4, 6, 8, 9, 12], batch_size=4, **options).save(path)
        files[name] = (path.read_bytes(), sum(seen) - 8)  # four that tell the loss, and four the head
    writer = lora(GENERATORS["llama"](), task=TaskType.CAUSAL_LM)
    written, others = texts(writer, 30), texts(writer, 20, seed=1)
    for row in others:
        row["input_ids"] = [1 + token % 5 for token in row["input_ids"]]
    path = folder / f"text-{world}-{rank}.parquet"
    trains = DistributedDataParallel(writer) if world > 1 else writer
    pool, trusted = [*written[:10], *others], written[10:]
    ratios = score_by(trains, pool, text_collator(writer), terms=(), trusted=trusted, batch_size=4)
    assert not ratios.even
    ratios.save(path)
    files["text"] = (path.read_bytes(), len(pool))
    return files


def answers() -> Any:
    """What a look at answers finds, every process with its share of each pass."""
    rows = turns_in(sequences_of(foreign_samples()), vocabulary_of(tokenizer()))
    look = look_at_answers(repeats().double(), rows, vocabulary_of(tokenizer()), Compute(16))
    return {name: (one.score, one.rate, look.rows(name)) for name, one in look.detections.items()}


def refused(rank: int, world: int) -> Any:
    """The error in each process for rows that one cannot read."""
    model = lora(tiny_bert(layers=1))

    def broken(batch: list[Any]) -> dict[str, Tensor]:
        if rank == 1 and len(batch) == 5:
            raise ValueError("a broken row")
        return collate(batch)

    learned = samples(12, 3)
    teach(model, learned)
    options: dict[str, Any] = {"reference": list(range(12)), "batch_size": 5}
    return {
        "reference": error_of(lambda: score_by(model, learned, broken, **options)),
        "pass": error_of(lambda: score_by(model, learned, broken, reference=[0, 1, 2], batch_size=5)),
    }


def error_of(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# --- weights in parts ----------------------------------------------------------------------


def in_parts(model: PeftModel, world: int) -> PeftModel:
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.get_base_model().bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert_in_parts(model)
    return model


def assert_in_parts(model: nn.Module) -> None:
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def looped(rank: int, world: int, folder: Path) -> Any:
    """A custom loop with a global batch of 8; then the saved adapter."""
    model = in_parts(quiet(slotted_bert(max_rank=7)), world)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    ranks = paper.RankLoop(
        model, optimizer, 12, interval=2, min_rank=0, schedule=paper.RankSchedule(warmup=0.0, freeze=0.2, moves=4)
    )
    ranks.start(halves(MOODS[:8], rank, world), collate, batch_size=4)
    for step in range(12):
        rows = halves(MOODS[8 * step :][:8], rank, world)
        ranks.before_forward()
        model(**collate(rows)).loss.backward()
        ranks.before_optimizer_step()
        if world > 1:
            assert_in_parts(model)
        optimizer.step()
        ranks.after_optimizer_step()
        optimizer.zero_grad()
    refusal = error_of(ranks.finish) if world > 1 else ""
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=options) if world > 1 else model.state_dict()
    with torch.no_grad():
        logits = model.eval()(**inputs()).logits
    if rank == 0 and world > 1:
        model.save_pretrained(str(folder / "adapter"), state_dict=state)
        plain = PeftModel.from_pretrained(base_bert().double(), str(folder / "adapter")).double().eval()
        logits = (logits, plain(**inputs()).logits.detach())
    return {
        "events": [asdict(event) for event in ranks.events],
        "importance": ranks.importance.tables(),
        "state": {name: tensor.clone() for name, tensor in state.items() if tensor.is_floating_point()},
        "finalize": refusal,
        "logits": logits,
        "score": error_of(lambda: score_by(model, MOODS, collate)) if world > 1 else "",
    }


def inputs() -> dict[str, Tensor]:
    return {name: value for name, value in collate(MOODS[:4]).items() if name != "labels"}


def moved(rank: int, world: int) -> Any:
    """Weights and moments of slots before and after some go and some come; five slots, so that parts differ in size."""
    model = in_parts(wrapped(mean_rank=3, max_rank=5), world)
    optimizer = torch.optim.AdamW(trained(model), lr=0.01)
    layers = find_slots(model)
    importance = Importance(layers)
    for step in range(3):
        model.zero_grad()
        model(**collate(samples(6, 3, seed=step))).loss.backward()
        importance.update()
        optimizer.step()
    before = everything(layers[QUERY], optimizer)
    drop_slots(layers[QUERY], [1], optimizer)
    grow_slot(layers[QUERY], torch.arange(16.0), optimizer)
    after = everything(layers[QUERY], optimizer)
    options: dict[str, Any] = {"sketches": {}, "optimizer": optimizer, "min_age": 0, "seed": 0}
    for rank_now in (0, 2):
        change_ranks(layers, active_ranks(model) | {POOLER: rank_now}, importance=importance, **options)
    return {
        "before": before,
        "after": after,
        "regrown": everything(layers[POOLER], optimizer),
        "importance": importance.tables(),
    }


def everything(slots: Slots, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """A and B, gradients and moments, each with its slots in front."""
    result = []
    for parameter, dim in slots.matrices():
        assert parameter.grad is not None
        states = [moment.read() for moment in moments(parameter, optimizer).values()]
        wholes = [distributed.full_tensor(parameter.detach()), distributed.full_tensor(parameter.grad), *states]
        result += [tensor.transpose(0, dim).clone() for tensor in wholes]
    return result


# --- three processes -----------------------------------------------------------------------


def work(rank: int, world: int, folder: Path) -> dict[str, Any]:
    return {
        "measured": measured(rank, world),
        "measured in training": measured_in_training(rank, world),
        "changed": changed(rank, world),
        "other ranks": other_ranks(rank, world) if world > 1 else "",
        "moved": moved(rank, world),
        "looped": looped(rank, world, folder),
        "exchanged": exchanged(rank),
        "scored": scored(rank, world, folder),
        "answers": answers(),
        "refused": refused(rank, world) if world > 1 else {},
        "trainer": in_trainer(rank, world, folder / f"trainer-{world}"),
        "questioned": questioned(world, folder / f"questioned-{world}"),
    }


@contextmanager
def group(rank: int, world: int, port: int) -> Iterator[None]:
    """As accelerate's launcher has it: the Trainer finds the other processes by these names."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    yield
    dist.destroy_process_group()


def main(rank: int, folder: Path, ports: list[int]) -> None:
    torch.manual_seed(rank)
    if rank == 2:
        done = work(0, 1, folder)
    else:
        with group(rank, 2, ports[0]):
            done = work(rank, 2, folder)
    torch.save(done, folder / f"{rank}.pt")
    with group(rank, 3, ports[1]):
        torch.save(scored(rank, 3, folder), folder / f"three-{rank}.pt")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def forked(folder: Path) -> int:
    """Processes are forked, since importing everything three times would take the longest."""
    ports, children = free_ports(2), []
    for rank in (1, 2):
        child = os.fork()
        if child == 0:
            try:
                main(rank, folder, ports)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    try:
        main(0, folder, ports)
    except BaseException:
        for child in children:
            os.kill(child, signal.SIGKILL)
        raise
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(forked(Path(sys.argv[1])))
