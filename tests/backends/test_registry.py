"""Backends by name, and plug-ins: a good one joins, a broken one harms no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from limbeck.backends.base import Backend
from limbeck.backends.registry import backend_names, backend_of_format, get_backend, list_backends
from limbeck.errors import InputError, UsageError

BUILT_IN = ["onnx", "openvino", "tensorrt", "torch", "executorch"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_backend_is_found_by_name_and_by_format(name: str) -> None:
    backend = get_backend(name)
    assert isinstance(backend, Backend)
    assert backend.name == name
    assert backend.default_precision in backend.precisions
    for artifact_format in backend.formats:
        assert type(backend_of_format(artifact_format)) is type(backend)


def test_every_backend_is_listed_with_what_it_can_do() -> None:
    listings = {listing.name: listing for listing in list_backends()}
    assert [*listings][: len(BUILT_IN)] == BUILT_IN == backend_names()[: len(BUILT_IN)]
    assert listings["onnx"].availability.can_run and listings["onnx"].summary
    for listing in listings.values():
        able = listing.availability.can_export and listing.availability.can_run
        assert able or listing.availability.reason  # what is not ready says why


@pytest.mark.parametrize(("wrong", "near"), [("onx", "onnx"), ("OpenVino", "openvino"), ("tensor-rt", "tensorrt")])
def test_an_unknown_backend_suggests_the_near_one(wrong: str, near: str) -> None:
    with pytest.raises(UsageError, match=rf"no backend '{wrong}'; the backends are onnx, .*Did you mean '{near}'"):
        get_backend(wrong)


def test_nothing_far_off_is_suggested() -> None:
    with pytest.raises(UsageError) as caught:
        get_backend("zzz")
    assert "Did you mean" not in caught.value.message
    with pytest.raises(InputError, match="No backend here opens artifacts of the format 'tflite'"):
        backend_of_format("tflite")


def test_listing_backends_loads_no_torch() -> None:
    code = "import sys; from limbeck.backends import registry; registry.list_backends(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


PLUGIN = """
from limbeck.backends.base import Availability, Backend

class Mine(Backend):
    name = "mine"
    summary = "a good plug-in"
    formats = ("mine-format",)

    def probe(self):
        return Availability(True, True)

    def export(self, job, folder):
        raise NotImplementedError

    def load(self, folder, manifest, threads=None):
        raise NotImplementedError

class ProbeRaises(Mine):
    name = "probe-raises"
    formats = ("other",)

    def probe(self):
        raise OSError("no driver")

class Unfinished(Backend):
    name = "unfinished"

def not_a_backend():
    pass
"""
ENTRY_POINTS = """[limbeck.backends]
a-missing-module = no_such_module:Backend
a-missing-name = my_plugin:NoSuchName
a-bad-syntax = my_bad_syntax:Backend
a-raising-module = my_raising:Backend
a-function = my_plugin:not_a_backend
an-unfinished-one = my_plugin:Unfinished
probe-raises = my_plugin:ProbeRaises
mine = my_plugin:Mine
onnx = my_plugin:Mine
"""
REPORT = """
import json
from limbeck.backends.registry import backend_of_format, get_backend, list_backends
from limbeck.errors import BackendUnavailable
refused = {}
for listing in list_backends():
    try:
        get_backend(listing.name)
    except BackendUnavailable as error:
        refused[listing.name] = error.message
print(json.dumps({
    "listed": {l.name: [l.availability.can_run, l.availability.reason, l.source] for l in list_backends()},
    "refused": refused,
    "opened by": [type(backend_of_format(name)).__name__ for name in ("mine-format", "onnx")],
}))
"""


@pytest.fixture(scope="module")
def with_plugins(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a process sees in which good and broken plug-ins are installed."""
    site = tmp_path_factory.mktemp("site")
    (site / "my_plugin.py").write_text(PLUGIN)
    (site / "my_bad_syntax.py").write_text("def (")
    (site / "my_raising.py").write_text("raise RuntimeError('the licence has expired')")
    info = site / "my_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", REPORT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_plug_in_is_a_backend_like_ours(with_plugins: Any) -> None:
    assert with_plugins["listed"]["mine"] == [True, "", "my_plugin:Mine"]
    assert with_plugins["opened by"] == ["Mine", "OnnxBackend"]
    assert with_plugins["listed"]["onnx"][2] == "built in"  # a plug-in does not take our name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a-missing-module", "does not import: No module named 'no_such_module'"),
        ("a-missing-name", "does not import"),
        ("a-bad-syntax", "does not import"),
        ("a-raising-module", "does not import: the licence has expired"),
        ("a-function", "is neither a limbeck Backend nor an HfExporter"),
        ("an-unfinished-one", "cannot be made"),
        ("probe-raises", "OSError when probed: no driver"),
    ],
)
def test_a_broken_plug_in_is_listed_as_such(with_plugins: Any, name: str, reason: str) -> None:
    can_run, said, _ = with_plugins["listed"][name]
    assert not can_run
    assert reason in said
    assert name == "probe-raises" or name in with_plugins["refused"]


def test_broken_plug_ins_harm_no_other(with_plugins: Any) -> None:
    assert [*with_plugins["listed"]][: len(BUILT_IN)] == BUILT_IN
    assert with_plugins["listed"]["onnx"][0]
    assert not set(with_plugins["refused"]) & {*BUILT_IN, "mine"}
