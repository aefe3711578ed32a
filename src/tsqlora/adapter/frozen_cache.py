"""Cache what enters the first trainable block, so that later epochs skip the frozen blocks below it."""

import hashlib
import shutil
import tempfile
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from tsqlora.compat.torch import has_hooks
from tsqlora.compat.transformers import CLASSES_OF, transformer_blocks
from tsqlora.tasks.forward import base_model

ENCODERS = ("bert", "distilbert", "electra", "mpnet", "roberta")
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
"""Model types whose blocks pass on hidden states alone, and whose tokens do not read padding; a test runs each."""
READ = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
NOT_READ = ("labels", "num_items_in_batch", "return_dict", "use_cache", "logits_to_keep")
"""Arguments of a model that frozen blocks do not read."""
GIB = 1 << 30


@contextmanager
def frozen_cache(model: nn.Module, *, gb: float) -> Generator["FrozenCache"]:
    """Skip the frozen blocks of training batches whose rows are all cached: put `trainer.train()` into this `with`.

    A temporary file of up to `gb` GiB (0 is off) holds what enters the first trainable block, per row of tokens and in
    the precision of training: nothing changes but rounding by padding. Forward passes in evaluation mode before the
    first step fill it too, such as the look's. Where the frozen output varies (dropout), or model or batches are of a
    kind that was not tested, training goes on without the cache, after a warning that says why.
    """
    cache = FrozenCache(model)
    with ExitStack() as held:
        if gb > 0 and (problem := cache.find_blocks()):
            cache.stop(problem)
        elif gb > 0:
            room = max(1, min(int(gb * GIB), shutil.disk_usage(tempfile.gettempdir()).free))
            cache.store = np.memmap(held.enter_context(tempfile.TemporaryFile()), np.uint8, "w+", shape=room)
            held.callback(vars(cache).pop, "store")  # with it goes the file
            for inner in cache.models:
                held.callback(inner.register_forward_pre_hook(cache.enter, with_kwargs=True).remove)
                held.callback(inner.register_forward_hook(cache.leave, always_call=True).remove)
            held.callback(cache.first.register_forward_pre_hook(cache.enter_first, with_kwargs=True).remove)
        yield cache
    if gb > 0 and not cache.skipped and not cache.notes:
        cache.stop("no batch came whose rows were all cached; it helps from the second epoch of the same rows on")


