"""Places are held by one process at a time, and what a killed one left half-done in them is undone."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lota import places
from lota.places import clear_leftovers, holding, working_in
from lota.storage import write_json
from scripts.fault_disk import Flushed


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
    before = handles()
    with holding(tmp_path / "file"):
        assert handles() == before + 1
        with pytest.raises(ValueError, match="is at work"):
            os.close(places._acquire(tmp_path / ".file.lock", tmp_path / "file"))


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


def test_a_leftover_in_use_hides_no_other(tmp_path):
    """Entries are looked at in the order of names: one that stays ends nothing."""
    names = [".a.txt", ".b.json.17.tmp", ".c.json.17.tmp", ".d.json.17.tmp"]
    with another_process("holding", tmp_path / "b.json"):
        for name in names:
            (tmp_path / name).touch()
        clear_leftovers(tmp_path)
        assert sorted(os.listdir(tmp_path)) == [".a.txt", ".b.json.17.tmp", ".b.json.lock"]
    (tmp_path / names[2]).touch()
    own = places.temporary_name(tmp_path / "a")
    own.touch()
    clear_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([own.name, ".a.txt"])


def test_of_one_entry_the_others_stay(tmp_path):
    for name in (".a.17.tmp", ".b.17.tmp", ".a.lock", ".b.lock"):
        (tmp_path / name).touch()
    clear_leftovers(tmp_path, "a")
    assert sorted(os.listdir(tmp_path)) == [".a.lock", ".b.17.tmp", ".b.lock"]
    with holding(tmp_path / "b"):
        assert sorted(os.listdir(tmp_path)) == [".a.lock", ".b.lock"]
    assert os.listdir(tmp_path) == [".a.lock"]
    clear_leftovers(tmp_path)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("there", [True, False])
def test_a_replaced_folder_is_left_to_its_holder(tmp_path, there):
    replaced = places.replaced_name(tmp_path / "folder")
    replaced.mkdir()
    if there:
        (tmp_path / "folder").mkdir()
    before = sorted(os.listdir(tmp_path))
    clear_leftovers(tmp_path, "folder", held=False)
    assert sorted(os.listdir(tmp_path)) == before
    with holding(tmp_path / "folder"):
        assert (tmp_path / "folder").is_dir() and not replaced.exists()


def test_what_is_held_is_held_for_all_that_this_process_does_in_it(tmp_path):
    """And not before the outer one ends."""
    with working_in(tmp_path / "run") as run:
        for _ in range(2):
            with holding(run), holding(run / "epoch-1" / "a.json"):
                assert sorted(p.name for p in tmp_path.rglob("*.lock")) == [".lock"]
    with holding(tmp_path / "a"):
        for _ in range(2):
            with holding(tmp_path / "a"), holding(tmp_path / "b"):
                assert sorted(os.listdir(tmp_path)) == [".a.lock", ".b.lock"]
    with holding(tmp_path / "a"):
        assert os.listdir(tmp_path) == [".a.lock"]  # held anew: what has ended is forgotten
    assert not os.listdir(tmp_path)


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("kind", [working_in, holding])
def test_a_lock_tells_its_holder_and_leaves_no_handle(tmp_path, kind):
    before, place = handles(), tmp_path / "place"
    lock = place / ".lock" if kind is working_in else tmp_path / ".place.lock"
    lock.parent.mkdir(exist_ok=True)
    lock.write_text("9" * 300)  # of a process that was killed
    for _ in range(3):
        with kind(place):
            assert lock.read_text() == f"{os.getpid()} {platform.node()}\n"
            told = rf"\(pid {os.getpid()}\) is at work in {place}: .*{lock}, taken on {platform.node()}"
            with pytest.raises(ValueError, match=told):
                places._acquire(lock, place)
            assert handles() == before + 1
            clear_leftovers(lock.parent)
            assert lock.exists() and handles() == before + 1
        assert not lock.exists() and handles() == before


def test_anybody_may_read_who_holds_a_place(tmp_path):
    usual = os.umask(0)
    try:
        with holding(tmp_path / "a"):
            assert (tmp_path / ".a.lock").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(usual)


def test_a_lock_without_a_name_is_waited_for(tmp_path, monkeypatch):
    """Its holder has only just begun, or only looks whether anybody is there; not for ever."""
    lock, now = tmp_path / ".a.lock", [100.0]
    handle = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    monkeypatch.setattr(places.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(places.time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    with pytest.raises(ValueError, match="is at work in"):
        holding(tmp_path / "a").__enter__()
    assert 100.4 < now[0] < 100.6
    monkeypatch.setattr(places.time, "sleep", lambda _: os.close(handle))
    with holding(tmp_path / "a"):
        pass


@pytest.fixture
def made_by_another(monkeypatch):
    """Whenever this process makes a folder, another one has made it just before."""
    real = Path.mkdir

    def late(path, *more, **options):
        os.makedirs(path, exist_ok=True)
        real(path, *more, **options)

    monkeypatch.setattr(Path, "mkdir", late)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_that_its_last_holder_removes_is_made_again(tmp_path, monkeypatch, request, at_once):
    real, left = os.open, [2]
    if at_once:
        request.getfixturevalue("made_by_another")

    def slow_open(path, *more):
        if str(path).endswith(".lock") and left[0]:
            left[0] -= 1
            os.rmdir(tmp_path / "a" / "b")
            if left[0]:
                os.rmdir(tmp_path / "a")
        return real(path, *more)

    monkeypatch.setattr(places.os, "open", slow_open)
    with working_in(tmp_path / "a" / "b") as folder:
        assert (folder / ".lock").exists() and not left[0]


def test_another_process_may_make_the_folder_first(tmp_path, made_by_another):
    with working_in(tmp_path / "a"):
        pass
    assert not (tmp_path / "a").exists()


def test_another_process_may_remove_a_lock_first(tmp_path, monkeypatch):
    lock = tmp_path / ".a.lock"
    lock.touch()
    monkeypatch.setattr(places.fcntl, "flock", lambda *_: lock.unlink())
    (tmp_path / ".a.17.tmp").touch()
    clear_leftovers(tmp_path)
    assert not os.listdir(tmp_path)


def test_a_place_is_the_same_by_any_path(tmp_path, monkeypatch):
    """Whatever the working folder becomes, and through a link."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    with working_in("link") as folder:
        assert folder == tmp_path / "real"
        monkeypatch.chdir(tmp_path.parent)
        with holding(f"{tmp_path}/link/a") as path:
            assert path == tmp_path / "real" / "a"
            assert os.listdir(tmp_path / "real") == [".lock"]
    monkeypatch.chdir(tmp_path)
    with holding("b") as path:
        monkeypatch.chdir(tmp_path / "real")
        assert path == tmp_path / "b" and (tmp_path / ".b.lock").exists()
    assert sorted(os.listdir(tmp_path)) == ["link", "real"] and not os.listdir(tmp_path / "real")


