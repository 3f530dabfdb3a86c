"""A student from scratch: a configuration, random weights, and from the teacher only what its outputs are made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError, UsageError, did_you_mean, first_line
from ..files import read_json
from ..models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_FROM_TEACHER = ("vocab_size", "id2label", "label2id")
"""Taken from the teacher where not given, as are all ids of special tokens: the student takes its tokenizer."""
_NOT_SIZES = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version"),
    *("directionality", "finetuning_task", "gradient_checkpointing", "output_past", "position_embedding_type"),
    *("id2label", "label2id", "num_labels", "global_attn_every_n_layers", "rope_scaling", "rope_theta"),
}
"""Found in config.json files, of older versions too, though not all of them are fields of the class."""


def scratch_model(teacher: Checkpoint, source: str | Mapping[str, Any], seed: int = 0) -> PreTrainedModel:
    """A model with random weights for the teacher's task.

    Args:
        source: a `config.json` or the folder it lies in, or what to change in the teacher's configuration; either may
            name another family (`model_type`), of which the sizes not given are the family's defaults.

    Raises:
        UsageError: an unknown key or family, or sizes that do not fit together.
        InputError: no such file, or a vocabulary or labels that are not the teacher's.
    """
    given = _read(source) if isinstance(source, str) else dict(source)
    config = _config(teacher, given, in_file=isinstance(source, str))
    _check_outputs(config, teacher)
    return _random_model(config, teacher, seed)


def _read(source: str) -> dict[str, Any]:
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix != ".json":
        raise InputError(
            f"{source} is not a config.json; a student from scratch takes no weights, and pickles are never opened.",
            "Give a config.json, the folder it lies in, or a mapping of what to change in the teacher's configuration.",
        )
    if not path.is_file():
        raise InputError(f"The configuration {path} does not exist.")
    given = read_json(path)
    if not isinstance(given, dict) or "model_type" not in given:
        raise InputError(f"{path} does not name its model_type, so it is no configuration of a model.")
    return given


def _config(teacher: Checkpoint, given: dict[str, Any], in_file: bool) -> PretrainedConfig:
    """The whole configuration: what is given, then the teacher's (all of it, or what its outputs are made of)."""
    from transformers import CONFIG_MAPPING

    ours = teacher.model.config
    kind = given.get("model_type", ours.model_type)
    if kind not in CONFIG_MAPPING:
        raise UsageError(f"transformers has no model_type {kind!r}.{did_you_mean(str(kind), CONFIG_MAPPING.keys())}")
    config_class = CONFIG_MAPPING[kind]
    names = config_class.attribute_map
    given = {names.get(key, key): value for key, value in given.items()}
    valid = set(config_class().to_dict()) | set(names)
    _check_keys(given, valid, str(kind))
    inherited = ours.to_dict()
    if in_file or kind != ours.model_type:
        inherited = {key: inherited[key] for key in inherited if key in _FROM_TEACHER or key.endswith("_token_id")}
    elif given.get("num_hidden_layers", ours.num_hidden_layers) != ours.num_hidden_layers:
        inherited.pop("layer_types", None)  # the family's own pattern at the new depth
    inherited = {key: value for key, value in inherited.items() if key in valid}
    if "num_labels" in given or "id2label" in given:  # either says what the other would
        inherited = {key: value for key, value in inherited.items() if key not in ("id2label", "label2id")}
    sizes = {**inherited, **given}
    for key in ("model_type", "_name_or_path", "architectures", "transformers_version"):
        sizes.pop(key, None)
    try:
        return config_class.from_dict(sizes)
    except Exception as error:  # transformers, huggingface_hub and torch each have their own
        raise UsageError(f"transformers refuses this configuration of a {kind}: {_last_line(error)}") from error


def _check_keys(given: Mapping[str, Any], valid: set[str], kind: str) -> None:
    known = sorted(key for key in valid if not key.startswith("_") and key not in _NOT_SIZES)
    for key in given:
        if key not in valid and key not in _NOT_SIZES:
            raise UsageError(
                f"The configuration of a {kind} has no {key!r}.{did_you_mean(key, known)}",
                f"Valid are {', '.join(known)}.",
            )


def _check_outputs(config: PretrainedConfig, teacher: Checkpoint) -> None:
    """The student answers with the teacher's tokens and labels."""
    theirs, words = teacher.model.config, teacher.model.config.vocab_size
    if config.vocab_size != words:
        raise InputError(
            f"The student's configuration has a vocabulary of {config.vocab_size} tokens and its teacher's {words}; a "
            "student from scratch takes its teacher's tokenizer.",
            "Leave vocab_size out.",
        )
    if teacher.task.name.endswith("-classification") and config.num_labels != theirs.num_labels:
        raise InputError(
            f"The student's configuration has {config.num_labels} labels and its teacher {theirs.num_labels}.",
            "Leave id2label and num_labels out.",
        )


def _random_model(config: PretrainedConfig, teacher: Checkpoint, seed: int) -> PreTrainedModel:
    import transformers

    auto = getattr(transformers, teacher.task.auto_class)
    try:
        with torch.random.fork_rng(), torch.inference_mode(False):
            torch.manual_seed(seed)
            model: PreTrainedModel = auto.from_config(config, dtype=torch.float32).eval()
        # Some sizes that do not fit together show only when something runs.
        inputs = teacher.tokenizer(["Go."], return_tensors="pt")
        with torch.inference_mode():
            model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    except Exception as error:  # whatever the modeling code says of sizes it was not made for
        raise UsageError(
            f"No {config.model_type} for {teacher.task.name} can be made of this configuration: {first_line(error)}"
        ) from error
    model.config.architectures = [type(model).__name__]  # as saving would, so that the hash is the saved one's
    return model.to(teacher.model.device)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
