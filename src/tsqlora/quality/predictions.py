"""What the calibrated model says of each sample with one answer: which, and how sure it is of it and of the label."""

import torch
from torch import Tensor

from tsqlora.compat.torch import upcast
from tsqlora.quality.terms import Measured
from tsqlora.tasks import Task, require_answers


def predictions(measured: Measured, task: Task) -> dict[str, Tensor]:
    """`predicted`; and for classes `predicted_probability` and `label_probability`, n numbers, and `logits`, n × k.

    Nothing of generated text.
    """
    if measured.logits is None:
        return {}
    logits = upcast(measured.logits)
    predicted = torch.as_tensor(require_answers(task, "a prediction").predictions(logits.cpu().numpy()))
    if logits.shape[1] == 1:
        return {"predicted": predicted}
    p = logits.softmax(1)
    return {
        "predicted": predicted,
        "predicted_probability": p.amax(1),
        "label_probability": p.gather(1, measured.labels[:, None]).squeeze(1),
        "logits": logits,
    }
