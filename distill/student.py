"""Drawing a student from its teacher: some of its layers, with their weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

from transformers import PreTrainedModel

from ..errors import UsageError
from ..models.anatomy import anatomy_of


def uniform_layers(count: int, depth: int) -> list[int]:
    """`count` of `depth` layers, evenly spread, the first and the last among them (DistilBERT's and PKD-skip's choice
    in spirit: Sanh et al. 2019, Sun et al. 2019).

    Raises:
        UsageError: more layers than the teacher has, or none.
    """
    if not 1 <= count <= depth:
        raise UsageError(f"A student of {count} layers cannot be drawn from a teacher of {depth}; choose 1 to {depth}.")
    if count == 1:
        return [0]
    return [int(i * (depth - 1) / (count - 1)) for i in range(count)]


def draw_student(teacher: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A new model of the teacher's class that has only these of its layers (indices from 0, in order), with copies of
    their weights; embeddings, norms and head are copied whole.

    Raises:
        UsageError: a layer that the teacher does not have, or one named twice.
        InputError: an architecture that is not in the anatomy table.
    """
    anatomy = anatomy_of(teacher)
    depth = len(anatomy.layers(teacher))
    bad = [index for index in layers if not 0 <= index < depth]
    if bad or not layers or list(layers) != sorted(set(layers)):
        raise UsageError(
            f"The layers {list(layers)} cannot be drawn: name layers between 0 and {depth - 1}, each once, in order."
        )
    config = copy.deepcopy(teacher.config)
    setattr(config, anatomy.layer_count, len(layers))
    if getattr(config, "layer_types", None):  # families that alternate kinds of attention
        config.layer_types = [config.layer_types[index] for index in layers]
    student = type(teacher)(config)
    if getattr(teacher, "pooler", None) is None and getattr(student, "pooler", None) is not None:
        student.pooler = None
    prefix = re.escape(anatomy.layers_name(teacher))
    state = {}
    for name, tensor in teacher.state_dict().items():
        match = re.match(rf"({prefix}\.)(\d+)(\..*)", name)
        if match is None:
            state[name] = tensor
        elif int(match[2]) in layers:
            state[f"{match[1]}{list(layers).index(int(match[2]))}{match[3]}"] = tensor
    if state.keys() != student.state_dict().keys():  # ModernBERT's first layer alone has no attention norm
        raise UsageError(
            f"The layers {list(layers)} cannot be drawn: layer 0 of a {config.model_type} is unlike the others, so it "
            "must be the first."
        )
    student.load_state_dict(state)
    student.eval()
    return student
