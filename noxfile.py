"""What there is to run: `nox -l`. Each session does all of its own set-up."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import subprocess
import tarfile
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["tests", "lint", "types"]
nox.options.default_venv_backend = "venv"

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
# What has to hold in gVisor as well, and can be judged there.
IN_GVISOR = [
    "tests/commands/test_demo.py::test_demo_measures_every_way_out_and_anyio_rst_tells_the_truth",
    "tests/endings/test_rules.py",
    "tests/endings/test_process_death.py",
    "tests/tls/test_tls_endings.py",
    "tests/endings/test_task_group.py",
    "tests/endings/test_drain.py",
    "tests/platforms/test_platforms.py",
]
# What cannot hold over MPTCP, by what that itself loses: docs/platforms.md.
NOT_OVER_MPTCP = {
    "an RST is lost, or both directions stand still, at a small receive buffer": [
        "tests/adapters/test_frameworks.py::test_slow_reader_gets_all_of_it",
        "tests/adapters/test_lowlevel.py::test_unacknowledged",
        "tests/adapters/test_trio_streams.py::test_stream_passes_the_conformance_kit",
        "tests/adapters/test_trio_streams.py::test_tls_stream_passes_the_conformance_kit",
        "tests/commands/test_demo.py::test_ctrl_c_is_one_line_and_status_130",
        "tests/commands/test_demo.py::test_demo_measures_every_way_out",
        "tests/connections/test_conformance.py::test_native_connection_passes",
        "tests/connections/test_idle.py::test_a_send_that_idle_cuts_is_torn",
        "tests/endings/test_drain.py::test_peer_that_only_sends_makes_no_progress",
        "tests/endings/test_drain.py::test_what_a_closed_window_holds_back",
        "tests/endings/test_process_death.py::test_death_delivers_what_was_earned",
        "tests/kit/test_rst_proxy.py::test_cut_of_what_waits_for_a_client_that_does_not",
        "tests/kit/test_rst_proxy.py::test_reset_of_a_client_that_never_reads_comes_in",
        "tests/kit/test_testing.py::test_closed_window_makes_a_send_wait",
        "tests/kit/test_testing.py::test_exception_of_finish_on_behind_a_torn_send",
        "tests/pages/test_push.py::test_client_that_takes_nothing_for_too_long",
        "tests/pages/test_push.py::test_slow_client_is_reset",
        "tests/platforms/test_odd_networks.py::test_an_answer_that_was_cut_short",
        "tests/server/test_limits.py::test_time_is_up_in_the_middle_of_an_answer",
    ],
    "a socket that has been closed answers nothing by an RST": [
        "tests/endings/test_drain.py::test_answer_would_be_lost_without_a_drain",
        "tests/endings/test_drain.py::test_flood_ends_at_max_bytes",
        "tests/endings/test_drain.py::test_flood_ends_at_the_timeout",
        "tests/endings/test_drain.py::test_no_drain_closes_right_after_the_fin",
        "tests/endings/test_drain.py::test_trickle_does_not_start_the_timeout_again",
        "tests/platforms/test_odd_networks.py::test_a_lost_reset_is_told_again",
        "examples/test_line_protocol.py::test_client_that_takes_no_answers",
        "tests/kit/test_rst_proxy.py::test_client_that_reads_late_gets_all_before_the_cut",
    ],
    "an RST is told behind a FIN, a moment later, and with less of the input": [
        "tests/adapters/test_frameworks.py::test_armed_listening_socket_is_no_help",
        "tests/adapters/test_httpx.py::test_stale_connection_is_found_before",
        "tests/adapters/test_pool.py::test_stale_connection_is_not_used",
        "tests/commands/test_probe.py::test_end_before_the_connect_has_returned",
        "tests/commands/test_probe.py::test_ends[reset",
        "tests/commands/test_probe.py::test_ends_of_tls",
        "tests/commands/test_probe.py::test_what_arrived_before_a_reset_that_a_send",
        "tests/connections/test_connection.py::test_send_eof_to_a_peer_that_reset",
        "tests/connections/test_takeover.py::test_listener_survives_many_clients_that",
        "tests/connections/test_takeover.py::test_stream_that_is_half_closed_behind_the_scope",
        "tests/connections/test_takeover.py::test_stream_that_was_half_closed_before",
        "tests/endings/test_cancellation.py::test_half_close_and_a_last_word",
        "tests/endings/test_forking.py::test_child_has_no_copy_of_what_speaks_tls",
        "tests/endings/test_interruptions.py::test_exit_that_is_interrupted_anywhere",
        "tests/endings/test_model.py",
        "tests/pages/test_docs.py::test_how_twisted_tells_of_a_client_s_end",
        "tests/server/test_behind_haproxy.py::test_connection_without_a_word_is_quiet",
    ],
    "its segments are those of its subflows, whose FINs follow": [
        "tests/commands/test_watch.py",
        "tests/kit/test_testing.py::test_capture_has_each_segment_once",
        "tests/pages/test_ladders.py",
        "tests/project/test_soak.py",
        "tests/tls/test_tls.py::test_close_notify_to_a_peer_that_has_closed_goes_out",
    ],
    "it lacks the option, or the address": [
        "tests/adapters/test_lowlevel.py::test_set_keepalive",
        "tests/adapters/test_pool.py::test_request_that_was_never_read_is_acknowledged",
        "tests/adapters/test_pool.py::test_request_that_was_read_may_be_unacknowledged",
        "tests/connections/test_interference.py::test_corked_answer_is_sent",
        "tests/connections/test_interference.py::test_socket_options_cost_no_time",
        "tests/connections/test_interference.py::test_socket_options_hide_no_reset",
        "tests/connections/test_interference.py::test_urgent_mark_is_no_end",
        "tests/endings/test_drain.py::test_drain_that_is_cut_short_discards_first",
        "tests/platforms/test_odd_networks.py::test_a_fin_after_the_handshake_has_left",
        "tests/platforms/test_odd_networks.py::test_a_fin_waits_for_the_handshake",
        "tests/platforms/test_odd_networks.py::test_a_reset_in_the_handshake",
        "tests/platforms/test_odd_networks.py::test_a_return_in_the_handshake",
        "tests/platforms/test_odd_networks.py::test_link_local_addresses",
        "tests/platforms/test_platforms.py::test_epipe_that_hides_why_is_asked_for_it",
        "tests/platforms/test_platforms.py::test_kernel_is_asked_once_whether_it_passes",
        "tests/server/test_keepalive.py",
    ],
    "it compares MPTCP with TCP by itself": ["tests/platforms/test_mptcp.py"],
}
# The oldest that the dependencies of pyproject.toml admit.
OLDEST = [
    "anyio==4.16.0",
    "outcome==1.2.0",
    "trio==0.32.0",
    "httpx==0.25.1",
    "httpcore==1.0.3",
    "pytest==8.3.5",
]


def group(name: str) -> tuple[str, ...]:
    return nox.project.dependency_groups(PYPROJECT, name)


def run_tests(session: nox.Session, *pins: str, **env: str) -> None:
    session.install("-e", ".", *group("test"), *pins)
    # Much of it is waiting, for processes to start above all.
    workers = ["-n", "6"]
    # Several hundred processes import the package.
    compiled = {"PYTHONDONTWRITEBYTECODE": ""}
    session.run("pytest", *workers, *session.posargs, env=compiled | env)


@nox.session
def demo(session: nox.Session) -> None:
    """Show on real sockets what plain AnyIO and anyio_rst tell the other side."""
    session.install(".[trio,uvloop]")
    session.run("python", "-m", "anyio_rst", "demo", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Compare the server with others: what they cost, and how they end."""
    session.install(".[trio,uvloop]", *group("bench"))
    session.run("python", "-m", "evidence.bench", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Match what both sides of 600,000 connections saw; `-- --short`: five minutes."""
    session.install(".[trio,uvloop]", *group("soak"))
    session.run("python", "-m", "evidence.soak", *session.posargs)


@nox.session
def interop(session: nox.Session) -> None:
    """Measure who notices a cut, and what becomes of a reset in nginx and HAProxy."""
    session.install(".", *group("interop"))
    session.run("python", "-m", "evidence.interop", *session.posargs)


@nox.session
def sandbox(session: nox.Session) -> None:
    """Run the demo and the tests of endings in gVisor; exit status 77: it cannot run."""
    session.install("-e", ".", *group("test"))
    gvisor = sandbox_command(session)
    # Nothing is written but in the sandbox, which has a loopback of its own.
    pytest = [
        "pytest",
        "-n",
        "4",
        "-p",
        "no:cacheprovider",
        *(session.posargs or IN_GVISOR),
    ]
    session.run(*gvisor, "python", "-m", *pytest, external=True)


def sandbox_command(session: nox.Session) -> list[str]:
    """What runs a command in gVisor, and ends it at last."""
    need_program(session, "runsc")
    for platform in ("systrap", "ptrace"):  # of new ones, and of all
        runsc = ["timeout", "--kill-after=10", "900", "runsc", "--rootless"]
        runsc += ["--network=none", "--ignore-cgroups", f"--platform={platform}"]
        tried = subprocess.run([*runsc, "do", "true"], capture_output=True, check=False)
        if tried.returncode == 0:
            return [*runsc, "do", "-quiet"]
    last_words = tried.stderr.decode().splitlines()[-1:]
    raise cannot_run(session, f"runsc does not run: {last_words}")


@nox.session
def mptcp(session: nox.Session) -> None:
    """Run the demo and the test suite over MPTCP; exit status 77: it cannot run."""
    need_program(session, "mptcpize")
    try:
        socket.socket(proto=262).close()  # socket.IPPROTO_MPTCP
    except OSError as exc:
        raise cannot_run(session, f"this kernel has no MPTCP ({exc})") from exc
    session.install("-e", ".", *group("test"))
    python = ["mptcpize", "run", "python", "-m"]
    # 3: it has found what MPTCP loses at a small receive buffer.
    session.run(*python, "anyio_rst", "demo", external=True, success_codes=[0, 3])
    without: list[str] = []
    for name in itertools.chain.from_iterable(NOT_OVER_MPTCP.values()):
        without += ["--deselect" if "::" in name else "--ignore", name]
    session.run(*python, "pytest", "-n", "4", *without, *session.posargs, external=True)


def need_program(session: nox.Session, name: str) -> None:
    """Install the Debian package of that name if the program is missing."""
    if shutil.which(name) is None and shutil.which("apt-get") and os.getuid() == 0:
        install = ["install", "-qy", "--no-install-recommends", name]
        for command in (["update", "-q"], install):
            session.run("apt-get", *command, external=True, success_codes=range(256))
    if shutil.which(name) is None:
        raise cannot_run(
            session, f"there is no {name}, and apt-get, as root, has not installed it"
        )


def cannot_run(session: nox.Session, reason: str) -> SystemExit:
    session.warn(f"SKIPPED, nothing was tested: {reason}")
    return SystemExit(77)  # as of automake; nox would say 0


@nox.session
def tests(session: nox.Session) -> None:
    """Run the test suite."""
    run_tests(session)


@nox.session(python=PYTHONS)
def matrix(session: nox.Session) -> None:
    """Run the test suite on each Python there is."""
    run_tests(session)


@nox.session(python=["pypy3.11"])
def pypy(session: nox.Session) -> None:
    """Run the test suite on a PyPy that cryptography is built for: 7.3.19 is not."""
    run_tests(session)


@nox.session(python=["3.14t"])
def free_threaded(session: nox.Session) -> None:
    """Run the test suite on a CPython without its global interpreter lock."""
    run_tests(session, PYTHON_GIL="0")


@nox.session
def oldest(session: nox.Session) -> None:
    """Run the test suite on the oldest dependencies."""
    run_tests(session, *OLDEST)


@nox.session
def debug(session: nox.Session) -> None:
    """Run the test suite with the debug modes of Python and asyncio."""
    run_tests(session, PYTHONDEVMODE="1", PYTHONASYNCIODEBUG="1")


@nox.session
def blocking(session: nox.Session) -> None:
    """Run the test suite where a call that blocks an event loop of asyncio's fails."""
    run_tests(session, "blockbuster")


def explore(session: nox.Session, file: str) -> None:
    session.install("-e", ".", *group("test"))
    session.run("pytest", file, *session.posargs, env={"MODEL_PROFILE": "nightly"})


@nox.session
def model(session: nox.Session) -> None:
    """Hold many thousands of random scripts of both sides to the model of the rules."""
    explore(session, "tests/endings/test_model.py")


@nox.session
def fuzz(session: nox.Session) -> None:
    """Send about a hundred thousand fuzzed inputs to all that reads input."""
    explore(session, "tests/endings/test_fuzz.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation: docs/_build/html."""
    session.install(".[trio,httpx]", *group("docs"))
    build_docs(session, "html", "-W")


@nox.session
def links(session: nox.Session) -> None:
    """Ask the network whether the links of docs/links.txt are good; `-- --write` it."""
    session.install(".[trio,httpx]", *group("docs"))
    if "--write" in session.posargs:
        build_docs(session, "dummy", "-E", "-t", "write_links")
    else:
        build_docs(session, "linkcheck", "-EW", "--keep-going")


def build_docs(session: nox.Session, builder: str, *options: str) -> None:
    output = f"docs/_build/{builder}"
    session.run("sphinx-build", "-n", *options, "-b", builder, "docs", output)


@nox.session
def package(session: nox.Session) -> None:
    """Build what is published, and use it where there is nothing else; `-P 3.10`."""
    session.install(*group("package"))
    session.env["PYTHONPATH"] = None
    files = session.run("git", "ls-files", external=True, silent=True)
    with TemporaryDirectory() as directory:
        # The wheel is built from the sdist.
        session.run("python", "-m", "build", "--outdir", directory)
        session.chdir(directory)
        (sdist,) = Path().glob("*.tar.gz")
        (wheel,) = Path().glob("*.whl")
        session.run("twine", "check", "--strict", str(sdist), str(wheel))
        check_contents(session, sdist, wheel, set(str(files).split()))

        session.run("python", "-m", "venv", "venv")
        python, pip, demo, pytest = (
            str(Path("venv", "bin", name).absolute())
            for name in ("python", "pip", "anyio-rst", "pytest")
        )
        session.run(pip, "install", "-q", str(wheel), external=True)
        session.run(demo, "demo", "--loop", "asyncio", external=True)

        source = sdist.name.removesuffix(".tar.gz")
        program = Path("type_tests.py")
        program.write_text(Path(source, "tests", "project", program).read_text())
        session.run("mypy", "--strict", "--python-executable", python, str(program))
        session.run("pyright", "--pythonpath", python, str(program))

        # The README to the letter: its programs, its demo, on all loops.
        session.run(
            pip, "install", "-q", f"{wheel}[trio,uvloop,httpx]", "pytest", external=True
        )
        session.chdir(source)
        session.run(
            pytest,
            "tests/pages/test_readme.py",
            "tests/project/test_api.py",
            external=True,
        )


def check_contents(
    session: nox.Session, sdist: Path, wheel: Path, files: set[str]
) -> None:
    """All *files* are in the sdist, and those of the package, no others, in the wheel."""
    with tarfile.open(sdist) as tar:
        root = sdist.name.removesuffix(".tar.gz")
        packed = {name.removeprefix(f"{root}/") for name in tar.getnames()}
        tar.extractall(filter="data")
    ours = {name for name in files if not name.startswith((".ci/", ".github/"))}
    if wrong := packed ^ (ours | {"PKG-INFO"}):
        session.error(f"missing from the sdist, or too much in it: {sorted(wrong)}")

    info = f"{root}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        readme = archive.read(f"{info}/METADATA").decode()
    source = PYPROJECT["project"]["urls"]["Source"]
    links = set(re.findall(r"\]\(([^)#]+)", readme))
    published = {f"{source}/blob/main/{name}" for name in files}
    if dead := {link for link in links - published if not is_elsewhere(link, source)}:
        session.error(f"links of the README that lead nowhere: {sorted(dead)}")
    metadata = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    ours = {name[len("src/") :] for name in files if name.startswith("src/")}
    if wrong := packed ^ (ours | {f"{info}/{name}" for name in metadata}):
        session.error(f"missing from the wheel, or too much in it: {sorted(wrong)}")


def is_elsewhere(link: str, source: str) -> bool:
    return link.startswith("https://") and not link.startswith(source)


@nox.session
def ladders(session: nox.Session) -> None:
    """Capture how connections end, and draw it: docs/ladders/. As root."""
    session.install("-e", ".", *group("test"))
    session.run("python", "docs/ladders.py")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install(*group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types, and that the public ones are complete."""
    session.install("-e", ".", *group("types"))
    session.run("mypy")
    session.run("pyright")
    session.run("pyright", "--verifytypes", "anyio_rst", "--ignoreexternal")
