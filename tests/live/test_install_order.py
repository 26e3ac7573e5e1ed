"""A1, A5: `install()` before, during and after the plugin's import, in processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit import python
from xai_pool_patch.plugin import releases


def test_install_before_the_import_without_metadata() -> None:
    """The version is in the files, too."""
    done = python(
        "import importlib.metadata as metadata\n"
        "version_of = metadata.version\n"
        "def version(name):\n"
        "    if name.startswith('livekit-'):\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return version_of(name)\n"
        "metadata.version = version\n"
        "import xai_pool_patch\n"
        "xai_pool_patch.install()\n"
        "from livekit.plugins import xai\n"
        "assert hasattr(xai.TTS.aclose, '__wrapped__'), 'not patched'\n"
    )
    assert done.returncode == 0, done.stderr


IN_AN_IMPORT = """
import importlib.machinery, sys, threading, types
import xai_pool_patch

STAGE, WHO = sys.argv[1:]

def meanwhile():
    if WHO == "the importing thread":
        xai_pool_patch.install()
        return
    other = threading.Thread(target=xai_pool_patch.install)
    other.start()
    other.join(20.0)
    assert not other.is_alive(), "it waits for the import, which waits for it"

class Finder:
    def find_spec(self, name, path, target=None):
        if name != f"livekit.plugins.xai.{'types' if STAGE == 'near' else 'tts'}":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def create_module(spec):
            if STAGE in ("near", "found"):
                meanwhile()

        def exec_module(module):
            if STAGE == "begun":
                meanwhile()
            run(module)
            if STAGE == "run":
                meanwhile()

        spec.loader.create_module, spec.loader.exec_module = create_module, exec_module
        return spec

sys.meta_path.insert(0, Finder())
from livekit.agents import AgentSession
from livekit.plugins import xai
assert xai_pool_patch.is_installed()
assert hasattr(xai.TTS.aclose, "__wrapped__"), "not patched"
assert not hasattr(xai.TTS.aclose.__wrapped__, "__wrapped__"), "patched twice"
xai_pool_patch.uninstall()
assert not hasattr(xai.TTS.aclose, "__wrapped__"), "not undone"
assert type(xai) is types.ModuleType
xai_pool_patch.install()
assert hasattr(xai.TTS.aclose, "__wrapped__")
"""


@pytest.mark.parametrize(
    ("stage", "who"),
    [
        ("near", "the importing thread"),
        ("begun", "the importing thread"),
        ("found", "another thread"),
        ("begun", "another thread"),
        ("run", "another thread"),
    ],
)
def test_install_during_the_import_patches_at_its_end(stage: str, who: str) -> None:
    """A1: install() neither waits for the import nor begins another one."""
    done = python(IN_AN_IMPORT, stage, who)
    assert (done.returncode, done.stderr) == (0, "")


def test_uninstall_before_the_import_leaves_the_plugin_alone() -> None:
    """A1: the installation that was undone has no late effect."""
    done = python(
        "import xai_pool_patch\n"
        "xai_pool_patch.install()\n"
        "xai_pool_patch.uninstall()\n"
        "from livekit.plugins import xai\n"
        "assert not hasattr(xai.TTS.aclose, '__wrapped__')\n"
        "xai_pool_patch.install()\n"
        "assert hasattr(xai.TTS.aclose, '__wrapped__')\n"
    )
    assert done.returncode == 0, done.stderr


ORDERS = ["install() first", "the import first"]
IN_THIS_ORDER = """
import logging, sys, xai_pool_patch
logging.basicConfig(format="%(name)s %(levelname)s %(message)s %(xai_pool_reason)s")

def install():
    try:
        xai_pool_patch.install()
    except xai_pool_patch.UnsupportedPluginError as refusal:
        print(refusal)
        xai_pool_patch.install(on_unsupported="skip")

if sys.argv[1] == "install() first":
    install()
from livekit.plugins import xai
if sys.argv[1] == "the import first":
    install()
print(hasattr(xai.TTS.aclose, "__wrapped__"), xai_pool_patch.is_installed())
"""


def copy_of(package: str, folder: Path, *, version: str | None = None) -> Path:
    """A copy of a package of LiveKit's that is found before the installed one."""
    copy = folder / package.replace(".", "/")
    [source] = __import__(package, fromlist=["__path__"]).__path__
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "resources"))
    distribution = {"livekit.agents": "livekit_agents"}.get(package, "livekit_plugins_xai")
    if version is not None:
        info = folder / f"{distribution}-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata)
    return copy


