"""Programs that keep what they have read write what their model writes: greedy text against transformers' own
`generate`, prompts of unequal length in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from limbeck import export, load_checkpoint
from limbeck.backends.registry import load_runner
from limbeck.backends.torch_eager import EagerRunner
from limbeck.backends.writing import Writer, WritingSettings
from limbeck.errors import InputError, UsageError
from limbeck.exporters.artifact import read_manifest
from limbeck.exporters.settings import ExportSettings, ShapeRange
from limbeck.models.checkpoint import Checkpoint, hash_of_model
from limbeck.models.surgery import HeadSelection, Selection, select

TinyCheckpoint = Callable[..., Path]
PROMPTS = ("The kettle whistled", "Rain", "Nobody liked the soup, but everybody finished")
TOKENS = 12
GREEDY = WritingSettings(max_new_tokens=TOKENS)
THOROUGH = pytest.mark.thorough


def loaded(family: str, tiny_checkpoint: TinyCheckpoint) -> Checkpoint:
    return load_checkpoint(tiny_checkpoint(family, task="text-generation"))


def prompts_of(checkpoint: Checkpoint, texts: Sequence[str] = PROMPTS) -> list[list[int]]:
    return [list(checkpoint.tokenizer(text)["input_ids"]) for text in texts]


def generated(checkpoint: Checkpoint, prompt: list[int]) -> list[int]:
    """Alone, so that nothing is padded."""
    ids = torch.tensor([prompt])
    config = GenerationConfig(
        max_new_tokens=TOKENS, do_sample=False, eos_token_id=checkpoint.tokenizer.eos_token_id, pad_token_id=0
    )
    with torch.inference_mode():
        found = checkpoint.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return list(found[0, len(prompt) :].tolist())


def written(writer: Writer, prompts: list[list[int]], settings: WritingSettings = GREEDY) -> list[list[int]]:
    steps = list(writer.write(prompts, settings))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


def writer_of(folder: Path, checkpoint: Checkpoint) -> Writer:
    runner, manifest = load_runner(folder, threads=1)
    return Writer(runner.decoder(), checkpoint.tokenizer, manifest.max_length)


@pytest.fixture(scope="module")
def artifacts(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, backend: str) -> Path:
        if (family, backend) not in made:
            made[family, backend] = tmp_path_factory.mktemp(family) / backend
            export(loaded(family, tiny_checkpoint), ExportSettings(backend=backend), made[family, backend])
        return made[family, backend]

    return make


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        ("llama", "onnx"),
        ("llama", "openvino"),
        pytest.param("gpt2", "onnx", marks=THOROUGH),
        pytest.param("qwen3", "openvino", marks=THOROUGH),
        pytest.param("mistral", "onnx", marks=THOROUGH),
        pytest.param("llama", "torch", marks=THOROUGH),
    ],
)
def test_a_program_writes_what_its_model_writes(
    family: str, backend: str, artifacts: Callable[[str, str], Path], tiny_checkpoint: TinyCheckpoint
) -> None:
    checkpoint = loaded(family, tiny_checkpoint)
    folder, prompts = artifacts(family, backend), prompts_of(checkpoint)
    writer = writer_of(folder, checkpoint)
    expected = [generated(checkpoint, prompt) for prompt in prompts]
    assert len({len(prompt) for prompt in prompts}) == len(prompts)
    assert written(writer, prompts) == expected
    assert written(writer, prompts) == expected, "the cache of the texts before is forgotten"
    alone = [written(writer, [prompt])[0] for prompt in prompts]
    assert alone == expected


def test_the_eager_model_writes_as_its_generate(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = loaded("gpt2", tiny_checkpoint)
    writer = Writer(EagerRunner(checkpoint, 1).decoder(), checkpoint.tokenizer, checkpoint.max_length)
    prompts = prompts_of(checkpoint)
    assert written(writer, prompts) == [generated(checkpoint, prompt) for prompt in prompts]


@pytest.mark.parametrize("backend", ["onnx", "openvino", pytest.param("torch", marks=THOROUGH)])
def test_what_is_kept_is_what_the_manifest_says(
    backend: str, artifacts: Callable[[str, str], Path], tiny_checkpoint: TinyCheckpoint
) -> None:
    checkpoint = loaded("llama", tiny_checkpoint)
    folder = artifacts("llama", backend)
    facts = read_manifest(folder).cache
    assert facts is not None and facts.precision == "f32"
    assert facts.values_per_token == 2 * 2 * 2 * 8  # keys and values, 2 layers, 2 heads of 8
    writer = writer_of(folder, checkpoint)
    prompts = [prompt[:3] for prompt in prompts_of(checkpoint, [PROMPTS[0], PROMPTS[2]])]
    steps = len(written(writer, prompts)[0])
    read = 3 + steps - 1  # the last token is told and not read
    assert writer.decoder.cache_bytes() == 2 * read * facts.values_per_token * 4


@pytest.mark.thorough
def test_half_a_precision_keeps_half_as_much(
    tiny_checkpoint: TinyCheckpoint, artifacts: Callable[[str, str], Path], tmp_path: Path
) -> None:
    checkpoint = loaded("llama", tiny_checkpoint)
    manifest = export(checkpoint, ExportSettings(backend="onnx", precision="fp16"), tmp_path / "half")
    assert manifest.cache is not None and manifest.cache.precision == "f16"
    kept = []
    for folder in (tmp_path / "half", artifacts("llama", "onnx")):
        writer = writer_of(folder, checkpoint)
        assert len(written(writer, prompts_of(checkpoint)[:1], WritingSettings(max_new_tokens=3))[0]) == 3
        kept.append(writer.decoder.cache_bytes())
    assert kept[1] == 2 * kept[0] > 0


@pytest.mark.parametrize("backend", ["onnx", pytest.param("openvino", marks=THOROUGH)])
def test_more_than_a_program_was_exported_for_is_refused(
    backend: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """The graph itself would answer something: it has no bounds."""
    checkpoint = loaded("llama", tiny_checkpoint)
    export(checkpoint, ExportSettings(backend=backend, shapes=ShapeRange(max_sequence=32)), tmp_path / "short")
    runner, manifest = load_runner(tmp_path / "short", threads=1)
    assert manifest.max_length == 32 < checkpoint.max_length
    ids = torch.full((1, 33), 7)
    with pytest.raises(InputError, match=r"takes sequences of 1 to 32 tokens, not of 33") as refused:
        runner({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert "--sequence" in str(refused.value.hint)
    writer = Writer(runner.decoder(), checkpoint.tokenizer, manifest.max_length)
    with pytest.raises(InputError, match=r"prompt of 30 tokens and 3 new ones is longer than the 32"):
        next(writer.write([[7] * 30], WritingSettings(max_new_tokens=3)))


@pytest.mark.parametrize("backend", ["onnx", pytest.param("openvino", marks=THOROUGH)])
def test_layers_and_heads_that_were_cut_write_too(
    backend: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    whole = loaded("llama", tiny_checkpoint)
    heads = [HeadSelection(torch.tensor([0, 1]), torch.tensor([0])), HeadSelection(torch.arange(4), torch.arange(2))]
    model = select(whole.model, Selection(heads=heads, ffn=[torch.arange(24), torch.arange(40)]))
    checkpoint = replace(whole, model=model, hash=hash_of_model(model))
    manifest = export(checkpoint, ExportSettings(backend=backend), tmp_path / backend)
    assert manifest.cache is not None and manifest.cache.values_per_token == 2 * (1 + 2) * 8
    prompts = prompts_of(checkpoint)
    expected = [generated(checkpoint, prompt) for prompt in prompts]
    assert written(writer_of(tmp_path / backend, checkpoint), prompts) == expected


@pytest.mark.thorough
def test_openvinos_cache_is_kept_in_what_was_asked_for(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = loaded("llama", tiny_checkpoint)
    settings = ExportSettings(backend="openvino", options={"kv_cache_precision": "u8"})
    manifest = export(checkpoint, settings, tmp_path / "u8")
    runner, _ = load_runner(tmp_path / "u8", threads=1)
    assert manifest.cache is not None and manifest.cache.precision == "u8"
    assert runner.properties["KV_CACHE_PRECISION"] == "u8"


def test_a_model_without_a_cache_is_refused_and_can_score(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = loaded("gpt2", tiny_checkpoint)
    model = checkpoint.model
    forward = model.forward

    def forgetful(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> Any:
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

    model.forward = forgetful  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"keeps no cache .* could go on from") as refused:
        export(checkpoint, ExportSettings(backend="onnx"), tmp_path / "artifact")
    assert "--no-kv-cache" in str(refused.value.hint)
    model.forward = forward  # type: ignore[method-assign]
    manifest = export(checkpoint, ExportSettings(backend="onnx", kv_cache=False), tmp_path / "scores")
    assert manifest.cache is None
    runner, _ = load_runner(tmp_path / "scores")
    with pytest.raises(UsageError, match="writes no text"):
        runner.decoder()


@pytest.mark.thorough
def test_a_kit_scores_texts_and_says_that_it_writes_none(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = loaded("llama", tiny_checkpoint)
    manifest = export(checkpoint, ExportSettings(backend="tensorrt", precision="fp32"), tmp_path / "kit")
    assert manifest.is_kit and manifest.cache is None and not manifest.settings.kv_cache
    runner, _ = load_runner(tmp_path / "kit", threads=1)
    ids = torch.tensor(prompts_of(checkpoint)[:1])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    np.testing.assert_allclose(runner(batch)["logits"], checkpoint.run(batch)["logits"], atol=1e-4)
    with pytest.raises(UsageError, match="writes no text") as refused:
        runner.decoder()
    assert "--backend onnx, openvino" in str(refused.value.hint)


def test_sizes_that_are_fixed_are_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = loaded("llama", tiny_checkpoint)
    static = ShapeRange(min_batch=1, max_batch=1, min_sequence=32, max_sequence=32)
    with pytest.raises(UsageError, match="cannot be fixed"):
        export(checkpoint, ExportSettings(backend="onnx", shapes=static), tmp_path / "artifact")
    manifest = export(checkpoint, ExportSettings(backend="onnx", shapes=static, kv_cache=False), tmp_path / "static")
    assert manifest.settings.shapes.min_sequence == 32


class Fixed:
    """A decoder whose next token is known."""

    def __init__(self, *logits: list[float]) -> None:
        self.logits, self.fed = list(logits), []

    def start(self, rows: int) -> None:
        self.rows = rows

    def step(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        self.fed.append((ids.copy(), mask.copy(), positions.copy()))
        return np.array([self.logits[(len(self.fed) - 1) % len(self.logits)]] * self.rows, dtype=np.float32)

    def cache_bytes(self) -> int:
        return 0


def fixed(tiny_checkpoint: TinyCheckpoint, *logits: list[float], max_length: int = 16) -> tuple[Fixed, Writer]:
    decoder = Fixed(*logits)
    tokenizer = loaded("llama", tiny_checkpoint).tokenizer
    return decoder, Writer(decoder, tokenizer, max_length)  # type: ignore[arg-type]


def test_unequal_prompts_end_at_the_same_place(tiny_checkpoint: TinyCheckpoint) -> None:
    decoder, writer = fixed(tiny_checkpoint, [0, 0, 0, 0, 0, 1.0])
    assert written(writer, [[7, 8, 9], [6]], WritingSettings(max_new_tokens=2)) == [[5, 5], [5, 5]]
    ids, mask, positions = decoder.fed[0]
    assert ids.tolist() == [[7, 8, 9], [0, 0, 6]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    ids, mask, positions = decoder.fed[1]
    assert ids.tolist() == [[5], [5]] and mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert positions.tolist() == [[3], [1]]


def test_a_text_stops_at_its_end_token(tiny_checkpoint: TinyCheckpoint) -> None:
    end = loaded("llama", tiny_checkpoint).tokenizer.eos_token_id
    said = np.eye(6).tolist()
    _, writer = fixed(tiny_checkpoint, said[5], said[end], said[4])
    assert written(writer, [[7]]) == [[5, end]]


def test_prompts_that_do_not_fit_are_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    _, writer = fixed(tiny_checkpoint, [1.0], max_length=4)
    with pytest.raises(InputError, match="prompt of 4 tokens is longer than the 4"):
        next(writer.write([[1, 2, 3, 4]]))
    with pytest.raises(InputError, match="prompt of 3 tokens and 2 new ones"):
        next(writer.write([[1, 2, 3]], WritingSettings(max_new_tokens=2)))
    with pytest.raises(InputError, match="without tokens"):
        next(writer.write([[1], []]))
    assert len(list(writer.write([[1, 2]]))) == 2, "what is left, where nothing was asked for"


def test_a_tokenizer_without_padding_and_end_tokens(tiny_checkpoint: TinyCheckpoint) -> None:
    _, writer = fixed(tiny_checkpoint, [0, 1.0])
    writer.tokenizer.pad_token = writer.tokenizer.eos_token = None
    assert written(writer, [[7, 8]], WritingSettings(max_new_tokens=3)) == [[1, 1, 1]]
    with pytest.raises(InputError, match="neither a padding token nor an end token"):
        next(writer.write([[7, 8], [9]]))


def test_sampling_follows_the_probabilities_and_its_seed(tiny_checkpoint: TinyCheckpoint) -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05]).tolist()
    _, writer = fixed(tiny_checkpoint, logits, max_length=4000)
    writer.tokenizer.eos_token = None

    def shares(**settings: Any) -> list[float]:
        tokens = written(writer, [[1]], WritingSettings(max_new_tokens=2000, temperature=1.0, **settings))[0]
        return [round(tokens.count(token) / len(tokens), 2) for token in range(4)]

    assert shares(seed=3) == shares(seed=3) != shares(seed=4)
    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.05)
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.05)
    assert shares(top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.05)
    with pytest.raises(UsageError, match="temperature 0"):
        WritingSettings(top_k=2)
