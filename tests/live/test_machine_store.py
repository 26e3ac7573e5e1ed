"""S3, S3b: the machine's file, with real files, folders and processes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.kit import event_of
from tests.live.forks import fork_that_reads
from tests.unit.pool_kit import no_fault
from xai_pool_patch.pool.supervisor import Supervisor
from xai_pool_patch.sessions import Store
from xai_pool_patch.sessions.machine import MachineStore
from xai_pool_patch.sessions.shortage import Shortage
from xai_pool_patch.sessions.watch import ShortageWatch

HOST = "api.x.ai"
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Not made yet."""
    return tmp_path / "shortages"


@pytest.fixture
def store(folder: Path) -> MachineStore:
    return MachineStore(folder)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test machine that is busy must not look like a disk that hangs."""
    monkeypatch.setattr("xai_pool_patch.sessions.watch.TIMEOUT", 60.0)


def in_seconds(seconds: float = 100.0) -> float:
    return time.time() + seconds


@contextlib.asynccontextmanager
async def watching(store: Store) -> AsyncIterator[ShortageWatch]:
    """One whose first look has ended."""
    watch = ShortageWatch(
        Shortage(HOST),
        store,
        supervisor=Supervisor(no_fault),
        on_change=lambda: None,
        wants_to_know=lambda: True,
    )
    watch.begin()
    assert watch._look is not None
    await watch._look
    try:
        yield watch
    finally:
        watch.end()
        await asyncio.wait([watch._look])


async def is_lean(store: Store) -> bool:
    """Whether a process with that store is, though nobody was refused."""
    async with watching(store) as watch:
        assert not watch.shortage.is_on
        return watch.is_lean


def failed(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Which operations failed, and with which type of error. Each process logs that once."""
    return [
        f"{r.xai_pool_operation}: {r.xai_pool_error.split(' ')[0]}"  # type: ignore[attr-defined]
        for r in caplog.records
        if event_of(r) == "session store failed"
    ]


async def test_what_is_written_is_read(store: MachineStore, folder: Path) -> None:
    """By another process too, for that host alone; folder and file are the user's alone."""
    assert await store.read(HOST) is None
    assert not folder.exists(), "looking makes nothing"
    wanted = in_seconds()
    await store.write(HOST, wanted)
    for reader in (store, MachineStore(folder)):
        assert await reader.read(HOST) == pytest.approx(wanted, abs=1e-3)
        assert await reader.read("another.host") is None
    assert [path.name for path in folder.iterdir()] == [HOST]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / HOST).stat().st_mode & 0o777 == 0o600


async def test_a_later_end_replaces_an_earlier_one(store: MachineStore, folder: Path) -> None:
    """For whoever has read the earlier one as well."""
    reader = MachineStore(folder)
    for wanted in (in_seconds(50.0), in_seconds(500.0), in_seconds(-10.0)):
        await store.write(HOST, wanted)
        assert await reader.read(HOST) == pytest.approx(wanted, abs=1e-3)
    assert len(list(folder.iterdir())) == 1


async def test_a_probe_leaves_nothing(store: MachineStore, folder: Path) -> None:
    """But the folder, and no file open."""
    await store.probe(HOST)
    open_files = len(list(Path("/dev/fd").iterdir()))
    for _ in range(10):
        await store.probe(HOST)
    assert len(list(Path("/dev/fd").iterdir())) == open_files
    assert list(folder.iterdir()) == []
    wanted = in_seconds()
    await store.write(HOST, wanted)
    await store.probe(HOST)
    assert await store.read(HOST) == pytest.approx(wanted, abs=1e-3)
    assert [path.name for path in folder.iterdir()] == [HOST]


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("127.0.0.1:8080", "127.0.0.1_8080"),
        ("[::1]:80", "___1__80"),
        ("../../etc/passwd", ".._.._etc_passwd"),
        ("münchen.example\x00", "m_nchen.example_"),
        ("x" * 500, "x" * 100),
    ],
)
async def test_hosts_that_are_no_names_of_files(
    store: MachineStore, folder: Path, host: str, name: str
) -> None:
    """They stay in the folder."""
    await store.write(host, in_seconds())
    assert await store.read(host) is not None
    assert [path.name for path in folder.iterdir()] == [name]


