"""Several processes under `accelerate launch`: who writes, and who waits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState


def is_launched() -> bool:
    """Whether a launcher (accelerate, torchrun, DeepSpeed) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _state() -> PartialState:
    return PartialState(cpu=not torch.cuda.is_available())  # accelerate joins processes without a GPU only if told


def is_main() -> bool:
    """Whether this process writes files and shows progress; always true without a launcher."""
    return not is_launched() or bool(_state().is_main_process)


@contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block first, the others after it: they find what it wrote."""
    if not is_launched():
        yield
        return
    with _state().main_process_first():
        yield