def edit(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def in_order(order: str, folder: Path) -> tuple[list[str], list[str]]:
    """What is printed, and what is logged."""
    paths = [str(folder), *filter(None, sys.path)]
    done = python(IN_THIS_ORDER, order, PYTHONPATH=os.pathsep.join(paths))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


@pytest.fixture(params=["edited plugin", "unverified plugin", "other livekit-agents"])
def unsupported(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """Files that the patch refuses, and what it says of them."""
    if request.param == "edited plugin":
        copy = copy_of("livekit.plugins.xai", tmp_path)
        edit(copy / "tts.py", "def _close_ws(self", "def _close_it(self")
        return tmp_path, "TTS._close_ws is missing"
    if request.param == "unverified plugin":
        copy_of("livekit.plugins.xai", tmp_path, version="1.8.99")
        return tmp_path, f"found livekit-plugins-xai 1.8.99; verified are {releases.SUPPORTED}"
    copy = copy_of("livekit.agents", tmp_path, version="1.8.99")
    edit(copy / "tts/tts.py", "self._acquire_time: float = 0.0", "pass")
    return tmp_path, "ChunkedStream.__init__ does not use _acquire_time"


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_refused_is_refused_in_either_order(
    order: str, unsupported: tuple[Path, str]
) -> None:
    """A5: install() raises the same error, whether or not the plugin is imported yet. Told to skip,
    it logs one warning, and the plugin can be imported."""
    folder, reason = unsupported
    [refusal, is_patched], [logged] = in_order(order, folder)
    assert reason in refusal
    assert is_patched == "False False"
    assert logged.startswith("xai_pool_patch WARNING plugin not supported")
    assert reason in logged


@pytest.mark.parametrize("order", ORDERS)
def test_a_newer_livekit_agents_beside_a_pinned_plugin(order: str, tmp_path: Path) -> None:
    """A5: the patch is installed in either order."""
    copy_of("livekit.agents", tmp_path, version="1.99.0")
    assert in_order(order, tmp_path)[0] == ["True True"]


@pytest.mark.parametrize(("on_unsupported", "level"), [("raise", "ERROR"), ("skip", "WARNING")])
def test_a_plugin_that_changes_at_its_import_can_still_be_imported(
    on_unsupported: str, level: str
) -> None:
    """What no file shows. The agent runs; the log says why the patch does not."""
    done = python(
        "import logging, xai_pool_patch, xai_pool_patch.plugin.releases as plugin\n"
        "logging.basicConfig(format='%(name)s %(levelname)s %(message)s %(xai_pool_reason)s')\n"
        f"xai_pool_patch.install(on_unsupported={on_unsupported!r})\n"
        "missing = plugin.Method.of('TTS.missing')\n"
        "plugin._METHODS.update(dict.fromkeys(plugin.Shape, [missing]))\n"
        "from livekit.plugins import xai\n"
        "assert not hasattr(xai.TTS.aclose, '__wrapped__')\n"
        "assert not xai_pool_patch.is_installed()\n"
    )
    assert done.returncode == 0, done.stderr
    assert f"xai_pool_patch {level} plugin not supported" in done.stderr
    assert "TTS.missing is missing" in done.stderr


AGENT = """
import asyncio, multiprocessing, sys
import xai_pool_patch
xai_pool_patch.install()
from tests.kit import line_to, speak

async def turns():
    async with line_to() as line:
        tts = line.tts()
        await speak(tts, "One.")
        await speak(tts, "Two.")
        await tts.aclose()
        return [metric.connection_reused for metric in line.metrics]

def job(results):
    results.put((xai_pool_patch.is_installed(), asyncio.run(turns()), xai_pool_patch.stats()))

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    results = context.Queue()
    process = context.Process(target=job, args=(results,))
    process.start()
    is_installed, reused, stats = results.get(timeout=40)
    process.join()
    assert (is_installed, reused) == (True, [False, True]), (is_installed, reused)
    assert stats["connections_reused"] == 1, stats
    assert xai_pool_patch.stats()["connections_made"] == 0
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_worker_processes_install_through_the_agents_module(method: str, tmp_path: Path) -> None:
    """A1: the process of a job imports that module anew, and so calls install()."""
    agent = tmp_path / "agent.py"
    agent.write_text(AGENT)
    done = subprocess.run(
        [sys.executable, str(agent), method],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
