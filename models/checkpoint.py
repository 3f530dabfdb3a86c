"""Checkpoints: a Hugging Face folder with its tokenizer, its task and its history; loaded and saved in one call."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..errors import InputError, first_line
from ..files import read_json, staged_folder, write_json, write_text
from .batching import Batch
from .card import write_checkpoint_card
from .data import Data, read_data
from .embedding import MODULES_FILE, Pooling, read_pooling
from .features import FeatureRecorder
from .lineage import TRACE_FILE, TRAINING_ROWS_FILE, Lineage, Step, read_training_rows, trace_lines
from .mapped import in_float32
from .shapes import KEY as SHAPES_KEY
from .shapes import class_for
from .tasks import TASKS, Task, get_task
from .terms import HUB_PATTERNS, Terms, read_terms

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SENTENCE_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "pytorch_model.pt")
_LONGEST_GUESS = 512


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model with everything that belongs to it. `module` is what is trained, exported and compared."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    lineage: Lineage
    source: str
    hash: str
    """SHA-256 over configuration and weights, as 64 hex digits."""
    pooling: Pooling = field(default_factory=Pooling)
    training_rows: Mapping[str, list[str]] = field(default_factory=dict)
    """Data fingerprint to row hashes: every row that any step has trained on."""
    terms: Terms = field(default_factory=Terms)
    """Licence and descent, as the source states them."""
    recorded: tuple[str, ...] = ()
    """Features (see `models/features.py`) that the module returns beside its outputs."""

    @cached_property
    def module(self) -> nn.Module:
        """The model with the head of its task, in evaluation mode."""
        module = self.task.module(self.model, self.pooling)
        return (FeatureRecorder(module, self.model, self.recorded) if self.recorded else module).eval()

    def recording(self, features: Iterable[str]) -> Checkpoint:
        """The same model, whose module also returns these features."""
        return replace(self, recorded=tuple(features))

    @property
    def max_length(self) -> int:
        """Tokens a text is cut at."""
        limits = [self.pooling.max_length, self.tokenizer.model_max_length, max_positions(self.model)]
        return int(min(limit for limit in limits if limit))

    @property
    def parameters(self) -> int:
        """Parameters of the module, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def input_names(self) -> list[str]:
        """The tokenizer's outputs that the model's forward takes, in the tokenizer's order."""
        accepted = inspect.signature(self.model.forward).parameters
        return [name for name in self.tokenizer.model_input_names if name in accepted]

    def read(self, source: str | Path, columns: Mapping[str, str] | None = None, keep: Sequence[str] = ()) -> Data:
        """Rows of a data file with this task's fields, and the columns in `keep` (see `read_data`)."""
        return read_data(source, self.task.fields, columns=columns, optional=self.task.optional_fields, keep=keep)

    def model_inputs(self, batch: Mapping[str, torch.Tensor]) -> Batch:
        """The part of a batch that the forward takes (labels left out)."""
        return {name: batch[name] for name in self.input_names}

    @torch.inference_mode()
    def run(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The eager reference: named outputs of a batch as float32 arrays."""
        device = self.model.device
        inputs = {name: value.to(device) for name, value in self.model_inputs(batch).items()}
        outputs = self.module(**inputs, **self.task.forward_flags())
        named = (self.task.output, *self.recorded)
        return {name: outputs[name].float().cpu().numpy() for name in named if name in outputs}

    def after(self, model: PreTrainedModel, step: Step, data: Data | None = None) -> Checkpoint:
        """This checkpoint with a changed model and one more step of history; its hash is that of the new weights."""
        rows = dict(self.training_rows)
        if data is not None:
            rows[data.fingerprint] = data.row_hashes
        return replace(
            self,
            model=model,
            lineage=self.lineage.followed_by(step),
            hash=hash_of_model(model),
            training_rows=rows,
        )

    def save(self, folder: Path, overwrite: bool = False) -> None:
        """Write the checkpoint, whole or not at all.

        Raises:
            UsageError: the folder holds something and `overwrite` is false.
        """
        with staged_folder(folder, overwrite) as staging:
            self.model.save_pretrained(staging)
            self.tokenizer.save_pretrained(staging)
            self.lineage.save(staging)
            if traced := "".join(f"{json.dumps(line)}\n" for line in trace_lines(self.lineage)):
                write_text(staging / TRACE_FILE, traced)
            if self.training_rows:
                write_json(staging / TRAINING_ROWS_FILE, dict(self.training_rows))
            if self.task.name == "sentence-similarity":
                self.save_pooling(staging)
            self.terms.save(staging)
            write_checkpoint_card(self, staging)

    def save_generation_config(self, folder: Path) -> None:
        """Write `generation_config.json` as it is, where the model generates (`save_pretrained` refuses those that
        say what it would not)."""
        if self.model.can_generate() and self.model.generation_config is not None:
            self.model.generation_config.to_json_file(folder / "generation_config.json")

    def save_pooling(self, folder: Path) -> None:
        """Write `modules.json` and what it names, so that sentence-transformers opens the folder too."""
        prefix = "sentence_transformers.models."
        modules = [
            {"idx": 0, "name": "0", "path": "", "type": prefix + "Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": prefix + "Pooling"},
        ]
        if self.pooling.normalize:
            modules.append({"idx": 2, "name": "2", "path": "2_Normalize", "type": prefix + "Normalize"})
            (folder / "2_Normalize").mkdir(exist_ok=True)
        write_json(folder / MODULES_FILE, modules)
        write_json(folder / "sentence_bert_config.json", {"max_seq_length": self.max_length, "do_lower_case": False})
        flags = {f"pooling_mode_{name}": mode == self.pooling.mode for name, mode in _POOLING_FLAG_NAMES.items()}
        width = int(self.model.config.hidden_size)
        write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **flags})


_POOLING_FLAG_NAMES = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "mean_sqrt_len_tokens": "-"}


def max_positions(model: PreTrainedModel) -> int:
    """Tokens that the model has positions for; RoBERTa-like models lose the first `padding_idx + 1` to padding."""
    limit = int(getattr(model.config, "max_position_embeddings", 0) or _LONGEST_GUESS)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return limit - int(module.padding_idx) - 1
    return limit


def load_checkpoint(source: str | Path, task: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """Load a model from a local folder or by its hub id.

    Args:
        task: one of `TASKS`; read from the folder's own files when not given.
        trust_remote_code: run Python code that the model's repository ships. Off unless asked for.

    Raises:
        InputError: nothing there, no safetensors weights, or a model that does not fit the task.
        UsageError: an unknown task.
    """
    folder = _local_folder(str(source))
    lineage = Lineage.load(folder)
    config = read_json(folder / "config.json")
    chosen = get_task(task or (lineage.task if lineage else _guess_task(config, folder)))
    model = load_model(folder, chosen, trust_remote_code=trust_remote_code)
    return Checkpoint(
        model=model,
        tokenizer=load_tokenizer(folder, trust_remote_code),
        task=chosen,
        lineage=lineage or Lineage(origin=_origin(source), task=chosen.name),
        source=str(source),
        hash=hash_of_model(model),
        pooling=read_pooling(folder) if chosen.name == "sentence-similarity" else Pooling(),
        training_rows=read_training_rows(folder),
        terms=read_terms(folder, hub_id=None if Path(source).is_dir() else str(source)),
    )


def _origin(source: str | Path) -> str:
    """What people call the model: its hub id, or its folder, or the folder around one that says only `model`."""
    path = Path(str(source))
    if not path.is_dir():
        return str(source)
    folder = path.resolve()
    return folder.parent.name if folder.name in ("model", "checkpoint") else folder.name


def _local_folder(source: str) -> Path:
    """The folder itself, or the hub's snapshot of it."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise InputError(f"{source} has no config.json, so it is not a model folder.")
        _refuse_without_safetensors(path)
        return path
    if path.exists() or path.is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise InputError(f"{source} is not a model folder." if path.exists() else f"{source} does not exist.")
    return _hub_snapshot(source)


def _hub_snapshot(source: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", *HUB_PATTERNS]
    try:
        folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise InputError(
            f"{source} is neither a folder here nor a model that could be had from the hub.",
            "Check the spelling and the network, or give a local folder.",
        ) from error
    _refuse_without_safetensors(folder)
    return folder


def _refuse_without_safetensors(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = [name for name in _PICKLES if (folder / name).exists()]
    if pickles:
        raise InputError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when it is opened; "
            "only safetensors are read.",
            "Convert it where you trust it: AutoModel.from_pretrained(FOLDER).save_pretrained(NEW).",
        )
    raise InputError(f"{folder} has a config.json but no weights (*.safetensors).")


def _guess_task(config: Mapping[str, Any], folder: Path) -> str:
    """The task by what the folder says of itself: sentence-transformers' files, then the architecture's head."""
    import transformers
    from optimum.exporters.tasks import TasksManager

    if (folder / MODULES_FILE).exists():
        return "sentence-similarity"
    for architecture in config.get("architectures") or []:
        model_class = getattr(transformers, architecture, None)
        task = TasksManager.infer_task_from_model(model_class) if model_class is not None else None
        if task == "feature-extraction":
            logger.info("%s has no head: read as sentence-similarity with mean pooling (--task changes it)", folder)
            return "sentence-similarity"
        if task in TASKS:
            return str(task)
    raise InputError(f"{folder} does not say what it is for.", f"Add --task, one of {', '.join(TASKS)}.")


def load_model(
    folder: Path, task: Task, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model alone, out of a folder with configuration and weights, in evaluation mode.

    Raises:
        InputError: no configuration, weights that do not load, or a model that does not fit the task.
    """
    import transformers

    config = read_json(folder / "config.json")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what it would warn of is checked below
    try:
        auto = getattr(transformers, task.auto_class)
        with in_float32(folder) if dtype == torch.float32 else nullcontext(folder) as mapped:
            model, report = _class_of(folder, auto, config).from_pretrained(
                mapped,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                dtype=dtype,
                output_loading_info=True,
            )
    except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} could not be loaded for {task.name}: {first_line(error)}") from error
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing or report["mismatched_keys"]:
        architectures = ", ".join(config.get("architectures") or ["unknown"])
        raise InputError(
            f"{folder} ({architectures}) has no weights for {missing[0] if missing else 'its head'}, "
            f"so it cannot serve {task.name}.",
            f"Choose the task it was trained for (--task), one of {', '.join(TASKS)}.",
        )
    model.name_or_path = str(folder)
    return model.eval()


def empty_model(folder: Path, task: Task) -> PreTrainedModel:
    """The model that a folder's configuration describes, on torch's `meta` device: its modules, without weights.

    Raises:
        InputError: no configuration, or one that transformers does not know.
    """
    import transformers

    config = read_json(folder / "config.json")
    try:
        known = transformers.AutoConfig.from_pretrained(folder)
        kind = _class_of(folder, getattr(transformers, task.auto_class), config)
        with torch.device("meta"):
            return (kind.from_config(known) if hasattr(kind, "from_config") else kind(known)).eval()
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise InputError(f"{folder} describes no model for {task.name}: {first_line(error)}") from error


def _class_of(folder: Path, auto: Any, config: Mapping[str, Any]) -> Any:
    """What loads the model: transformers' own choice, or one of ours for sizes that a configuration cannot say."""
    import transformers

    if SHAPES_KEY not in config:
        return auto
    known = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return class_for(type(auto.from_config(known)), known)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint or artifact folder.

    Raises:
        InputError: there is none that loads.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the Rust library raises bare exceptions
        raise InputError(f"{folder} has no tokenizer that loads: {first_line(error)}") from error
    if len(tokenizer.get_vocab()) <= len(set(tokenizer.all_special_ids)):  # what transformers makes up without files
        raise InputError(f"{folder} has no tokenizer that loads: no vocabulary.", "Copy the tokenizer's files into it.")
    return tokenizer


def hash_of_model(model: PreTrainedModel) -> str:
    """SHA-256 over the configuration's shape-giving values and every weight, as 64 hex digits: the same model has the
    same hash wherever it lies and however it is sharded."""
    digest = hashlib.sha256()
    ignored = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
    config = {key: value for key, value in model.config.to_dict().items() if key not in ignored}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith("pooler."):  # an embedder's unused head, dropped on first use
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
