"""What vLLM and SGLang make of each kind of adapter, by their own loading code, beside what the doctor says.

    pip download --no-deps --dest WHEELS vllm==0.33.0        (and the other versions, SGLang)
    python tests/kinds.py ADAPTERS                           (an adapter of each kind, on a tiny Llama)
    python bench/servers.py WHEELS ADAPTERS [--out FILE]

The servers do not install without a GPU, but the files of theirs that read an adapter need little of the rest. They are
taken out of each wheel in WHEELS and run as they are; what they import beside torch and huggingface_hub (loggers,
configs, models) is an empty stand-in. Of vLLM that is PEFTHelper, LoRAModel.from_local_checkpoint and optimize(), which
give the B that is multiplied with A. Of SGLang it is LoRAConfig and LoRAAdapter; the memory pool's rules (every module
in a buffer, every A of as many rows as the config's r, as many tokens as the base) are restated in `sglang_pool`.
"""

import ast
import importlib
import json
import math
import re
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Union

import torch
import transformers
from origin import parser_of, write
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig

from tsqlora.adapter.files import CONFIG, WEIGHTS, read_adapter
from tsqlora.adapter.servers import TOWER
from tsqlora.errors import DataError

CLASSIFIER = "ForSequenceClassification"
Applied = dict[str, Tensor]
"""By layer, what a server adds to W; an empty tensor for a module that it takes whole."""
LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"}
"""The layers of a Llama that take LoRA, in vLLM and in SGLang (where a request names all)."""


class StandIn(types.ModuleType):
    """A module, and a package, of which every name is something that does nothing."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda *_, **__: None, "__getattr__": lambda *_: lambda *_, **__: None})


class StandIns:
    """Imports of a package as stand-ins, but for the files of a folder that are meant to run."""

    def __init__(self, package: str, folder: Path, real: set[str]) -> None:
        self.package, self.folder, self.real = package, folder, real

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] != self.package:
            return None
        if name in self.real:
            file = self.folder.joinpath(*name.split(".")).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> Any:
        return StandIn(spec.name)

    def exec_module(self, module: Any) -> None:
        vars(module).update(ARGUMENTS.get(module.__name__, {}))
        if module.__name__ in TAKEN:
            file, names = TAKEN[module.__name__]
            _take(module, self.folder / file, names)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "vllm.logger": {"init_logger": lambda _: types.SimpleNamespace(info_once=lambda *_: None)},
    "vllm.utils.torch_utils": {"PIN_MEMORY": False},
}
TAKEN = {
    "vllm.lora.utils": (
        "vllm/lora/utils.py",
        ("parse_fine_tuned_lora_name", "is_base_embedding_weights", "get_lora_id", "_GLOBAL_LORA_ID"),
    ),
    "sglang.srt.lora.utils": ("sglang/srt/lora/utils.py", ("get_normalized_target_modules", "get_target_module_name")),
    "sglang.srt.layers.utils": ("sglang/srt/layers/utils/common.py", ("get_layer_id",)),
}
"""Functions that read names, out of files whose rest needs the whole server: which file, and which names in it."""


def _take(module: Any, file: Path, names: tuple[str, ...]) -> None:
    """Runs the definitions of some names in a file, and no other line of it."""
    tree = ast.parse(file.read_text())
    tree.body = [
        node
        for node in tree.body
        if (isinstance(node, ast.FunctionDef) and node.name in names)
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in names)
    ]
    vars(module).update(re=re, Union=Union, Iterable=Iterable, Set=set)
    exec(compile(tree, str(file), "exec"), vars(module))


@contextmanager
def code_of(wheel: Path, package: str, real: set[str]) -> Iterator[None]:
    """Within, `package` is importable: the named modules as the wheel has them, all others as stand-ins."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as files:
        members = [name for name in files.namelist() if re.match(rf"{package}/.*(lora|layers/utils)/.*\.py$", name)]
        files.extractall(folder, members)
        finder = StandIns(package, Path(folder), real)
        sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
        try:
            yield
        finally:
            sys.meta_path.remove(finder)  # type: ignore[arg-type]
            for name in [name for name in sys.modules if name.partition(".")[0] == package]:
                del sys.modules[name]


def base_of(adapter: Path) -> LlamaConfig:
    """The config that the adapter names, where there is one: the tiny Llama's with other settings."""
    named = json.loads((adapter / CONFIG).read_text())["base_model_name_or_path"] or ""
    return LlamaConfig.from_pretrained(named if Path(named).is_dir() and named else adapter.parent / "base")