class FrozenCache:
    """What enters the first trainable block, per row."""

    store: np.memmap
    first: nn.Module  # the first trainable block
    frozen: Sequence[nn.Module]  # those below it

    def __init__(self, model: nn.Module) -> None:
        # Inner ones, since accelerate's autocast begins in the outer one's forward; PEFT calls one, the other or both.
        self.base: Any = base_model(model)
        self.models = [self.base, model.base_model] if isinstance(model, PeftModel) else []
        self.config: Any = getattr(self.base, "config", None)
        self.kind, self.rotary = (getattr(self.config, name, None) for name in ("model_type", "rope_parameters"))
        self.notes: list[str] = []  # why it is off, or full
        self.skipped = self.used = 0  # batches; bytes
        self._places: dict[bytes, tuple[int, torch.dtype]] = {}  # where each row begins in the store
        self._batch: tuple[list[bytes], Tensor] | None = None  # keys, and which places hold tokens (n × t)
        self._states: Tensor | None = None  # of the batch; None while blocks are computed
        self._trains = self._off = self._full = self._in_tuple = False
        self._restore = ExitStack()

    def __deepcopy__(self, memo: Any) -> "FrozenCache":
        return self  # a copied model has these hooks: `enter` sees that it is another

    def find_blocks(self) -> str | None:
        """Find the first trainable block, and what is frozen below; the reason if the cache cannot be used."""
        trained = [name for name, p in self.base.named_parameters() if p.requires_grad]
        modules, blocks = dict(self.base.named_modules()), transformer_blocks(self.base, trained)
        base, tested = type(self.base), ENCODERS + DECODERS
        stock = self.models and base.__module__.startswith("transformers.models.") and self.kind in tested
        if not stock or base.__name__ in CLASSES_OF["question-answering"].values():  # its loss reads padding
            return f"it was not tested with {base.__name__}, but with LoRA in {', '.join(tested)}"
        if self.config.output_hidden_states or self.config.output_attentions:
            return "the model's config asks for the output of every block"
        if "dynamic" in str(self.rotary) or "longrope" in str(self.rotary):
            return "the model's rotary angles depend on the longest row of a batch"
        # Of the blocks the first that trains; `below` is what is registered before it.
        at = next((k for k, block in enumerate(blocks) if any(name.startswith(f"{block}.") for name in trained)), 0)
        below = {name: modules[name] for name in [*modules][: [*modules].index(blocks[at])]} if at else {}
        if not below or any(p.requires_grad for module in below.values() for p in module.parameters(recurse=False)):
            return "the lowest block or the embeddings train; set ranks.depth (depth in tsqlora.wrap)"
        if any(_dropout(module) for module in below.values()):
            rates = [k for k, v in self.config.to_dict().items() if "drop" in k and isinstance(v, float) and v > 0]
            return f"frozen blocks have dropout: their output varies; set {', '.join(rates)} to 0 in the model's config"
        self.first, self.frozen = modules[blocks[at]], [modules[name] for name in blocks[:at]]
        self._skipped_modules = [m for name, m in below.items() if name and not blocks[at].startswith(f"{name}.")]
        self._weights = [p for module in below.values() for p in module.parameters(recurse=False)]
        return None

    def stop(self, why: str) -> None:
        """Compute all blocks from now on."""
        self._off = True
        self._note(f"ranks.cache_gb has no effect: {why}")

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the model's forward pass: skip the frozen blocks if all rows are cached."""
        idle = self._off or self._batch is not None or (self._trains and not model.training)
        if idle or model not in self.models or torch.compiler.is_compiling():
            return
        if problem := self._problem(model, args, kwargs):
            if model.training:
                self.stop(problem)
            return
        self._trains = model.training
        keys, tokens = self._batch = self._rows(kwargs)
        if model.training and all(key in self._places for key in keys):
            self.skipped += 1
            self._states = self._read(keys, tokens)
            for block in self.frozen:
                self._restore.enter_context(patch.object(block, "forward", self._pass_on))
        else:
            self._restore.callback(self.frozen[-1].register_forward_hook(self._note_kind).remove)

    def enter_first(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the first trainable block: cache what enters it, or give it what is cached."""
        if self._batch is None:
            return None
        hidden = _hidden(args, kwargs)
        if self._states is not None:
            states = self._states.to(hidden.device)
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})
        return None if self._full else self._write(*self._batch, hidden.detach().cpu())

    def leave(self, *_: Any) -> None:
        """After the model's forward pass, also one that failed."""
        self._batch = self._states = None
        self._restore.close()

    def _pass_on(self, *args: Any, **kwargs: Any) -> Any:
        return (_hidden(args, kwargs),) if self._in_tuple else _hidden(args, kwargs)

    def _note_kind(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._in_tuple = isinstance(output, tuple)

    def _problem(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """What makes the frozen blocks' output vary, or reads more of it than the states of tokens."""
        further = {name: value for name, value in kwargs.items() if name not in READ + NOT_READ}
        other = [name for name, value in further.items() if value is not None and value is not False]
        ids, mask, labels = (kwargs.get(name) for name in ("input_ids", "attention_mask", "labels"))
        if args or other or ids is None or ids.dim() != 2 or (mask is not None and mask.shape != ids.shape):
            return f"it reads batches of {', '.join(READ)}, and these have {', '.join(other) or 'another shape'}"
        read = torch.zeros_like(ids, dtype=torch.bool)
        read[:, 0] = self.kind in ENCODERS  # by the head
        if labels is not None and labels.shape == ids.shape and not labels.is_floating_point():
            read |= labels != -100
            read[:, :-1] |= labels[:, 1:] != -100  # of the next token
        if mask is not None and bool((read & (mask == 0)).any()):
            return "padding is read by the head or the loss; pad rows on the right, and their labels with -100"
        if getattr(self.first, "gradient_checkpointing", False):
            return "gradient checkpointing computes blocks twice; turn it off"
        if any(has_hooks(module) for module in self._skipped_modules):
            return "embeddings or frozen blocks have hooks, as NEFTune's noise is one"
        versions = [(weight.data_ptr(), weight._version) for weight in self._weights]
        if self._places and versions != self._versions:
            return "frozen weights changed or moved"
        self._versions = versions
        return None

    def _rows(self, inputs: Mapping[str, Any]) -> tuple[list[bytes], Tensor]:
        """A row's key hashes its own tokens, their places, and the precision."""
        passed = {name: inputs[name].cpu() for name in READ if inputs.get(name) is not None}
        ids, device = passed["input_ids"], inputs["input_ids"].device.type
        tokens = passed.get("attention_mask", torch.ones_like(ids)) != 0
        columns = {"position_ids": torch.arange(ids.shape[1])[None], **passed}
        names = [name for name in READ if name in columns and name != "attention_mask"]
        stacked = torch.stack([columns[name].expand_as(ids).long() for name in names], 1)
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        # Positions mark packed rows only where there is no mask.
        own_positions = "position_ids" in passed and (self.rotary is None or "attention_mask" not in passed)
        about = repr((precision, names, [*passed] if own_positions else None)).encode()
        keys = []
        for row, own in zip(stacked, tokens, strict=True):
            values = row[:, own]
            if self.rotary is not None:  # attention sees differences of places only
                values[1] -= values[1, :1].clone()
            keys.append(hashlib.blake2b(about + values.numpy().tobytes(), digest_size=16).digest())
        return keys, tokens

    def _write(self, keys: Sequence[bytes], tokens: Tensor, hidden: Tensor) -> None:
        for key, row, own in zip(keys, hidden, tokens, strict=True):
            if key in self._places:
                continue
            states = row[own].view(torch.uint8).flatten().numpy()
            if self.used + len(states) > len(self.store):
                self._full = True
                rows, size = f"{len(self._places):,} rows", f"{self.used / GIB:.3g} GiB"
                return self._note(f"ranks.cache_gb: {rows} fill {size}; make room for all, also on the disk of TMPDIR")
            self.store[self.used : self.used + len(states)] = states
            self._places[key] = self.used, hidden.dtype
            self.used += len(states)

    def _read(self, keys: Sequence[bytes], tokens: Tensor) -> Tensor:
        dtype = self._places[keys[0]][1]
        states = torch.zeros(*tokens.shape, self.config.hidden_size, dtype=dtype)
        for key, row, own in zip(keys, states, tokens, strict=True):
            start, size = self._places[key][0], int(own.sum()) * row.shape[1] * dtype.itemsize
            row[own] = torch.from_numpy(self.store[start : start + size]).view(dtype).view(-1, row.shape[1])
        return states

    def _note(self, what: str) -> None:
        self.notes.append(what)
        warnings.warn(what, stacklevel=2)


def _hidden(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _dropout(module: nn.Module) -> bool:
    own = [rate for name, rate in vars(module).items() if "drop" in name and isinstance(rate, float)]
    return max([module.p] if isinstance(module, nn.Dropout) else own, default=0) > 0
