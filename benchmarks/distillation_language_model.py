"""A language model in half its layers: distilled, and beside it the same student trained on the text alone.

    LIMBECK_DATA=... LIMBECK_MODELS=... python benchmarks/distillation_language_model.py --out DIR

Teacher: `gutenberg-llama` (8 layers). Both students start as its layers 0, 2, 4 and 7 and see the same windows in the
same order for the same steps. Measured: perplexity on Gutenberg validation, in windows of 256 tokens.
"""

from __future__ import annotations

from side_by_side import compare, joined, options, trained, written

from limbeck.distill.settings import DistillSettings, StudentSettings
from limbeck.models.checkpoint import load_checkpoint

TRAINING_TEXT = ("gutenberg/train.jsonl.gz", "us_presidential/train.jsonl.gz", "tinyshakespeare/train.jsonl.gz")
WINDOW = 256
SETTINGS = DistillSettings(
    student=StudentSettings(layers=[0, 2, 4, 7]),
    max_steps=240,
    batch_size=4,
    max_length=WINDOW,
    learning_rate=1e-3,
)
STUDENTS = {
    "distilled": {"logits-kl": {"weight": 1, "temperature": 1}},
    "text-alone": {"labels": 1},
}


def main() -> None:
    chosen = options(__doc__.splitlines()[0])
    teacher = load_checkpoint(chosen.models / "gutenberg-llama", "text-generation")
    text = teacher.read(written(joined(chosen.data, TRAINING_TEXT), chosen.out / "text.jsonl"))
    students = {
        name: trained(name, teacher, SETTINGS.model_copy(update={"objectives": objectives}), text, chosen.out)
        for name, objectives in STUDENTS.items()
    }
    for model in (teacher, *students.values()):
        model.tokenizer.model_max_length = WINDOW  # what the teacher was trained at; its positions go further
    compare(teacher, students, teacher.read(chosen.data / "gutenberg" / "validation.jsonl.gz"), chosen.out)


if __name__ == "__main__":
    main()