def test_a_folder_that_was_made_survives_a_power_cut_with_what_is_in_it(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    flushed, real = Flushed(tmp_path / "disk"), os.fsync
    monkeypatch.setattr(places.os, "fsync", lambda handle: (real(handle), flushed.flush(handle)))
    with working_in(tmp_path / "disk" / "a" / "b") as folder:
        write_json(folder / "x.json", 1)
    flushed.write(tmp_path / "after")
    assert (tmp_path / "after" / "a" / "b" / "x.json").read_text() == "1\n"


def test_an_error_of_a_lock_is_no_holder(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    before = handles()
    monkeypatch.setattr(places.fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output"):
        holding(tmp_path / "a").__enter__()
    assert handles() == before
    (tmp_path / ".a.lock").touch()
    assert places._is_held(tmp_path / ".a.lock")  # nobody knows: it stays
    monkeypatch.setattr(places, "_NO_LOCKS", (errno.EIO,))
    assert not places._is_held(tmp_path / ".a.lock")
    assert not places._is_held(tmp_path / ".b.lock") and handles() == before


# Processes and machines


def test_a_process_is_known_by_its_start(monkeypatch):
    """Numbers are given again: the start, in clock ticks, tells processes apart."""
    with subprocess.Popen(["sleep", "60"]) as process:
        (pid, start), (own, began) = (places._process(p).split("-") for p in (process.pid, os.getpid()))
        memory = bytearray(50_000_000)
        assert places._process(os.getpid()) == f"{own}-{began}" and len(memory)
        assert (int(pid), int(own)) == (process.pid, os.getpid()) and int(start) > int(began) > 0
        process.kill()
    assert places._process(process.pid) is None


@pytest.mark.parametrize(
    ("error", "lives"), [(None, True), (PermissionError, True), (ProcessLookupError, False)]
)
def test_without_proc_a_number_is_all_there_is(monkeypatch, error, lives):
    asked = []

    def kill(pid, number):
        asked.append((pid, number))
        if error:
            raise error

    def absent(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(places.os, "kill", kill)
    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert places._process(17) == ("17-0" if lives else None) and asked == [(17, 0)]


def test_machines_differ_by_name_by_space_of_numbers_and_by_id(tmp_path, monkeypatch):
    """Containers share a name or an id; what a living one writes must not look like ours."""
    node, space = platform.node(), ["pid:[1]"]
    identity = tmp_path / "machine-id"
    real = Path

    def made(path):
        return {"/etc/machine-id": identity, "/proc/self/ns/pid": tmp_path / "space"}.get(path, real(path))

    def machine() -> str:
        (tmp_path / "space").unlink(missing_ok=True)
        if space:
            (tmp_path / "space").symlink_to(space[0])
        places._machine.cache_clear()
        return places._machine()

    monkeypatch.setattr(places, "Path", made)
    found = [machine()]
    assert machine() == found[0] and re.fullmatch("[0-9a-f]{8}", found[0])
    identity.write_text("one")
    found.append(machine())
    identity.write_text("two")
    found.append(machine())
    space[0] = "pid:[2]"
    found.append(machine())
    space.clear()
    found.append(machine())
    monkeypatch.setattr(places.platform, "node", lambda: f"{node}x")
    found.append(machine())
    assert len(set(found)) == len(found)
    monkeypatch.undo()
    places._machine.cache_clear()


# Disk


def test_files_and_folders_are_flushed(tmp_path, monkeypatch):
    before, flushed = handles(), []
    monkeypatch.setattr(places.os, "fsync", lambda h: flushed.append(os.readlink(f"/proc/self/fd/{h}")))
    (tmp_path / "a").touch()
    places.fsync(tmp_path / "a")
    places.fsync(tmp_path)
    assert flushed == [str(tmp_path / "a"), str(tmp_path)] and handles() == before


@pytest.mark.parametrize(
    ("number", "of", "told"),
    [(errno.EINVAL, "folder", False), (errno.EIO, "folder", True), (errno.EINVAL, "file", True)],
)
def test_a_file_system_that_does_not_flush_folders_is_taken(tmp_path, monkeypatch, number, of, told):
    def fail(_):
        raise OSError(number, "no")

    before, path = handles(), tmp_path if of == "folder" else tmp_path / "file"
    (tmp_path / "file").touch()
    monkeypatch.setattr(places.os, "fsync", fail)
    with pytest.raises(OSError) if told else contextlib.nullcontext():
        places.fsync(path)
    assert handles() == before


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "folder" / "in").mkdir(parents=True)
    (tmp_path / "folder" / "in" / "x").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("link", "absent"):
        places.remove(tmp_path / name)
    assert os.listdir(tmp_path) == ["folder"] and (tmp_path / "folder" / "in" / "x").exists()
    places.remove(tmp_path / "folder" / "in" / "x")
    places.remove(tmp_path / "folder")
    assert not os.listdir(tmp_path)
