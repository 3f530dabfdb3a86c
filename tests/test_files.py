"""Writes that are whole or absent, whatever happens in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.errors import DiskFull, InputError, UsageError
from limbeck.files import (
    LARGEST_DOCUMENT,
    check_output_folder,
    files_below,
    path_inside,
    read_json,
    read_yaml,
    sha256_of_file,
    sha256_of_json,
    staged_folder,
    total_size,
    write_json,
    write_text,
)

# A name that a folder can have, glob characters included.
names = st.text(st.sampled_from("ab.-[]*? é"), min_size=1, max_size=8).filter(lambda name: name not in (".", ".."))
A_DEAD_PROCESS = 2**22 + 1  # above the largest process id that Linux hands out


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(target: Path, overwrite: bool, problem: type[BaseException]) -> None:
    with staged_folder(target, overwrite=overwrite) as staging:
        (staging / "file.txt").write_text("new")
        raise problem


def fill_the_disk(target: Path) -> None:
    with staged_folder(target, overwrite=True) as staging:
        (staging / "begun.bin").write_bytes(b"x" * 1000)
        with open("/dev/full", "wb", buffering=0) as full:  # a device on which every write is ENOSPC
            full.write(b"x")


def make(folder: Path, content: str = "old") -> Path:
    folder.mkdir(parents=True)
    (folder / "file.txt").write_text(content)
    return folder


def test_a_staged_folder_takes_its_place_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with staged_folder(target) as staging:
        (staging / "file.txt").write_text("new")
        assert not target.exists()
        assert staging.parent == target.parent  # the same disk, so that moving is one rename
    assert (target / "file.txt").read_text() == "new"
    assert entries(target.parent) == ["out"]


@pytest.mark.parametrize("problem", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path: Path, problem: type[BaseException], overwrite: bool) -> None:
    target = tmp_path / "out"
    if overwrite:
        make(target)
    with pytest.raises(problem):
        write_half(target, overwrite, problem)
    assert entries(tmp_path) == (["out"] if overwrite else [])
    assert not overwrite or (target / "file.txt").read_text() == "old"


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    target = make(tmp_path / "out")
    (target / "stale.txt").write_text("must go")
    with staged_folder(target, overwrite=True) as staging:
        (staging / "file.txt").write_text("new")
    assert entries(target) == ["file.txt"]
    assert (target / "file.txt").read_text() == "new"
    assert entries(tmp_path) == ["out"]


def test_a_folder_that_holds_something_is_refused_before_any_work(tmp_path: Path) -> None:
    target = make(tmp_path / "out")
    began = False
    with pytest.raises(UsageError, match="not empty") as caught, staged_folder(target):
        began = True
    assert not began
    assert "--overwrite" in str(caught.value.hint)
    assert (target / "file.txt").read_text() == "old"
    assert entries(tmp_path) == ["out"]


def test_an_empty_folder_may_be_filled_and_a_file_may_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with staged_folder(tmp_path / "empty") as staging:
        (staging / "file.txt").touch()
    assert entries(tmp_path / "empty") == ["file.txt"]
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        check_output_folder(tmp_path / "file", overwrite=True)


def test_the_current_folder_and_a_link_to_a_folder_can_be_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with staged_folder(Path()) as staging:
        (staging / "file.txt").touch()
    assert entries(tmp_path / "here") == ["file.txt"]
    (tmp_path / "link").symlink_to("here")
    with staged_folder(tmp_path / "link", overwrite=True) as staging:
        (staging / "other.txt").touch()
    assert (tmp_path / "link").is_symlink()
    assert entries(tmp_path / "here") == ["other.txt"]
    assert entries(tmp_path) == ["here", "link"]


@given(name=names)
def test_a_half_done_swap_is_mended_at_the_next_use(name: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / name
        make(Path(scratch) / f".{name}.replaced-0123abcd")
        make(Path(scratch) / f".{name}.staging-{A_DEAD_PROCESS}-0123abcd", "half")
        with pytest.raises(UsageError, match="not empty"):  # the old one is back
            check_output_folder(target)
        assert (target / "file.txt").read_text() == "old"
        assert entries(Path(scratch)) == [name]


def test_an_old_folder_is_dropped_when_the_new_one_came(tmp_path: Path) -> None:
    make(tmp_path / ".out.replaced-0123abcd", "old")
    make(tmp_path / "out", "new")
    check_output_folder(tmp_path / "out", overwrite=True)
    assert entries(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file.txt").read_text() == "new"


def test_what_a_running_process_stages_is_left_alone(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out") as first:
        (first / "file.txt").write_text("first")
        check_output_folder(tmp_path / "out")
        assert (first / "file.txt").exists()


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    target = make(tmp_path / "out")
    with pytest.raises(DiskFull, match="disk is full") as caught:
        fill_the_disk(target)
    assert caught.value.exit_code == 4
    assert str(target) in caught.value.message
    assert entries(tmp_path) == ["out"]
    assert (target / "file.txt").read_text() == "old"


def test_other_errors_of_the_system_keep_their_own_words(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged_folder(tmp_path / "out"):
        (tmp_path / "absent").read_text()


def killed_while(tmp_path: Path, code: str) -> None:
    """Run the code in a process of its own, which is killed with SIGKILL when it prints a line."""
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()


PRELUDE = """
import os, sys, time
from pathlib import Path
from limbeck import files
folder = Path(sys.argv[1])
def pause(*_):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_leaves_no_half_folder_and_its_staging_is_swept(tmp_path: Path) -> None:
    stage = "with files.staged_folder(folder / 'out') as s:\n    (s / 'file.txt').write_text('half')\n    pause()"
    killed_while(tmp_path, PRELUDE + stage)
    assert not (tmp_path / "out").exists()
    assert len(entries(tmp_path)) == 1  # what it had staged
    with staged_folder(tmp_path / "out") as staging:
        (staging / "file.txt").write_text("whole")
    assert entries(tmp_path) == ["out"]


def test_a_process_killed_in_the_middle_of_the_swap_leaves_the_old_folder(tmp_path: Path) -> None:
    make(tmp_path / "out")
    # The old folder is renamed aside, then the process is killed where the new one would be renamed in.
    stage = """
rename = Path.rename
Path.rename = lambda path, to: pause() if '.staging-' in path.name else rename(path, to)
with files.staged_folder(folder / 'out', overwrite=True) as s:
    (s / 'file.txt').write_text('new')
"""
    killed_while(tmp_path, PRELUDE + stage)
    assert not (tmp_path / "out").exists()
    check_output_folder(tmp_path / "out", overwrite=True)
    assert entries(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file.txt").read_text() == "old"


def test_a_process_killed_while_it_writes_a_file_leaves_the_old_one(tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", {"figure": 1})
    killed_while(tmp_path, PRELUDE + "os.replace = pause\nfiles.write_json(folder / 'report.json', {'figure': 2})")
    assert read_json(tmp_path / "report.json") == {"figure": 1}
    write_json(tmp_path / "report.json", {"figure": 3})
    assert entries(tmp_path) == ["report.json"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(value=json_values)
def test_json_is_read_as_it_was_written(value: object) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        write_json(Path(scratch) / "value.json", value)
        assert read_json(Path(scratch) / "value.json") == value
        assert entries(Path(scratch)) == ["value.json"]


def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"figure": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"figure": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.json", "\ud800")
    assert read_json(tmp_path / "a.json") == {"figure": 1}
    assert entries(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"{'a': 1}"])
def test_a_file_that_is_not_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.json is not valid JSON"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(InputError, match=r"absent\.json does not exist"):
        read_json(tmp_path / "absent.json")


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/passwd", "link/secret", ".."])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "secret").touch()
    (tmp_path / "folder" / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="points outside"):
        path_inside(tmp_path / "folder", name)


@pytest.mark.parametrize("name", ["a", "a/b.txt", "a/../b", "...", "link/a"])
def test_a_path_that_stays_inside_is_given(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert path_inside(tmp_path, name) == tmp_path / name


def test_hashes_are_those_of_sha256sum_and_blind_to_the_order_of_keys(tmp_path: Path) -> None:
    (tmp_path / "abc").write_text("abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of_file(tmp_path / "abc") == known
    assert sha256_of_json({"a": 1, "b": [2]}) == sha256_of_json({"b": [2], "a": 1})
    assert sha256_of_json({"a": 1}) != sha256_of_json({"a": 2})


def test_files_below_are_relative_sorted_and_counted(tmp_path: Path) -> None:
    make(tmp_path / "b")
    (tmp_path / "a.txt").write_text("12")
    found = list(files_below(tmp_path))
    assert found == [Path("a.txt"), Path("b/file.txt")]
    assert total_size(tmp_path / path for path in found) == 5


def test_a_document_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "document"
    path.write_text('{"a": 1}')
    assert read_json(path, largest=8) == {"a": 1}
    with pytest.raises(InputError, match=r"document is too large .* 8 bytes, and at most 7 are read"):
        read_json(path, largest=7)
    os.truncate(path, LARGEST_DOCUMENT + 1)  # sparse: it takes no room
    for read in (read_json, lambda path: read_yaml(path, "recipe")):
        with pytest.raises(InputError, match="is too large"):
            read(path)
    path.unlink()
    path.symlink_to("/dev/zero")  # says that it is empty
    with pytest.raises(InputError, match="endless"):
        read_json(path, largest=1000)


@pytest.mark.parametrize("content", ["[" * 200_000, f"[{'9' * 5000}]"])
def test_json_that_no_parser_takes_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "deep.json").write_text(content)
    with pytest.raises(InputError, match=r"deep\.json is not valid JSON"):
        read_json(tmp_path / "deep.json")
    (tmp_path / "deep.yaml").write_text(content[:5000] + "]")
    with pytest.raises(InputError, match=r"deep\.yaml is not"):
        read_yaml(tmp_path / "deep.yaml", "recipe")
