"""A sentiment classifier in half its layers: distilled, and beside it the same student trained on the labels alone.

    LIMBECK_DATA=... LIMBECK_MODELS=... python benchmarks/distillation_sentiment.py --out DIR

Teacher: `sst2-minilm` (6 layers). Both students start as its layers 0, 2 and 5 and learn at the same rate: one for
three epochs from labels, the other from its teacher on those texts and on unlabelled sentences. Measured on SST-2
validation.
"""

from __future__ import annotations

from pathlib import Path

from side_by_side import compare, joined, options, trained, written

from limbeck.distill.settings import DistillSettings, StudentSettings
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.data import Data

STUDENT = StudentSettings(layers=[0, 2, 5])
STEPS = DistillSettings(student=STUDENT, max_steps=900, batch_size=32, max_length=64, learning_rate=3e-4)
DISTILLED = STEPS.model_copy(
    update={"objectives": {"logits-kl": {"weight": 1, "temperature": 2}, "hidden-states": {"layers": {-1: -1}}}}
)
LABELS = STEPS.model_copy(update={"objectives": {"labels": 1}, "max_steps": 650})  # 3 epochs
UNLABELLED = ("imdb_cad/train.jsonl.gz", "movie_reviews_long/train.jsonl.gz")


def main() -> None:
    chosen = options(__doc__.splitlines()[0])
    teacher = load_checkpoint(chosen.models / "sst2-minilm")
    labelled = teacher.read(chosen.data / "sst2" / "train.jsonl.gz")
    students = {
        "distilled": trained("distilled", teacher, DISTILLED, more_text(teacher, chosen.data, chosen.out), chosen.out),
        "labels alone": trained("labels-alone", teacher, LABELS, labelled, chosen.out),
    }
    compare(teacher, students, teacher.read(chosen.data / "sst2" / "validation.jsonl.gz"), chosen.out)


def more_text(teacher: Checkpoint, data: Path, out: Path) -> Data:
    """The labelled sentences without their labels, and sentences of other reviews."""
    texts = joined(data, ["sst2/train.jsonl.gz"])
    for review in joined(data, UNLABELLED):
        texts += [line.strip() for line in review.replace(" . ", " .\n").splitlines() if 20 < len(line.strip()) < 300]
    return teacher.read(written(texts, out / "unlabelled.jsonl"))


if __name__ == "__main__":
    main()
