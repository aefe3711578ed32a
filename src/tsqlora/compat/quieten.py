"""What libraries say of themselves while they are imported and used, which is no user's business."""

import logging
import os
import warnings


def quieten() -> None:
    """Before they are imported: warnings of theirs are dropped, logging begins with errors, no progress bars."""
    # They read these when they are imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # PEFT imports what is installed, and some of that speaks of the hardware when it is imported.
    for library in ("peft", "torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="(transformers|peft|accelerate|datasets)")
