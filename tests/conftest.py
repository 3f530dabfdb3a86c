"""Tiny models with tokenizers of their own, texts and data files: what every test may ask for.

`tiny_checkpoint("bert", task="text-classification")` is a folder that was built from a configuration and a seed, so no
test needs a network. A folder is made once a session: tests read it and write elsewhere.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor
import transformers
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.exporters.base import HfExporter

# No database: tests leave nothing in the tree. No deadline: a busy machine is not a failure.
settings.register_profile("limbeck", database=None, deadline=None)
settings.load_profile("limbeck")

HIDDEN, LAYERS, HEADS, FFN, POSITIONS = 32, 2, 4, 64, 64

FAMILIES = {
    "bert": "BertConfig",
    "roberta": "RobertaConfig",
    "camembert": "CamembertConfig",
    "xlm-roberta": "XLMRobertaConfig",
    "distilbert": "DistilBertConfig",
    "electra": "ElectraConfig",
    "mpnet": "MPNetConfig",
    "modernbert": "ModernBertConfig",
    "gpt2": "GPT2Config",
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
}
UNSURVEYED = {"deberta-v2": "DebertaV2Config"}
"""Families that are exported although nothing knows where their heads and channels lie."""
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
WITH_TOKEN_TYPES = ("bert", "electra")
PADDED_POSITIONS = ("roberta", "camembert", "xlm-roberta", "mpnet")  # two positions are lost to padding

TASK_CLASSES = {
    "sentence-similarity": "AutoModel",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "fill-mask": "AutoModelForMaskedLM",
    "text-generation": "AutoModelForCausalLM",
}
LABELS = {
    "text-classification": ["negative", "neutral", "positive"],
    "token-classification": ["O", "NAME", "PLACE"],
}
PAD, START, END, UNKNOWN, MASK = "[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"

TEXTS = [
    "The kettle whistled long before anyone came into the kitchen.",
    "Rain fell on the harbour all night.",
    "She sold her bicycle to buy a better camera.",
    "Two foxes crossed the railway line at dawn.",
    "Nobody liked the soup, but everybody finished it.",
    "The lighthouse keeper wrote letters he never sent.",
    "Our train was late again.",
    "A good knife needs a careful owner.",
    "The bridge will stay closed until the spring floods are over.",
    "He plays the violin badly and with great joy.",
    "Cats sleep where the sun is.",
    "The museum bought a map that showed an island which does not exist.",
    "I was delighted with the hotel.",
    "This is the worst film of the year.",
    "The parcel arrived on Tuesday, as promised.",
    "Bread dough rises faster in a warm room.",
    "Marta walked from Lisbon to Porto in eleven days.",
    "The committee could not agree on the colour of the door.",
    "Snow makes the city quiet.",
    "An old map hung above the captain's desk.",
    "Why did the lights go out?",
    "The baker gives yesterday's rolls to the school.",
    "My phone battery dies before lunch.",
    "The valley smells of apples in October.",
    "Prices rose by three percent in the second quarter.",
    "The dog waited at the gate for an hour.",
    "Please return the book by Friday.",
    "A storm took the roof off the barn.",
    "The children built a dam across the stream.",
    "It was neither good nor bad.",
    "Engineers tested the valve at twice its rated pressure.",
    "He forgot his keys, his hat and his manners.",
    "The new library has more light than shelves.",
    "Wind turbines stood still in the heat.",
    "She counts the stairs whenever she climbs them.",
    "The waiter was rude and the food was cold.",
    "Ivan repaired the clock with a paper clip.",
    "Every winter the lake freezes from the north side.",
    "The recipe asks for more patience than butter.",
    "Their song became popular twenty years too late.",
    "We missed the ferry and slept on the beach.",
    "The judge read the letter twice.",
    "Bees returned to the garden this year.",
    "A wonderful book, warm and funny.",
    "The tailor in Naples remembers every coat.",
    "Water boils at a lower temperature on a mountain.",
    "The team lost, although it played well.",
    "Somebody painted the fence green overnight.",
    "The doctor asked about his sleep and his shoes.",
    "Salt keeps the road free of ice.",
    "The cellar held barrels, ropes and one broken piano.",
    "I would not recommend this phone to anyone.",
    "The owl on the chimney watched the party leave.",
    "Anna and Peter opened a bakery in Prague.",
    "The satellite sends one picture every nine minutes.",
    "His grandfather built ships in bottles.",
    "The market opens at six and is empty by ten.",
    "Lemon trees do not like frost.",
    "The path is short but steep.",
    "An honest mistake is still a mistake.",
    "The orchestra tuned while the hall filled.",
    "It rained, so the match was moved to Sunday.",
    "The ticket was cheap and the seat was comfortable.",
    "Go.",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", metavar="FILE", help="export every cell of test_matrix.py and write the table there")
    parser.addoption("--faults", metavar="FILE", help="write the table of planted faults and what caught them there")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile` the faults stay together as a file does: they share a student that is trained for them."""
    from xdist.scheduler import LoadFileScheduling

    class FaultsTogether(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "tests/faults" if nodeid.startswith("tests/faults/") else str(super()._split_scope(nodeid))

    return FaultsTogether(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_sessionstart() -> None:
    """Workers of pytest-xdist are told the width of a terminal that their output never reaches. Traces make millions of
    objects that live on, and a fifth of the time went into looking through them for garbage again and again."""
    os.environ.pop("COLUMNS", None)
    gc.set_threshold(100_000, 50, 100)


def pytest_collection_finish() -> None:
    """What was imported stays: it is not looked through again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def uncounted_traces() -> Iterator[None]:
    """Coverage looks at every line that runs, and nearly all that a trace or a compilation of torch's runs is torch's:
    with it an export takes 1.6 times as long. So it rests meanwhile."""

    def uncounted(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            tracer = sys.gettrace()
            sys.settrace(None)
            try:
                return function(*args, **kwargs)
            finally:
                sys.settrace(tracer)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((HfExporter, "export"), (torch._inductor, "aoti_compile_and_package")):
            patch.setattr(owner, name, uncounted(getattr(owner, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def short_warm_up() -> None:
    """Nobody looks at the speed of a tiny model, and beside another process it hardly settles: it would be called for 5
    seconds before it is timed."""
    from limbeck.validate.performance.latency import BenchSettings

    BenchSettings.model_fields["warm_up_seconds"].default = 0.3
    BenchSettings.model_rebuild(force=True)


@pytest.fixture(scope="module", autouse=True)
def what_other_files_left() -> None:
    """What the files before have left is not looked through again: a stopwatch collects garbage before every round, and
    that took seconds a time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept between runs is kept for this session only, and not in the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """64 English sentences of 1 to 12 words."""
    return list(TEXTS)


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, Iterable[dict[str, Any]]], Path]:
    """`write_jsonl(path, rows)` writes one JSON object a line and returns the path."""

    def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_checkpoint(family, task="sentence-similarity")`: a folder with a random model (width 32, 2 layers, FFN 64)
    and a tokenizer trained on `texts`. Made once a session: do not write into it."""
    made: dict[tuple[str, str], Path] = {}
    tokenizers: dict[str, PreTrainedTokenizerFast] = {}

    def make(family: str, task: str = "sentence-similarity") -> Path:
        if (family, task) not in made:
            if family not in tokenizers:
                tokenizers[family] = _tokenizer(family)
            folder = tmp_path_factory.mktemp("tiny") / f"{family}-{task}"
            _model(family, task, tokenizers[family]).save_pretrained(folder)
            tokenizers[family].save_pretrained(folder)
            made[family, task] = folder
        return made[family, task]

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(64)`: a folder on a disk of 64 kB."""
    folder = tmp_path / "disk"

    def make(kilobytes: int) -> Path:
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
        if subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk is not permitted here")
        return folder

    yield make
    if folder.is_mount():
        # At once, although OpenVINO's failed writer keeps its file open.
        subprocess.run(["umount", "--lazy", folder], check=True)


def _model(family: str, task: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Random weights large enough that every part of the model matters, biases and norms included."""
    config = getattr(transformers, {**FAMILIES, **UNSURVEYED}[family])(**_sizes(family, task, tokenizer))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, TASK_CLASSES[task]).from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()  # type: ignore[no-any-return]


