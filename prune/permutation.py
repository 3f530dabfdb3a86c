"""Channel permutation: the same function with its channels in an order that suits an N:M mask.

Pool & Yu 2021, "Channel Permutations for N:M Sparsity" (NeurIPS). A mask keeps n of every m *consecutive* weights along
the reduction axis, so which channels stand together decides how much of a matrix survives. Channels are moved where the
model computes the same afterwards: whatever writes them and whatever reads them is reordered alike.

- **Feed-forward channels** of a layer: written by up and gate, read by down.
- **Value channels** within a head: written by the value projection, read by the attention's output projection; the
  query heads of a group share one order. Whole heads stay in their places: where m divides the head size, no stripe of
  m reaches over a head's border, and moving heads would change nothing that a mask keeps.
- **The residual stream**: one order for the whole model, read by query, key, value, up and gate of every layer, written
  or read by embeddings, norms, output and down projections and the head on top. A model without a head hands the
  residual stream to its caller, so there it stays as it is.

Channels of which m does not divide the number stay in their places.
Every matrix's inputs belong to one of these alone, so that the searches do not depend on each other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..errors import InputError, UsageError
from ..models.anatomy import Anatomy, Linear, anatomy_of, in_features, out_features, reduction_axis
from ..models.shapes import KEY
from .permutation_search import kept_score, row_stride, search_order

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scores = Callable[[str, Linear], "torch.Tensor | None"]
"""Qualified name and module of a matrix to its scores [out, in], or to `None` for a matrix that stays dense."""


@dataclass(frozen=True)
class MatrixGain:
    """What an N:M mask keeps of one matrix's scores, summed, in the old order of its inputs and in the new one."""

    name: str
    before: float
    after: float


@dataclass
class Gain:
    """What a permutation did."""

    matrices: list[MatrixGain] = field(default_factory=list)
    """Every matrix whose inputs were looked at; before and after are equal where no better order was found."""
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    """For each matrix whose inputs moved, the old input channel at each new place, int64 [in] on the CPU: statistics of
    its inputs that were taken before hold for the new model as `norms[gain.inputs[name]]`."""
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    """The same for output channels, int64 [out]."""

    @property
    def before(self) -> float:
        """The score kept in all matrices in the old order."""
        return sum(matrix.before for matrix in self.matrices)

    @property
    def after(self) -> float:
        """The score kept in all matrices in the new order."""
        return sum(matrix.after for matrix in self.matrices)

    def reorder(self, name: str, scores: torch.Tensor) -> torch.Tensor:
        """Scores [out, in] of a matrix as it was, in the order of its channels now."""
        for axis, moved in ((0, self.outputs), (1, self.inputs)):
            if name in moved:
                scores = scores.index_select(axis, moved[name].to(scores.device))
        return scores


@dataclass(frozen=True)
class _Reader:
    """A matrix that a mask may fall on, and where among its inputs the channels of a group stand."""

    name: str
    module: Linear
    places: torch.Tensor
    """int64 [problems, copies, channels]: each problem has an order of its own, which all its copies share."""


@dataclass(frozen=True)
class _Axis:
    """An axis of a parameter, by qualified name, and where on it the channels of a group stand."""

    name: str
    axis: int
    places: torch.Tensor
    """As a reader's."""


@dataclass
class _Group:
    """Channels that are reordered together."""

    readers: list[_Reader] = field(default_factory=list)
    axes: list[_Axis] = field(default_factory=list)
    """Everything that moves, the readers' inputs included."""

    def reads(self, name: str, module: Linear, places: torch.Tensor) -> None:
        """Move a matrix's inputs, and count what a mask keeps of it."""
        self.readers.append(_Reader(name, module, places))
        self.axes.append(_Axis(f"{name}.weight", reduction_axis(module), places))

    def writes(self, name: str, module: Linear, places: torch.Tensor) -> None:
        """Move a matrix's outputs, with their bias."""
        self.axes.append(_Axis(f"{name}.weight", 1 - reduction_axis(module), places))
        if module.bias is not None:
            self.axes.append(_Axis(f"{name}.bias", 0, places))


