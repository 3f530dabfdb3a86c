"""Latency of an artifact through limbeck against the same program run by its runtime's own API in a bare loop.

    python benchmarks/runner_overhead.py MODEL [--rounds 10]

Both run in one process, in turn, on the same input at the same number of threads; what is compared is the call that
`limbeck bench` times (`Runner.prepare`). Prints the ratio of medians for every artifact.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from limbeck.backends.registry import load_runner
from limbeck.environment import available_cpus
from limbeck.exporters.artifact import Manifest
from limbeck.exporters.inputs import probe_batch
from limbeck.exporters.settings import ExportSettings
from limbeck.models.checkpoint import load_checkpoint
from limbeck.recipes.steps import export
from limbeck.validate.performance.worker import timed, warm_up

_ARTIFACTS = (("onnx", "fp32"), ("onnx", "int4-weight-only"), ("openvino", "fp32"), ("openvino", "int8-weight-only"))
_SHAPES = ((1, 16), (1, 128), (8, 64))


def bare_onnx(folder: Path, manifest: Manifest, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
    """ONNX Runtime's documented way: a session, arrays in, arrays out."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cpus()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    feed = {value.name: batch[value.name].numpy() for value in session.get_inputs()}
    return lambda: session.run(None, feed)


def bare_openvino(folder: Path, manifest: Manifest, batch: Mapping[str, torch.Tensor]) -> Callable[[], object]:
    """OpenVINO's documented way: an infer request whose inputs are set once."""
    import openvino

    threads = {"INFERENCE_NUM_THREADS": str(available_cpus()), "PERFORMANCE_HINT": "LATENCY"}
    model = openvino.Core().compile_model(
        folder / "openvino_model.xml", "CPU", {**threads, **manifest.compile_properties}
    )
    request = model.create_infer_request()
    for port in model.inputs:
        request.set_tensor(port, openvino.Tensor(batch[port.get_any_name()].numpy()))
    return request.infer


_BARE: dict[str, Callable[..., Callable[[], object]]] = {"onnx": bare_onnx, "openvino": bare_openvino}


def compare(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median of each in milliseconds, rounds in turn."""
    counts = [max(10, int(200 / warm_up(call, 3.0, 0.03)[2])) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, count, found in zip(calls, counts, samples, strict=True):
            found.append(statistics.median(timed(call, count)))
    return [statistics.median(found) for found in samples]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=10)
    given: Any = parser.parse_args()
    checkpoint = load_checkpoint(given.model)
    print("| artifact | shape | limbeck ms | bare loop ms | ratio |\n|---|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as place:
        for backend, precision in _ARTIFACTS:
            folder = Path(place) / f"{backend}-{precision}"
            settings = ExportSettings.model_validate({"backend": backend, "precision": precision})
            manifest = export(checkpoint, settings, folder, beside_float=False)
            runner, _ = load_runner(folder)
            for shape in _SHAPES:
                batch = probe_batch(checkpoint, *shape)
                ours, theirs = compare([runner.prepare(batch), _BARE[backend](folder, manifest, batch)], given.rounds)
                size = f"{shape[0]} x {shape[1]}"
                print(
                    f"| {backend} {precision} | {size} | {ours:.3f} | {theirs:.3f} | {ours / theirs:.3f} |", flush=True
                )
            runner.close()


if __name__ == "__main__":
    main()
