"""Silence messages of libraries that do not concern users."""

import logging
import os
import warnings


def quieten() -> None:
    """Drop libraries' warnings, log messages below errors, and progress bars; call it before importing them."""
    # Libraries read these at import.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # PEFT imports optional packages, some of which log about the hardware.
    for library in ("peft", "torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="(transformers|peft|accelerate|datasets)")