def permute_channels(
    model: PreTrainedModel,
    scores: Scores,
    n: int = 2,
    m: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Gain:
    """Reorder a model's channels *in place* so that an N:M mask keeps more score; its outputs stay what they are.

    What is maximised is the sum of the scores kept in all matrices that read the channels, which have one order between
    them in the residual stream: a single matrix there may keep less than before. Time and memory of each search are
    `search_order`'s; scores are asked for group by group, so that only a few matrices of them exist at a time.

    Args:
        scores: Gives a matrix's scores [out, in], not negative and any float type; [out, in] for `Conv1D` too. It is
            asked about matrices inside the layers only, for each one *before* its inputs move (rows may have moved by
            then), so that statistics of the inputs need no reordering yet; twice for each, and the same both times.
        n: How many of every m consecutive weights along the reduction axis the mask keeps.
        seed: The search's. The same seed and scores give the same order.
        progress: Called with the groups of channels done and their number.

    Raises:
        UsageError: not 1 <= n < m.
        InputError: an unknown architecture, or scores of another shape, negative or not finite.
    """
    if not 1 <= n < m:
        raise UsageError(f"A pattern of {n}:{m} leaves nothing to choose: n must be at least 1 and less than m.")
    anatomy = anatomy_of(model)
    groups = [*_ffn_groups(model, anatomy), *_value_groups(model, anatomy), *_residual_groups(model, anatomy)]
    groups = [group for group in groups if group.readers and group.readers[0].places.shape[-1] % m == 0]
    gain = Gain()
    for done, group in enumerate(groups):
        orders = _search(group, scores, (n, m), seed, gain)
        if orders is not None:
            _move(model, group, orders, gain)
        if progress is not None:
            progress(done + 1, len(groups))
    return gain


def _ffn_groups(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[_Group]:
    for block in anatomy.ffn(model):
        places = torch.arange(block.width).view(1, 1, -1)
        group = _Group()
        group.reads(block.down_name, block.down, places)
        # A fused matrix holds the gate's channels, then the up projection's: two copies of one order.
        group.writes(
            block.up_name, block.up, torch.cat([places, places + block.width], dim=1) if block.fused else places
        )
        if block.gate is not None and block.gate_name is not None:
            group.writes(block.gate_name, block.gate, places)
        yield group


def _value_groups(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[_Group]:
    size = anatomy.head_size_of(model)
    modules = dict(anatomy.linear_layers(model))
    for index, layer in enumerate(anatomy.layers(model)):
        prefix = f"{anatomy.layers_name(model)}.{index}."
        output_name, value_name = prefix + anatomy.output, prefix + (anatomy.value or anatomy.qkv or "")
        output, value = modules[output_name], modules[value_name]
        heads = anatomy.heads_of(layer, size)
        shared = heads // anatomy.key_value_heads_of(layer, size)
        read = torch.arange(heads * size).view(heads // shared, shared, size)
        written = torch.arange(heads // shared * size).view(heads // shared, 1, size)
        group = _Group()
        group.reads(output_name, output, read)
        group.writes(value_name, value, written + 2 * heads * size if anatomy.qkv else written)
        yield group


def _residual_groups(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[_Group]:
    """One group, or none for a model that hands the residual stream out."""
    if model.base_model is model:
        return
    places = torch.arange(int(model.config.hidden_size)).view(1, 1, -1)
    follows = _axes_of_width(model, anatomy)
    group = _Group()
    for name, module in anatomy.linear_layers(model):
        if reduction_axis(module) in follows.get(f"{name}.weight", []):
            group.readers.append(_Reader(name, module, places))
    group.axes = [_Axis(name, axis, places) for name, axes in follows.items() for axis in axes]
    yield group


def _axes_of_width(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, list[int]]:
    """The axes along which parameters follow the residual stream; a tied one stands here once. No family in the table
    has a buffer that does.

    The class itself says so: two models of it are built without weights that differ in width alone, and what differs in
    size follows. The attention's inner axes do as well in families without a head size of their own, and are left out.
    """
    narrow, wide = (_sizes_at(model, anatomy, width) for width in (64, 128))
    projections = tuple(f".{part}" for part in (anatomy.query, anatomy.key, anatomy.value, anatomy.qkv) if part)
    inner: set[tuple[str, int]] = set()
    for name, module in anatomy.linear_layers(model):
        if name.endswith(projections):
            inner |= {(f"{name}.weight", 1 - reduction_axis(module)), (f"{name}.bias", 0)}
        elif name.endswith(f".{anatomy.output}"):
            inner.add((f"{name}.weight", reduction_axis(module)))
    follows: dict[str, list[int]] = {}
    for name, _ in model.named_parameters():
        sizes = enumerate(zip(narrow[name], wide[name], strict=True))
        axes = [axis for axis, (one, other) in sizes if one != other and (name, axis) not in inner]
        if axes:
            follows[name] = axes
    return follows


def _sizes_at(model: PreTrainedModel, anatomy: Anatomy, width: int) -> dict[str, torch.Size]:
    """The shapes of all parameters of a model of the same class with another width and one head."""
    config = copy.deepcopy(model.config)
    if getattr(config, "embedding_size", None) is not None:  # ELECTRA projects only where the two differ
        config.embedding_size = width if config.embedding_size == config.hidden_size else 16
    if hasattr(config, KEY):
        delattr(config, KEY)
    config.hidden_size = width
    setattr(config, anatomy.ffn_width, 32)
    setattr(config, anatomy.heads, 1)
    if anatomy.key_value_heads is not None:
        setattr(config, anatomy.key_value_heads, 1)
    if anatomy.head_size is not None:
        setattr(config, anatomy.head_size, 8)
    with torch.random.fork_rng(), torch.device("meta"):
        twin = type(model)(config)
    return {name: parameter.shape for name, parameter in twin.named_parameters(remove_duplicate=False)}


def _search(group: _Group, scores: Scores, pattern: tuple[int, int], seed: int, gain: Gain) -> torch.Tensor | None:
    """The orders of the group's problems, int64 [problems, channels]; `None` where they keep no more."""
    problems, _, channels = group.readers[0].places.shape
    rows = sum(out_features(reader.module) * reader.places.shape[1] for reader in group.readers)
    stride = row_stride(rows, channels)
    tables: list[list[torch.Tensor]] = [[] for _ in range(problems)]
    before: list[tuple[_Reader, float]] = []
    for reader in group.readers:
        table = _scores_of(reader, scores)
        if table is None:
            continue
        before.append((reader, kept_score(table, *pattern)))
        for problem, places in enumerate(reader.places.to(table.device)):
            tables[problem].extend(table[::stride, copied] for copied in places)
    if not before:
        return None
    orders = torch.stack([search_order(torch.cat(parts), *pattern, seed) for parts in tables])
    found = []
    for reader, kept in before:
        table = _scores_of(reader, scores)
        index = _index(reader.places, orders, in_features(reader.module))
        now = kept if table is None else kept_score(table.index_select(1, index.to(table.device)), *pattern)
        found.append(MatrixGain(reader.name, kept, now))
    better = sum(matrix.after for matrix in found) > sum(matrix.before for matrix in found)
    gain.matrices += found if better else [MatrixGain(matrix.name, matrix.before, matrix.before) for matrix in found]
    return orders if better else None


def _scores_of(reader: _Reader, scores: Scores) -> torch.Tensor | None:
    table = scores(reader.name, reader.module)
    shape = (out_features(reader.module), in_features(reader.module))
    if table is not None and table.shape != shape:
        raise InputError(f"The scores of {reader.name} are {list(table.shape)}; [out, in] is {list(shape)}.")
    if table is not None and not (torch.isfinite(table).all() and (table >= 0).all()):
        raise InputError(f"The scores of {reader.name} are negative, NaN or infinite somewhere.")
    return table


def _index(places: torch.Tensor, orders: torch.Tensor, size: int) -> torch.Tensor:
    """The old position at each new one along an axis of that size, int64 [size]."""
    index = torch.arange(size)
    index[places] = places.gather(-1, orders[:, None].expand_as(places))
    return index


@torch.no_grad()
def _move(model: PreTrainedModel, group: _Group, orders: torch.Tensor, gain: Gain) -> None:
    """Reorder everything that belongs to the group, in place, so that tied weights stay tied."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for moved in group.axes:
        tensor = parameters[moved.name]
        index = _index(moved.places, orders, tensor.shape[moved.axis])
        tensor.copy_(tensor.index_select(moved.axis, index.to(tensor.device)))
        module_name, _, parameter = moved.name.rpartition(".")
        module = model.get_submodule(module_name)
        if parameter == "weight" and isinstance(module, Linear):
            (gain.inputs if moved.axis == reduction_axis(module) else gain.outputs)[module_name] = index
