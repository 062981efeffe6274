"""Data and settings of a `transformers.Trainer` on a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import TrainingArguments

LEARNING_RATE = 1e-2

SGD: dict[str, Any] = {"optim": "sgd", "lr_scheduler_type": "constant"}


class Sequences(Dataset[dict[str, list[int]]]):
    """Sequences of six tokens."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = [3 + (7 * index + 5 * at) % 80 for at in range(6)]
        return {"input_ids": ids, "labels": [-100, *ids[1:]]}


def trainer_settings(folder: Path, **options: Any) -> TrainingArguments:
    """Steps of two microbatches of two sequences on the CPU, without clipping or output."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0,
        "learning_rate": LEARNING_RATE,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**settings | options)