def _sizes(family: str, task: str, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS + 2 * (family in PADDED_POSITIONS),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        {"distilbert": "hidden_dim", "gpt2": "n_inner"}.get(family, "intermediate_size"): FFN,
    }
    if family in ("llama", "mistral", "qwen2", "qwen3"):
        sizes |= {"num_key_value_heads": HEADS // 2, "head_dim": HIDDEN // HEADS}
    if family == "electra":
        sizes["embedding_size"] = HIDDEN // 2
    if family == "modernbert":
        sizes |= {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
    if task in LABELS:
        sizes["id2label"] = dict(enumerate(LABELS[task]))
        sizes["label2id"] = {name: index for index, name in enumerate(LABELS[task])}
    return sizes


def _tokenizer(family: str) -> PreTrainedTokenizerFast:
    """WordPiece for encoders, byte-level BPE for decoders and RoBERTa's kin."""
    bytes_of = family in DECODERS or family.endswith("roberta")
    tokenizer = _byte_pairs() if bytes_of else _word_pieces()
    inputs = ["input_ids", *(["token_type_ids"] if family in WITH_TOKEN_TYPES else []), "attention_mask"]
    if family not in DECODERS:
        special = [(token, tokenizer.token_to_id(token)) for token in (START, END)]
        single, pair = f"{START} $A {END}", f"{START} $A {END} $B:1 {END}:1"
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    ends = {"bos_token": START, "eos_token": END, "pad_token": PAD, "unk_token": UNKNOWN}
    marks = {} if family in DECODERS else {"cls_token": START, "sep_token": END, "mask_token": MASK}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=inputs, model_max_length=POSITIONS, **ends, **marks
    )


def _word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = [PAD, START, END, UNKNOWN, MASK]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _byte_pairs() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[PAD, START, END, UNKNOWN, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer
