"""Places are held by one process at a time, and what a killed one left half-done in them is undone."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lota import places
from lota.places import clear_leftovers, holding, working_in
from lota.storage import (
    atomic_path,
    cut,
    naming,
    read_checksums,
    refuse_foreign,
    save_tensors,
    verify_checksum,
    whole_lines,
    write_checksums,
    write_json,
)


@contextlib.contextmanager
def another_process(kind: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """One that holds the path until the block ends."""
    code = f"import sys; from lota.places import {kind} as hold\nwith hold({str(path)!r}): "
    code += "print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "hold"), [("working_in", working_in), ("holding", holding)])
def test_a_place_has_one_holder(tmp_path, kind, hold):
    place = tmp_path / "new" / "place"
    with another_process(kind, place) as process:
        with pytest.raises(ValueError, match=rf"another process \(pid {process.pid}\) is at work in {place}"):
            hold(place).__enter__()
        process.send_signal(signal.SIGKILL)
        process.wait()
        with hold(place):  # the lock ended with its process
            pass
    assert os.listdir(tmp_path) == ["new"]
    assert not any((tmp_path / "new").rglob("*.lock"))


def test_a_folder_that_stays_empty_goes_again(tmp_path):
    with working_in(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
    assert not any(tmp_path.iterdir())
    with working_in(tmp_path / "a" / "b") as folder:
        (folder / "x").touch()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["x"]


def test_a_lock_that_its_holder_removed_holds_nobody(tmp_path, monkeypatch):
    """Whoever opened the file before it was removed locks a file that nobody else sees: it tries again."""
    real, opened = os.open, []

    def slow_open(path, *more):
        handle = real(path, *more)
        if str(path).endswith(".lock") and not opened:
            opened.append(path)
            os.unlink(path)  # the last holder ends between our open and our lock
        return handle

    monkeypatch.setattr(places.os, "open", slow_open)
    with holding(tmp_path / "file"), pytest.raises(ValueError, match="is at work"):
        handle = places._acquire(tmp_path / ".file.lock", tmp_path / "file")
        os.close(handle)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(places.fcntl, "flock", flock)
    with working_in(tmp_path / "a"):
        pass
    assert "has no locks" in caplog.text


def test_leftovers_of_killed_processes_are_undone(tmp_path):
    """A folder that was moved aside comes back if nothing took its place; all else that is ours goes."""
    for name in ("lost", "kept"):
        (tmp_path / f".{name}.replaced.tmp").mkdir()
        (tmp_path / f".{name}.replaced.tmp" / "x").touch()
    (tmp_path / "kept").mkdir()
    for name in (".a.json.17.tmp", ".b.lock", "mine.tmp", ".hidden", ".mine.tmp"):
        (tmp_path / name).touch()
    clear_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"lost", "kept", "mine.tmp", ".hidden", ".mine.tmp"}
    assert (tmp_path / "lost" / "x").exists() and not any((tmp_path / "kept").iterdir())


def test_what_another_process_is_writing_is_no_leftover(tmp_path):
    with another_process("holding", tmp_path / "a.json"):
        (tmp_path / ".a.json.17.tmp").touch()
        with working_in(tmp_path):
            assert (tmp_path / ".a.json.17.tmp").exists() and (tmp_path / ".a.json.lock").exists()
    with working_in(tmp_path):
        write_json(tmp_path / "a.json", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_temporary_files_of_living_processes_stay(tmp_path):
    """Those of other machines may live; a number that another process has by now does not count as alive."""
    own = places.temporary_name(tmp_path / "a").name
    machine, pid, start = own.removeprefix(".a.").removesuffix(".tmp").split("-")
    elsewhere = f".a.{'0' * 8}-{pid}-{start}.tmp"
    dead = [f".a.{machine}-{pid}-{int(start) + 1}.tmp", f".a.{machine}-{2**22 + 1}-5.tmp"]
    for name in (own, elsewhere, *dead):
        (tmp_path / name).touch()
    clear_leftovers(tmp_path, "a", held=False)
    assert {p.name for p in tmp_path.iterdir()} == {own, elsewhere}


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_folder_is_replaced_or_stays(tmp_path, monkeypatch, fails_at):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    real, calls = os.replace, []

    def replace(*paths):
        calls.append(paths)
        if len(calls) == fails_at:
            raise OSError(errno.EIO, "Input/output error")
        real(*paths)

    monkeypatch.setattr("lota.storage.os.replace", replace)
    with pytest.raises(OSError), atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["folder", "folder/old"]


def test_errors_of_writing_name_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left.*results\.json"), naming(tmp_path / "results.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError, match="absent"), naming("results.json"):
        (tmp_path / "absent").read_text()


@pytest.mark.parametrize("lies_there", ["file", "folder", "link"])
def test_only_its_own_kind_is_replaced(tmp_path, lies_there):
    path = tmp_path / "a.pt"
    {"file": path.touch, "folder": path.mkdir, "link": lambda: path.symlink_to("nowhere")}[lies_there]()
    with pytest.raises(ValueError, match=r"out=.*a\.pt exists and is no mask file"):
        refuse_foreign("out", path, "mask file", lambda path: False)


def test_a_symbolic_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to("target")
    write_json(tmp_path / "link", 1)
    assert (tmp_path / "target").read_text() == "mine" and not (tmp_path / "link").is_symlink()


# Checksums, and files that grow


def test_checksums_find_a_flipped_bit(tmp_path):
    sums = {"a.pt": save_tensors({"x": list(range(1000))}, tmp_path / "a.pt")}
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "b").write_bytes(b"content")
    write_checksums(tmp_path, sums)
    assert set(read_checksums(tmp_path)) == {"a.pt", "inside/b"}
    verify_checksum(tmp_path / "a.pt")
    verify_checksum(tmp_path / "checksums.json")  # which is in no list
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.pt is damaged"):
        verify_checksum(tmp_path / "a.pt")


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', "[" * 100_000])
def test_a_damaged_list_of_checksums_is_named(tmp_path, text):
    (tmp_path / "checksums.json").write_text(text)
    with pytest.raises(ValueError, match=r"checksums\.json is damaged"):
        read_checksums(tmp_path)


def test_lines_end_at_newlines_alone(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes('{"a": "\u2028\u0085\x0b\r"}\n\n{"b": "ü'.encode()[:-1])
    ends, lines = zip(*whole_lines(path), strict=True)
    assert lines == ('{"a": "\u2028\u0085\x0b\r"}'.encode(), b"")
    inode = path.stat().st_ino
    cut(path, ends[-1])
    assert path.read_bytes() == b"\n".join(lines) + b"\n" and path.stat().st_ino == inode
