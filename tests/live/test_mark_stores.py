"""S3, S6: the machine's mark, with real files, folders and processes."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from xai_pool_patch.mark import Mark
from xai_pool_patch.sessions.limit import SessionLimit, SharedMarks, digest_of
from xai_pool_patch.sessions.machine import MachineStore

DIGEST = digest_of("xai-test-key")
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Not made yet."""
    return tmp_path / "marks"


@pytest.fixture
def store(folder: Path) -> MachineStore:
    return MachineStore(folder)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test machine that is busy must not look like a disk that hangs."""
    monkeypatch.setattr("xai_pool_patch.sessions.limit.TIMEOUT", 60.0)


def mark(seconds: float = 100.0, length: float = 120.0) -> Mark:
    return Mark(time.time() + seconds, length)


def close_to(wanted: Mark) -> Mark:
    return Mark(pytest.approx(wanted.until, abs=1e-3), wanted.length)


async def speaks_on(store: MachineStore) -> SessionLimit:
    """A process whose store does not work has its own mark, and no error."""
    limit = SessionLimit()
    marks = SharedMarks(DIGEST, limit, [store])
    await marks.look()
    assert not limit.is_reached
    own = limit.refused()
    assert own is not None
    await marks.publish(own)
    assert limit.is_reached
    assert limit.source == "this process"
    return limit


def operations(caplog: pytest.LogCaptureFixture) -> dict[str, str]:
    """Which operations failed, each once, and with which type of error."""
    failed = [record for record in caplog.records if record.message == "mark store failed"]
    by_operation = {r.xai_pool_operation: r.xai_pool_error.split(" ")[0] for r in failed}  # type: ignore[attr-defined]
    assert len(by_operation) == len(failed)
    return by_operation


async def test_what_is_written_is_read(store: MachineStore, folder: Path) -> None:
    """By another process too; the file is named by the digest, and the user's alone."""
    assert await store.read(DIGEST) is None
    assert not folder.exists(), "looking makes nothing"
    wanted = mark()
    await store.write(DIGEST, wanted)
    for reader in (store, MachineStore(folder)):
        assert await reader.read(DIGEST) == close_to(wanted)
        assert await reader.read(digest_of("another")) is None
    assert [path.name for path in folder.iterdir()] == [DIGEST]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / DIGEST).stat().st_mode & 0o777 == 0o600


async def test_a_newer_mark_replaces_an_older_one(store: MachineStore, folder: Path) -> None:
    """For whoever has read the older one as well."""
    reader = MachineStore(folder)
    for wanted in (mark(50.0), mark(500.0, 960.0), mark(-10.0, 240.0)):
        await store.write(DIGEST, wanted)
        assert await reader.read(DIGEST) == close_to(wanted)