def vllm(folder: Path) -> Applied:
    """vLLM's worker_manager._load_adapter, with the largest --max-lora-rank."""
    helper_of = importlib.import_module("vllm.lora.peft_helper").PEFTHelper
    model_of = importlib.import_module("vllm.lora.lora_model").LoRAModel
    helper = helper_of.from_local_dir(str(folder), None)
    helper.validate_legal(types.SimpleNamespace(max_lora_rank=512))
    model = model_of.from_local_checkpoint(
        str(folder),
        LLAMA | {"experts"},
        helper,
        device="cpu",
        dtype=torch.float32,
        model_vocab_size=base_of(folder).vocab_size,
    )
    # model_manager.py wraps the modules of the language model alone, without --enable-tower-connector-lora.
    layers = {name: lora.optimize() for name, lora in model.loras.items() if not TOWER.search(name)}
    heads = dict.fromkeys(getattr(model, "modules_to_save", ()), torch.empty(0))
    return heads | {name: lora.lora_b @ lora.lora_a for name, lora in layers.items()}


def sglang(folder: Path) -> Applied:
    """SGLang's lora_manager._load_lora_adapter and what its memory pool then takes."""
    base = base_of(folder)
    config = importlib.import_module("sglang.srt.lora.lora_config").LoRAConfig(
        str(folder), base_vocab_size=base.vocab_size
    )
    if config.use_dora:  # lora_manager.validate_new_adapter
        raise ValueError("LoRA serving currently doesn't support DoRA adapters")
    of = importlib.import_module("sglang.srt.lora.lora").LoRAAdapter
    adapter = of("uid", config, base, None, None)
    adapter.initialize_weights_from_tensors(load_file(folder / WEIGHTS))
    result = {name: weight for layer in adapter.layers for name, weight in layer.weights.items()}
    return sglang_pool(result | adapter.embedding_layers, config.r, adapter.scaling, base)


def sglang_pool(weights: Mapping[str, Tensor], rank: int, scaling: float, base: LlamaConfig) -> Applied:
    """As sglang/srt/lora/mem_pool.py's load_lora_weight_to_buffer does, at 0.5.23.

    Layers that share an input are stacked, qkv_proj thrice and gate_up_proj twice; a weight that is in no buffer, or
    that does not fill `rank` rows of it, is an error.
    """
    buffer_of = importlib.import_module("sglang.srt.lora.utils").get_target_module_name
    stacked = {"qkv_proj": 3, "gate_up_proj": 2, "o_proj": 1, "down_proj": 1, "embed_tokens": 1, "lm_head": 1}
    size = base.hidden_size // base.num_attention_heads
    rows = {
        "qkv_proj": [size * base.num_attention_heads, *([size * base.num_key_value_heads] * 2)],
        "gate_up_proj": [base.intermediate_size] * 2,
    }
    parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    applied: Applied = {}
    for name, a in weights.items():
        buffer = buffer_of(name, set(stacked))
        if "lora_A" not in name and "lora_embedding_A" not in name:
            continue
        if a.shape[0] != stacked[buffer] * rank:
            raise AssertionError(f"LoRA buffer of rank {rank} does not match weight shape {tuple(a.shape)} of {name}")
        b = weights[name.replace("_A", "_B")]
        if buffer == "embed_tokens" and a.shape[1] != base.vocab_size:
            raise AssertionError(f"LoRA buffer of {base.vocab_size} tokens does not match {tuple(a.shape)} of {name}")
        module = re.sub(r"\.lora_(A\.weight|embedding_A)$", "", name).removeprefix("base_model.model.")
        outputs = rows.get(buffer, [b.shape[0]])
        for part, mine, theirs in zip(parts.get(buffer, (buffer,)), a.split(rank), b.split(outputs), strict=True):
            applied[module.replace(buffer, part)] = scaling * theirs @ mine
    return applied


SERVERS: dict[str, tuple[Callable[[Path], Applied], set[str]]] = {
    "vllm": (vllm, {"vllm.lora.peft_helper", "vllm.lora.lora_weights", "vllm.lora.lora_model"}),
    "sglang": (sglang, {"sglang.srt.lora.lora_config", "sglang.srt.lora.lora"}),
}


