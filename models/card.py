"""Model cards: `README.md` of a checkpoint, and what an artifact's card has in common with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .lineage import Curve, Lineage, Step
from .shapes import KEY as SHAPES_KEY
from .terms import CARD_FILE, Terms

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

_TEMPLATE = Path(__file__).parent / "checkpoint_card.md.j2"
_DONE = {"distill": "Distilled", "prune": "Pruned"}
_LONGEST_VALUE = 120
_BOOKKEEPING = ("throughput", "grad_norm", "learning_rate")
"""Curves that say how training went on that machine, and nothing of the model."""


def write_checkpoint_card(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the card of a checkpoint into its folder."""
    model = checkpoint.model
    # `checkpoint.parameters` would drop the unused pooler from a model that is only being saved.
    sizes = (part.numel() for name, part in model.named_parameters() if not name.startswith("pooler."))
    write_card(
        folder,
        _TEMPLATE,
        checkpoint.terms,
        {"library_name": "transformers", "pipeline_tag": checkpoint.task.name, "tags": tags(checkpoint.lineage)},
        {
            "title": title(checkpoint.lineage),
            "auto_class": checkpoint.task.auto_class,
            "plain": not hasattr(model.config, SHAPES_KEY),
            "sentences": checkpoint.task.name == "sentence-similarity",
            "parameters": sum(sizes),
            "max_length": checkpoint.max_length,
            "hash": checkpoint.hash,
            "lineage": checkpoint.lineage,
        },
    )


def write_card(folder: Path, template: Path, terms: Terms, header: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Fill a template in, and write it as the folder's card. The licence files must be there already.

    Args:
        header: of the YAML header what the terms do not say.
        facts: what the template asks for; beside them it gets `licence` and `history` of `facts["lineage"]`.
    """
    from huggingface_hub import ModelCard, ModelCardData
    from jinja2 import Environment, FileSystemLoader

    of_both: dict[str, Any] = {**terms.header, **header}
    data = ModelCardData(**of_both)
    known = {"licence": _licence(terms), "history": history(facts["lineage"])}
    # Not by `ModelCard.from_template`, in which a template cannot include another.
    page = Environment(loader=FileSystemLoader(template.parent)).get_template(template.name)
    ModelCard(page.render(card_data=data.to_yaml(), **{**facts, **known})).save(folder / CARD_FILE)


def title(lineage: Lineage) -> str:
    """What the model is, as a headline: `all-MiniLM-L6-v2, distilled and pruned`."""
    done = [_DONE[verb].lower() for verb in _DONE if any(step.verb == verb for step in lineage.steps)]
    return ", ".join([plain(lineage.origin), *([" and ".join(done)] if done else [])])


def tags(lineage: Lineage) -> list[str]:
    """What a hub may filter by."""
    verbs = {step.verb for step in lineage.steps}
    return ["limbeck", *(["distillation"] if "distill" in verbs else []), *(["pruning"] if "prune" in verbs else [])]


def plain(text: str) -> str:
    """Text from elsewhere on one line of Markdown, where it is neither a table's border nor code, HTML or a link."""
    line = " ".join(text.split()).replace("`", "'").replace("<", "&lt;")
    return re.sub(r"([|\[\]!])", r"\\\1", line)


def _licence(terms: Terms) -> str:
    """What is known of the licence, in a sentence or two."""
    stated = ", ".join(plain(name) for name in terms.licences)
    said = f"The model that this one was made from states its licence as **{stated}**." if stated else (
        "The model that this one was made from states no licence in its card."
    )  # fmt: skip
    files = ", ".join(f"[{plain(name)}]({plain(name)})" for name in terms.files)
    return f"{said} Its files are here: {files}." if files else said


def history(lineage: Lineage) -> str:
    """What was done to a model and why, as Markdown, oldest step first. Times are left out: what is made again in the
    same way has the same history."""
    if not lineage.steps:
        return f"limbeck has neither distilled nor pruned it: the weights are those of {plain(lineage.origin)}."
    return "\n\n".join(_section(number, step) for number, step in enumerate(lineage.steps, 1))


def _section(number: int, step: Step) -> str:
    headline = f"### {number}. {_DONE[step.verb]}: {plain(step.method)}"
    return "\n".join([headline, "", *(f"- {line}" for line in _told(step))])


def _told(step: Step) -> Iterator[str]:
    yield f"Why: {plain(step.rationale)}" if step.rationale else "Why: no reason was given."
    if step.note:
        yield f"Result: {plain(step.note)}"
    if step.widths:
        yield f"Kept: {_widths(step)}."
    if curves := [curve for curve in step.curves if curve.values and curve.name not in _BOOKKEEPING]:
        yield f"Measured while training, at the first step and at the last: {'; '.join(map(_ends, curves))}."
    if step.similarity is not None:
        before, after = (
            ", ".join(f"{max(row):.2f}" for row in matrix) for matrix in (step.similarity.before, step.similarity.after)
        )
        yield f"Likeness of each layer to its nearest of the teacher's (linear CKA): before {before}; after {after}."
    if step.data is not None:
        rows, mark = f"{step.data.rows:,} rows", step.data.fingerprint[:16]
        yield f"Data: {plain(step.data.source)}, {rows}, fingerprint `{plain(mark)}`."
    parents = {"started from": step.parent, "teacher": step.teacher}
    if said := [f"{what} `{plain(value[:16])}`" for what, value in parents.items() if value]:
        yield f"Models, by their hashes: {', '.join(said)}."
    if settings := ", ".join(f"`{plain(name)}={plain(value)}`" for name, value in _flat(step.settings)):
        yield f"Settings: {settings}."


def _widths(step: Step) -> str:
    """`768 of 1536 channels in encoder.layer.0, encoder.layer.1; ...`, layers of the same sizes together."""
    layers: dict[str, list[str]] = {}
    for width in step.widths:
        layers.setdefault(f"{width.after} of {width.before} {width.unit}", []).append(plain(width.layer))
    return "; ".join(f"{kept} in {', '.join(where)}" for kept, where in layers.items())


def _ends(curve: Curve) -> str:
    first, last = (f"{value:.4g}" for value in (curve.values[0], curve.values[-1]))
    return f"{plain(curve.name)} {first}, {last}{f' {plain(curve.unit)}' if curve.unit else ''}"


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Settings as names and values, nested ones with their path; paths of files cut down to the file's name."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        elif value is not None:
            bare = Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
            said = bare if isinstance(bare, str) else json.dumps(bare, default=str)
            yield f"{above}{name}", said if len(said) <= _LONGEST_VALUE else f"{said[:_LONGEST_VALUE]}…"
