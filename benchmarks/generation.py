"""How fast programs write, beside eager torch with its cache, and whether they write what torch writes.

    LIMBECK_DATA=... LIMBECK_MODELS=... python benchmarks/generation.py --out DIR [--threads 1]

`gutenberg-llama` as ONNX (fp32) and OpenVINO (fp32, bf16, int8-weight-only), all with a cache in what they compute in.
First the greedy text after 20 prompts of Gutenberg validation, token by token against eager torch: an fp32 program has
to write the same. Then time to first token, time per output token and tokens a second, each subject in a process of its
own, rounds in turn. Both tables are kept as Markdown in DIR; artifacts that are there already are used again.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from side_by_side import joined

from limbeck.backends.writing import Writer, WritingSettings
from limbeck.environment import cpu_facts, installed_version
from limbeck.exporters.settings import ExportSettings
from limbeck.files import write_text
from limbeck.models.checkpoint import load_checkpoint
from limbeck.recipes.generating import LanguageProgram, prompt_tokens
from limbeck.recipes.steps import export
from limbeck.validate.performance.latency import BenchSettings, BenchSubject
from limbeck.validate.performance.token_times import GenerationResult, GenerationSettings, bench_generation
from limbeck.validate.records.performance import Noise, TokenTimes
from limbeck.validate.records.report import short_number, size_text

EAGER = "torch eager"


class Program(NamedTuple):
    """An artifact of the model; `exact` ones have to write what torch writes."""

    name: str
    backend: str
    precision: str
    exact: bool = False


PROGRAMS = (
    Program("onnx fp32", "onnx", "fp32", exact=True),
    Program("openvino fp32", "openvino", "fp32", exact=True),
    Program("openvino bf16", "openvino", "bf16"),
    Program("openvino int8-weight-only", "openvino", "int8-weight-only"),
)
PROMPTS, PROMPT_TOKENS = 20, 32
HEADINGS = ("batch × prompt", "program", "first token, ms (p99)", "× torch", "per token, ms (p99)", "× torch",
            "tokens a second", "cache")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LIMBECK_DATA", "../shared/data")))
    parser.add_argument("--models", type=Path, default=Path(os.environ.get("LIMBECK_MODELS", "../shared/models")))
    parser.add_argument("--out", type=Path, required=True, help="artifacts and tables")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-length", type=int, nargs="+", default=[32, 256], help="in tokens")
    parser.add_argument("--new-tokens", type=int, default=32, help="written after each prompt while timed")
    parser.add_argument("--text-tokens", type=int, default=64, help="of each text that is compared; 0: none is")
    parser.add_argument("--threads", type=int, help="of each runtime; every CPU where not given")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model = options.models / "gutenberg-llama"
    folders = {program: _exported(program, model, options.out) for program in PROGRAMS}
    if options.text_tokens:
        _keep(_texts(model, folders, options), options.out / "text.md")
    _keep(_times(model, folders, options), options.out / "times.md")


def _exported(program: Program, model: Path, out: Path) -> Path:
    folder = out / program.name.replace(" ", "-")
    if not folder.exists():
        settings = ExportSettings.model_validate({"backend": program.backend, "precision": program.precision})
        export(load_checkpoint(model), settings, folder, beside_float=False)
    return folder


def _keep(lines: Iterator[str], path: Path) -> None:
    """Print a table as it comes, and keep it."""
    said: list[str] = []
    for line in lines:
        print(line, flush=True)
        said.append(line)
    write_text(path, "\n".join(said) + "\n")


# What is written


def _texts(model: Path, folders: dict[Program, Path], options: argparse.Namespace) -> Iterator[str]:
    eager = LanguageProgram.open(str(model), options.threads)
    prompts = _prompts(options.data, eager)
    expected = _written(eager.writer(), prompts, options.text_tokens)
    asked = f"{options.text_tokens} tokens after {PROMPTS} prompts of {PROMPT_TOKENS}"
    yield from (f"Greedy text, {asked} (Gutenberg validation):", "")
    yield from ("| program | texts that are torch's | tokens before the first that differs |", "|---|---:|---:|")
    parted: list[str] = []
    for program, folder in folders.items():
        opened = LanguageProgram.open(str(folder), options.threads)
        with closing(opened.runner):
            found = _written(opened.writer(), prompts, options.text_tokens)
        same = sum(ours == theirs for ours, theirs in zip(found, expected, strict=True))
        alike = sum(_agreed(*pair) for pair in zip(found, expected, strict=True))
        yield f"| {program.name} | {same} of {PROMPTS} | {alike:,} of {sum(map(len, expected)):,} |"
        parted += [program.name] if program.exact and same < PROMPTS else []
    if parted:
        yield from ("", f"**Not what torch writes: {', '.join(parted)}.**")


def _prompts(data: Path, program: LanguageProgram) -> list[list[int]]:
    """Evenly spaced windows of the text."""
    text = "\n".join(joined(data / "gutenberg", ["validation.jsonl.gz"]))
    ids = prompt_tokens(text, program.tokenizer)
    step = len(ids) // PROMPTS
    return [ids[start : start + PROMPT_TOKENS] for start in range(0, step * PROMPTS, step)]


def _written(writer: Writer, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Each prompt alone, as a reader of one text would have it."""
    settings = WritingSettings(max_new_tokens=tokens)
    return [[step[0] for step in writer.write([prompt], settings) if step[0] is not None] for prompt in prompts]