async def test_a_look_is_one_stat(
    store: MachineStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content is read only when the time stamp has changed."""
    await store.write(DIGEST, mark())
    known = await store.read(DIGEST)

    def no_open(*_: object) -> int:
        raise AssertionError("opened")

    monkeypatch.setattr(os, "open", no_open)
    assert await store.read(DIGEST) == known
    os.utime(folder / DIGEST, (1, 1))
    with pytest.raises(AssertionError, match="opened"):
        await store.read(DIGEST)


def test_the_runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one; else the folder for temporary files, with the user's number."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "run").mkdir()

    async def folder_of_a_new_store() -> Path:
        await MachineStore().write(DIGEST, mark())
        [made] = tmp_path.rglob(DIGEST)
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
    await store.write(DIGEST, mark())
    before = (folder / DIGEST).read_bytes()
    folder.chmod(mode)
    await speaks_on(MachineStore(folder))
    assert operations(caplog) == {"read": "PermissionError", "write": "PermissionError"}
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [(DIGEST, before)]


async def test_a_file_that_others_can_write_to(
    store: MachineStore, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not believed, and the next mark replaces it."""
    await store.write(DIGEST, mark())
    (folder / DIGEST).chmod(0o666)
    await speaks_on(MachineStore(folder))
    assert operations(caplog) == {"read": "PermissionError"}
    assert await store.read(DIGEST) is not None


@AS_ROOT
@pytest.mark.parametrize("what", ["folder", "file"])
async def test_somebody_elses(
    store: MachineStore, folder: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever makes the folder first, in a folder that all can write to, has no say."""
    await store.write(DIGEST, mark())
    os.chown(folder if what == "folder" else folder / DIGEST, 12345, 12345)
    await speaks_on(MachineStore(folder))
    assert operations(caplog)["read"] == "PermissionError"
    assert ("write" in operations(caplog)) == (what == "folder")


async def test_a_folder_that_is_a_link(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It leads to a folder of the user's own, and is not followed."""
    real = tmp_path / "documents"
    real.mkdir(mode=0o700)
    (real / DIGEST).write_text("120.0")
    folder.symlink_to(real)
    await speaks_on(MachineStore(folder))
    assert operations(caplog) == {"read": "PermissionError", "write": "PermissionError"}
    assert [path.name for path in real.iterdir()] == [DIGEST]
    assert (real / DIGEST).read_text() == "120.0"


async def test_a_file_that_is_a_link(
    store: MachineStore, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is read through it or written through it; the next mark replaces the link."""
    await store.write(DIGEST, mark())
    victim = tmp_path / "victim"
    victim.write_text("240.0")
    (folder / DIGEST).unlink()
    (folder / DIGEST).symlink_to(victim)
    await speaks_on(MachineStore(folder))
    assert operations(caplog) == {"read": "OSError"}
    assert victim.read_text() == "240.0"
    assert not (folder / DIGEST).is_symlink()


async def test_a_pipe_in_place_of_the_file(
    store: MachineStore, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Opening one that nobody writes to must not block."""
    await store.write(DIGEST, mark())
    (folder / DIGEST).unlink()
    os.mkfifo(folder / DIGEST)
    await speaks_on(MachineStore(folder))
    assert operations(caplog) == {"read": "PermissionError"}


async def test_a_folder_in_place_of_the_file(
    store: MachineStore, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of it is removed."""
    await store.write(DIGEST, mark())
    (folder / DIGEST).unlink()
    (folder / DIGEST / "inside").mkdir(parents=True)
    await speaks_on(MachineStore(folder))
    assert operations(caplog) == {"read": "PermissionError", "write": "IsADirectoryError"}
    assert [path.name for path in folder.rglob("*")] == [DIGEST, "inside"]


async def test_a_file_in_place_of_the_folder(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The folder that was to be made cannot be."""
    folder.write_text("a file")
    await speaks_on(MachineStore(folder))
    assert operations(caplog) == {"read": "NotADirectoryError", "write": "PermissionError"}


async def test_no_folder_to_make_it_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody could leave a mark there, so that there is none means nothing."""
    await speaks_on(MachineStore(tmp_path / "missing" / "marks"))
    assert operations(caplog) == {"read": "PermissionError", "write": "FileNotFoundError"}


async def test_a_read_only_disk(caplog: pytest.LogCaptureFixture) -> None:
    """`/proc` takes no files, not even from root."""
    await speaks_on(MachineStore(Path("/proc/xai_pool_patch")))
    assert operations(caplog) == {"write": "FileNotFoundError"}


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file of this process may get a single byte."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


async def test_a_full_disk(
    store: MachineStore, folder: Path, full_disk: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing half written is left or read."""
    await speaks_on(store)
    assert operations(caplog) == {"write": "OSError"}
    assert list(folder.iterdir()) == []
    assert await store.read(DIGEST) is None


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff\x00", b"1" * 100_000, b"nan", b"-1"])
async def test_nonsense_in_the_file(
    store: MachineStore, folder: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """It marks nothing, and the next mark replaces it."""
    await store.write(DIGEST, mark())
    (folder / DIGEST).write_bytes(content)
    os.utime(folder / DIGEST, (time.time() + 60,) * 2)
    limit = await speaks_on(MachineStore(folder))
    found = await store.read(DIGEST)
    assert found is not None
    assert 100.0 < found.length < 140.0
    assert limit.seconds_left >= found.length - 5.0


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
async def test_a_clock_that_jumped_since_the_mark(store: MachineStore, jump: float) -> None:
    """The mark is that of another time: nobody is held up, and the next mark replaces it."""
    await store.write(DIGEST, mark(100.0 - jump))
    await speaks_on(store)
    found = await store.read(DIGEST)
    assert found is not None
    assert abs(found.until - time.time()) < 140.0


async def test_a_disk_that_hangs(
    store: MachineStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop goes on, the look ends, and no thread of `asyncio.to_thread` is taken."""
    await store.write(DIGEST, mark())
    released = threading.Event()
    lstat = Path.lstat

    def hang(path: Path) -> os.stat_result:
        released.wait()
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", hang)
    monkeypatch.setattr("xai_pool_patch.sessions.limit.TIMEOUT", 1.0)
    try:
        limit = SessionLimit()
        loops = [SharedMarks(DIGEST, limit, [store]) for _ in range(100)]
        looks = asyncio.gather(*(marks.look() for marks in loops))
        for _ in range(40):
            assert await asyncio.to_thread(lambda: 17) == 17
        await looks
        assert not limit.is_reached
        ours = [t for t in threading.enumerate() if t.name.startswith("xai_pool_patch")]
        assert len(ours) == 1
    finally:
        released.set()
    assert await store.read(DIGEST) is not None


PROCESS = """
import asyncio, sys
from pathlib import Path
from xai_pool_patch.sessions.limit import SessionLimit, SharedMarks
from xai_pool_patch.sessions.machine import MachineStore

async def main(folder, digest, task):
    limit = SessionLimit()
    marks = SharedMarks(digest, limit, [MachineStore(Path(folder))])
    if task == "refused":
        await marks.publish(limit.refused())
    else:
        await marks.look()
    print(limit.is_reached, limit.source, round(limit.seconds_left))

asyncio.run(main(*sys.argv[1:]))
"""


def process(folder: Path, task: str, digest: str = DIGEST) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(folder), digest, task]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return output.strip()


def test_processes_that_share_it(folder: Path) -> None:
    """One is refused, and the other hears of it, unless it has another API key or folder."""
    assert said(process(folder, "look")) == "False  0"
    assert said(process(folder, "refused")).startswith("True this process 1")
    assert said(process(folder, "look")).startswith("True machine 1")
    assert said(process(folder, "look", digest_of("another"))) == "False  0"
    assert said(process(folder.parent / "apart", "look")) == "False  0"


def test_processes_that_are_refused_at_once(folder: Path) -> None:
    """Each knows, the file is whole, and nobody has doubled."""
    for each in [process(folder, "refused") for _ in range(8)]:
        assert said(each).startswith("True ")
    assert [path.name for path in folder.iterdir()] == [DIGEST]
    found = asyncio.run(MachineStore(folder).read(DIGEST))
    assert found is not None
    assert 108.0 <= found.length <= 132.0