async def test_a_look_opens_nothing(
    store: MachineStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for two time stamps."""
    await store.write(HOST, in_seconds())

    def no_open(*_: object) -> int:
        raise AssertionError("opened")

    monkeypatch.setattr(os, "open", no_open)
    assert await store.read(HOST) is not None


def test_the_runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one; else the folder for temporary files, with the user's number."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "run").mkdir()

    async def folder_of_a_new_store() -> Path:
        await MachineStore().write(HOST, in_seconds())
        [made] = tmp_path.rglob(HOST)
        made.unlink()
        return made.parent.relative_to(tmp_path)

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    assert asyncio.run(folder_of_a_new_store()) == Path("run/xai_pool_patch")
    for unusable in ("", str(tmp_path / "missing")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", unusable)
        expected = Path(f"tmp/xai_pool_patch-{os.getuid()}")
        assert asyncio.run(folder_of_a_new_store()) == expected


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
async def test_a_folder_that_others_can_write_to(
    store: MachineStore, folder: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not used, in either direction."""
    await store.write(HOST, in_seconds())
    before = (folder / HOST).stat().st_mtime
    folder.chmod(mode)
    assert await is_lean(MachineStore(folder))
    assert failed(caplog) == ["read: PermissionError"]
    with pytest.raises(PermissionError):
        await store.write(HOST, in_seconds(200.0))
    with pytest.raises(PermissionError):
        await store.probe(HOST)
    assert [(p.name, p.stat().st_mtime) for p in folder.iterdir()] == [(HOST, before)]


async def test_a_file_that_others_can_write_to(
    store: MachineStore, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not believed, and the next one replaces it."""
    await store.write(HOST, in_seconds())
    (folder / HOST).chmod(0o666)
    assert await is_lean(MachineStore(folder))
    assert failed(caplog) == ["read: PermissionError"]
    await store.write(HOST, in_seconds(-10.0))
    assert not await is_lean(MachineStore(folder))


@AS_ROOT
@pytest.mark.parametrize("what", ["folder", "file"])
async def test_somebody_elses(
    store: MachineStore, folder: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever makes the folder first, in a folder that all can write to, has no say."""
    await store.write(HOST, in_seconds())
    os.chown(folder if what == "folder" else folder / HOST, 12345, 12345)
    assert await is_lean(MachineStore(folder))
    assert failed(caplog) == ["read: PermissionError"]
    if what == "folder":
        with pytest.raises(PermissionError):
            await store.write(HOST, in_seconds())


async def test_a_folder_that_is_a_link(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It leads to a folder of the user's own, and is not followed."""
    real = tmp_path / "documents"
    real.mkdir(mode=0o700)
    (real / HOST).touch()
    os.utime(real / HOST, (1, 1))
    folder.symlink_to(real)
    assert await is_lean(MachineStore(folder))
    assert failed(caplog) == ["read: PermissionError"]
    with pytest.raises(PermissionError):
        await MachineStore(folder).write(HOST, in_seconds())
    assert [(p.name, p.stat().st_mtime) for p in real.iterdir()] == [(HOST, 1)]


async def test_a_file_that_is_a_link(
    store: MachineStore, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is read through it or written through it; the next end replaces the link."""
    victim = tmp_path / "victim"
    victim.write_text("240.0")
    os.utime(victim, (1, 1))
    folder.mkdir(mode=0o700)
    (folder / HOST).symlink_to(victim)
    assert await is_lean(MachineStore(folder))
    assert failed(caplog) == ["read: PermissionError"]
    await store.write(HOST, in_seconds())
    assert (victim.read_text(), victim.stat().st_mtime) == ("240.0", 1)
    assert not (folder / HOST).is_symlink()


async def test_a_pipe_in_place_of_the_file(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing blocks."""
    folder.mkdir(mode=0o700)
    os.mkfifo(folder / HOST)
    assert await is_lean(MachineStore(folder))
    assert failed(caplog) == ["read: PermissionError"]


async def test_a_folder_in_place_of_the_file(
    store: MachineStore, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of it is removed, and nothing is left beside it."""
    folder.mkdir(mode=0o700)
    (folder / HOST / "inside").mkdir(parents=True)
    assert await is_lean(MachineStore(folder))
    assert failed(caplog) == ["read: PermissionError"]
    with pytest.raises(IsADirectoryError):
        await store.write(HOST, in_seconds())
    assert [path.name for path in folder.rglob("*")] == [HOST, "inside"]


async def test_a_file_in_place_of_the_folder(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The folder that was to be made cannot be."""
    folder.write_text("a file")
    assert await is_lean(MachineStore(folder))
    assert failed(caplog) == ["read: PermissionError"]


async def test_no_folder_to_make_it_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody could write there, so that there is nothing means nothing."""
    assert await is_lean(MachineStore(tmp_path / "missing" / "shortages"))
    assert failed(caplog) == ["write: FileNotFoundError"]


async def test_a_read_only_disk(caplog: pytest.LogCaptureFixture) -> None:
    """`/proc` takes no files, not even from root."""
    assert await is_lean(MachineStore(Path("/proc/xai_pool_patch")))
    assert failed(caplog) == ["write: FileNotFoundError"]


async def test_no_inode_left(
    store: MachineStore,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is there can be read, and a new file cannot be made."""
    await store.write(HOST, in_seconds(-300.0))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkstemp", full)
    assert await is_lean(MachineStore(folder))
    assert failed(caplog) == ["write: OSError"]


async def test_a_write_that_fails_in_the_middle(
    store: MachineStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left."""

    def broken(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "utime", broken)
    with pytest.raises(OSError, match=r"^$"):
        await store.write(HOST, in_seconds())
    assert list(folder.iterdir()) == []


async def test_a_folder_that_was_swept_away(store: MachineStore, folder: Path) -> None:
    """As temporary files are after some days: the next write makes it again."""
    await store.write(HOST, in_seconds())
    (folder / HOST).unlink()
    folder.rmdir()
    assert await store.read(HOST) is None
    await store.write(HOST, in_seconds())
    assert await store.read(HOST) is not None


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
async def test_a_clock_that_jumped_since(store: MachineStore, folder: Path, jump: float) -> None:
    """That end is of another time: nobody is held up, and the next one replaces it."""
    await store.write(HOST, in_seconds(100.0 - jump))
    async with watching(MachineStore(folder)) as watch:
        assert not watch.is_lean
        watch.refused(429)
        assert watch._look is not None
        await watch._look
    found = await store.read(HOST)
    assert found is not None
    assert 100.0 < found - time.time() < 140.0


async def test_a_disk_that_hangs(
    store: MachineStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop goes on, the looks end, and no thread of `asyncio.to_thread` is taken."""
    await store.write(HOST, in_seconds())
    before = set(threading.enumerate())
    released = threading.Event()
    lstat = Path.lstat

    def hang(path: Path) -> os.stat_result:
        released.wait()
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", hang)
    monkeypatch.setattr("xai_pool_patch.sessions.watch.TIMEOUT", 1.0)
    try:
        looks = asyncio.gather(*(is_lean(store) for _ in range(100)))
        for _ in range(40):
            assert await asyncio.to_thread(lambda: 17) == 17
        assert set(await looks) == {True}
        new = set(threading.enumerate()) - before
        assert [t for t in new if t.name.startswith("xai_pool_patch")] == []
    finally:
        released.set()
    assert await store.read(HOST) is not None


@pytest.mark.real_time
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
async def test_a_process_that_was_forked(store: MachineStore) -> None:
    """It has a thread of its own, and goes its own ways by chance."""
    wanted = in_seconds()
    await store.write(HOST, wanted)
    child = fork_that_reads(store, HOST)
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


PROCESS = """
import asyncio, sys
from pathlib import Path
from xai_pool_patch.pool.supervisor import Supervisor
from xai_pool_patch.sessions.machine import MachineStore
from xai_pool_patch.sessions.shortage import Shortage
from xai_pool_patch.sessions.watch import ShortageWatch

async def main(folder, host, task):
    shortage = Shortage(host)
    watch = ShortageWatch(shortage, MachineStore(Path(folder)), supervisor=Supervisor(print),
        on_change=lambda: None, wants_to_know=lambda: True)
    if task == "refused":
        watch.refused(429)
    else:
        watch.begin()
    await watch._look
    print(shortage.is_on, watch.is_lean, "to this process" in shortage.reason)
    watch.end()

asyncio.run(main(*sys.argv[1:]))
"""


def process(folder: Path, task: str, host: str = HOST) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(folder), host, task]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return output.strip()


def test_processes_that_share_it(folder: Path) -> None:
    """One is refused, and the other hears of it, unless it talks to another host or folder."""
    assert said(process(folder, "look")) == "False False False"
    assert said(process(folder, "refused")) == "True True True"
    assert said(process(folder, "look")) == "True True False"
    assert said(process(folder, "look", "another.host")) == "False False False"
    assert said(process(folder.parent / "apart", "look")) == "False False False"


def test_processes_that_are_refused_at_once(folder: Path) -> None:
    """Each knows, and the file is whole."""
    for each in [process(folder, "refused") for _ in range(8)]:
        assert said(each).startswith("True ")
    assert [path.name for path in folder.iterdir()] == [HOST]
    found = asyncio.run(MachineStore(folder).read(HOST))
    assert found is not None
    assert 90.0 <= found - time.time() <= 132.0