def _agreed(ours: list[int], theirs: list[int]) -> int:
    """Tokens before the first that differs."""
    parting = (place for place, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1])
    return next(parting, min(len(ours), len(theirs)))


# How fast


def _times(model: Path, folders: dict[Program, Path], options: argparse.Namespace) -> Iterator[str]:
    subjects = [BenchSubject(name=EAGER, path=model, kind="checkpoint")]
    subjects += [BenchSubject(name=program.name, path=folder, kind="artifact") for program, folder in folders.items()]
    asked = GenerationSettings(
        batch_size=tuple(options.batch_size), prompt_length=tuple(options.prompt_length), new_tokens=options.new_tokens
    )
    settings = BenchSettings(threads=options.threads, rounds=options.rounds, measure_noise=True)
    results = bench_generation(subjects, asked, settings, lambda words: print(f"  {words}", flush=True))
    yield from _where(settings, options)
    yield f"| {' | '.join(HEADINGS)} |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|"
    for place in range(len(asked.shapes)):
        yield from (_row(result, results[0], place) for result in results)
    if results[0].noise is not None:
        yield from ("", _noise(results[0].noise))


def _where(settings: BenchSettings, options: argparse.Namespace) -> Iterator[str]:
    versions = ", ".join(f"{package} {installed_version(package)}" for package in ("torch", "onnxruntime", "openvino"))
    yield f"gutenberg-llama, {options.new_tokens} tokens after every prompt; {cpu_facts()['name']}, "
    yield f"{settings.threads_used} threads, {options.rounds} rounds in turn; {versions}."
    yield ""


def _row(result: GenerationResult, eager: GenerationResult, place: int) -> str:
    found = result.generations(None if result is eager else eager)[place]
    cells = (f"{found.batch_size} × {found.prompt_tokens}", result.subject.name, *_cells(found.ttft),
             *_cells(found.tpot), short_number(found.tokens_per_second, 3), size_text(found.cache_bytes))  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _cells(times: TokenTimes) -> tuple[str, str]:
    ratio = "" if times.speedup is None else short_number(times.speedup, 3)
    if times.speedup_low is not None and times.speedup_high is not None:
        ratio += f" ({short_number(times.speedup_low, 3)} to {short_number(times.speedup_high, 3)})"
    return f"{short_number(times.p50_ms, 3)} ({short_number(times.p99_ms, 3)})", ratio


def _noise(noise: Noise) -> str:
    return (
        f"Noise: {noise.subject} per token against itself, a ratio of {short_number(noise.ratio, 3)}, a factor of "
        f"{short_number(noise.reach, 3)} at most."
    )


if __name__ == "__main__":
    main()