def judged(load: Callable[[Path], Applied], folder: Path) -> dict[str, Any]:
    """Refused and why, or by what factor each layer's update is applied; nothing else is listed than what is not 1."""
    try:
        applied = load(folder)
    except Exception as error:
        return {"verdict": "refused", "why": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
    try:
        adapter = read_adapter(folder)
    except DataError:
        return {"verdict": "wrong", "why": "loads what PEFT does not"}
    factors, beyond = {}, [*(head for head in adapter.heads() if head not in applied), *adapter.variants()]
    for name, target in adapter.targets.items():
        mine = torch.from_numpy(target.delta())
        if target.rank == 0 or not torch.isfinite(mine).all() or not mine.any():
            continue
        theirs = applied.get(name, torch.zeros_like(mine)).double()
        factor = float((mine * theirs).sum() / mine.square().sum())
        assert float((theirs - factor * mine).abs().max()) < 1e-5 * float(mine.abs().max()), f"{name}: no multiple"
        if not math.isclose(factor, 1, rel_tol=1e-5):
            factors[name] = round(factor, 6)
    return {"verdict": "wrong" if factors or beyond else "right", "factors": factors, "not_read": beyond}


KINDS_OF_TEXT = ("ForCausalLM", "LMHeadModel", CLASSIFIER, "ForTokenClassification", "ForMaskedLM", "Model")


def bases_without_lora(wheel: Path) -> list[str]:
    """transformers' text models that this vLLM has, but without SupportsLoRA, which enabling LoRA refuses.

    A causal model that is loaded as a classifier of texts (adapters.py, as_seq_cls_model) has what it had.
    """
    parents, registered = dict[str, set[str]](), dict[str, str]()
    with zipfile.ZipFile(wheel) as files:
        for name in (name for name in files.namelist() if re.match(r"vllm/(model_executor/)?models/.*\.py$", name)):
            for node in ast.walk(ast.parse(files.read(name))):
                if isinstance(node, ast.ClassDef):
                    # Before the brackets of a generic, behind the dots of a module.
                    named = {re.sub(r"\[.*|.*\.", "", ast.unparse(base)) for base in node.bases}
                    # Two files may each have a class of this name; the registry names the file.
                    for key in (node.name, f"{Path(name).stem}.{node.name}"):
                        parents.setdefault(key, set()).update(named)
        for pair in ast.walk(ast.parse(files.read("vllm/model_executor/models/registry.py"))):
            if isinstance(pair, ast.Dict):
                registered |= {
                    key.value: ".".join(ast.literal_eval(value))
                    for key, value in zip(pair.keys, pair.values, strict=True)
                    if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple) and len(value.elts) == 2
                    if all(isinstance(part, ast.Constant) for part in value.elts)
                }

    def takes(name: str, seen: frozenset[str] = frozenset()) -> bool:
        above = parents.get(name) or parents.get(name.rpartition(".")[2], set())
        return name == "SupportsLoRA" or any(takes(parent, seen | {name}) for parent in above - seen - {name})

    for name in [name for name in dir(transformers) if name.endswith(CLASSIFIER) and name not in registered]:
        for causal in ("ForCausalLM", "LMHeadModel"):
            if its := registered.get(name.removesuffix(CLASSIFIER) + causal):
                registered[name] = its
    texts = [name for name in registered if hasattr(transformers, name) and name.endswith(KINDS_OF_TEXT)]
    assert all(registered[name].rpartition(".")[2] in parents for name in texts)
    return sorted(name for name in texts if not takes(registered[name]))


def layers_with_lora(wheel: Path) -> list[str]:
    """Last names of layers in adapters for which this SGLang, or one of its models, knows the sizes of a buffer.

    `get_hidden_dim` compares the name with those that it knows, and raises for others while the server starts.
    """
    sized, renamed = set[str](), dict[str, str]()
    with zipfile.ZipFile(wheel) as files:
        for name in (name for name in files.namelist() if re.match(r"sglang/srt/(models/.*|lora/utils)\.py$", name)):
            for part in (node for node in ast.walk(ast.parse(files.read(name))) if isinstance(node, ast.FunctionDef)):
                if part.name in ("get_hidden_dim", "get_default_hidden_dim"):
                    tests = (node for node in ast.walk(part) if isinstance(node, ast.Compare))
                    of_name = [node for node in tests if ast.unparse(node.left) == "module_name"]
                    words = (
                        word.value for node in of_name for word in ast.walk(node) if isinstance(word, ast.Constant)
                    )
                    sized |= {word for word in words if isinstance(word, str)}
                    if any("DSA_INDEXER_LORA_NAMES" in ast.unparse(node) for node in of_name):
                        sized |= {"indexer.wq_b", "indexer.wk", "indexer.weights_proj"}
                if part.name == "get_normalized_target_modules":
                    (table,) = (node for node in ast.walk(part) if isinstance(node, ast.Dict))
                    renamed = ast.literal_eval(table)
    outside = {"embed_tokens", "lm_head"}
    named = {name for name in sized if "." not in name and not name.endswith("_moe")}
    named |= {name for name, its in renamed.items() if its in sized - outside}
    return sorted(named - outside - {"fused_qkv_a_proj_with_mqa"})  # this one is made of two layers


def main() -> None:
    parser = parser_of(__doc__, "servers")
    parser.add_argument("wheels", type=Path)
    parser.add_argument("adapters", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {}
    bases = {f"vllm {wheel.name.split('-')[1]}": bases_without_lora(wheel) for wheel in args.wheels.glob("vllm-*.whl")}
    for wheel in sorted(args.wheels.glob("*.whl")):
        package, version, *_ = wheel.name.split("-")
        load, real = SERVERS[package]
        with code_of(wheel, package, real):
            kinds = {file.parent.name: judged(load, file.parent) for file in sorted(args.adapters.glob(f"*/{CONFIG}"))}
        result[f"{package} {version}"] = kinds
        print(package, version, json.dumps({kind: seen["verdict"] for kind, seen in kinds.items()}))
    layers = {
        f"sglang {wheel.name.split('-')[1]}": layers_with_lora(wheel) for wheel in args.wheels.glob("sglang-*.whl")
    }
    write(args.out, {"servers": result, "bases": bases, "layers": layers})


if __name__ == "__main__":
    main()
