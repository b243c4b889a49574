"""The service as its clients meet it: `fourfold sandbox` in a process of its own, over HTTP."""

import concurrent.futures
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from sandboxes import bare_policy

from fourfold.sandbox.worker import parse_reply

FOURFOLD = (sys.executable, "-m", "fourfold.cli")
LISTENING = re.compile(r"listening on (http://\S+)")


@dataclass
class Service:
    """A running service."""

    process: subprocess.Popen[str]
    url: str

    def execute(self, code: str, session: str | None = "s", **body: Any) -> requests.Response:
        headers = {} if session is None else {"X-Session-ID": session}
        return requests.post(f"{self.url}/execute", json={"generated_code": code, **body}, headers=headers, timeout=60)

    def run(self, code: str, session: str = "s", **body: Any) -> dict[str, Any]:
        reply = self.execute(code, session, **body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)


def start(*options: str, **environment: str) -> Service:
    process = subprocess.Popen(
        [*FOURFOLD, "sandbox", "--port", "0", *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "SERVICE_TOKEN": "canary", **environment},
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    found = LISTENING.search(line)
    assert found is not None, line + process.stderr.read()
    url = found[1]
    for _ in range(300):
        try:
            if requests.get(f"{url}/health", timeout=60).ok:
                return Service(process, url)
        except requests.ConnectionError:
            time.sleep(0.05)
    raise AssertionError("the service does not answer")


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    bare_policy()
    service = start("--max-sessions", "6", "--ready", "1")
    yield service
    children = psutil.Process(service.process.pid).children(recursive=True)
    assert service.stop() in (0, -signal.SIGTERM)  # uvicorn ends by the signal, after its clean-up
    assert psutil.wait_procs(children, timeout=5)[1] == []


def test_a_session_keeps_its_state_as_nemo_skills_expects(service: Service) -> None:
    first = service.run("x = 40", "state")
    assert (first["process_status"], first["stdout"], first["stderr"]) == ("completed", "", "")
    assert first["new_session_created"] is True
    second = service.run("print('sum')\nx + 2", "state")
    assert (second["stdout"], second["new_session_created"]) == ("sum\n42\n", False)
    listed = requests.get(f"{service.url}/sessions", timeout=10).json()
    assert listed["backend"] == "ipython"
    assert listed["sessions"]["state"]["alive"] is True
    assert requests.delete(f"{service.url}/sessions/state", timeout=10).status_code == 200
    assert requests.delete(f"{service.url}/sessions/state", timeout=10).status_code == 404
    replayed = service.run("x", "state")
    assert replayed["new_session_created"] is True
    assert "NameError" in replayed["stdout"]


def test_errors_are_in_standard_output_as_in_a_notebook(service: Service) -> None:
    plain = service.run("def f():\n    return 1/0\nf()")
    assert plain["process_status"] == "error"
    assert plain["stdout"].startswith("Traceback (most recent call last):\n")
    assert "line 2, in f" in plain["stdout"]
    assert plain["stdout"].endswith("ZeroDivisionError: division by zero\n")
    assert plain["stderr"] == ""
    assert service.run("1/0", traceback_verbosity="Minimal")["stdout"] == "ZeroDivisionError: division by zero\n"
    assert "SyntaxError" in service.run("1 +")["stdout"]


def test_a_timeout_keeps_the_state_and_what_was_printed(service: Service) -> None:
    service.run("y = 7")
    late = service.run("print('before')\nwhile True: pass", timeout=0.5)
    assert late["process_status"] == "timeout"
    assert late["stdout"].startswith("before\n")
    assert late["stderr"] == "Execution timed out after 0.5 seconds\n"
    assert service.run("y")["stdout"] == "7\n"


def test_output_is_cut_where_the_request_says(service: Service) -> None:
    assert service.run("print('x' * 1500)")["stdout"] == "x" * 1000 + "<output cut>"
    assert service.run("print('abc')", max_output_characters=2)["stdout"] == "ab<output cut>"


def test_a_program_has_input_a_sandbox_of_its_own_and_standard_error(service: Service) -> None:
    body = {"language": "python", "std_input": "5\n"}
    reply = service.execute("n = int(input())\nn\nprint(n * n)", None, **body).json()
    assert (reply["process_status"], reply["stdout"]) == ("completed", "25\n")
    failed = service.execute("1/0", None, language="python").json()
    assert (failed["process_status"], failed["stdout"]) == ("error", "")
    assert "ZeroDivisionError" in failed["stderr"]


def test_mathematics_is_at_hand(service: Service) -> None:
    code = "import sympy, numpy, scipy\nfrom sympy.abc import x\nprint(sympy.integrate(x**2, x), numpy.eye(2).trace())"
    assert service.run(code)["stdout"] == "x**3/3 2.0\n"


def test_a_thread_left_behind_ends_the_session(service: Service) -> None:
    code = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nprint('on')"
    left = service.run(code, "thread")
    assert (left["process_status"], left["stdout"], left["session_alive"]) == ("completed", "on\n", False)
    assert service.run("1", "thread")["new_session_created"] is True


def test_the_service_takes_nothing_of_its_environment_inside(service: Service) -> None:
    assert "canary" not in service.run("import os; print(dict(os.environ))")["stdout"]


@pytest.mark.parametrize(
    ("session", "body", "named"),
    [
        (None, {}, "X-Session-ID"),
        ("a/b", {}, "X-Session-ID"),
        ("n" * 129, {}, "X-Session-ID"),
        ("s", {"language": "lean4"}, "language"),
        ("s", {"timeout": 0}, "timeout"),
        ("s", {"timeout": "soon"}, "timeout"),
        ("s", {"max_output_characters": -1}, "max_output_characters"),
    ],
)
def test_a_bad_request_is_a_400_that_names_the_field(
    service: Service, session: str | None, body: dict[str, Any], named: str
) -> None:
    reply = service.execute("1", session, **body)
    assert reply.status_code == 400
    assert named in reply.json()["error"]


def test_a_body_that_is_no_json_or_too_large_is_refused(service: Service) -> None:
    broken = requests.post(f"{service.url}/execute", data="{", headers={"X-Session-ID": "s"}, timeout=10)
    assert broken.status_code == 400
    assert service.execute("#" * (1 << 20)).status_code == 413
    assert service.run("1 + 1")["stdout"] == "2\n"


def test_cells_of_one_session_run_in_turn_and_sessions_side_by_side(service: Service) -> None:
    service.run("n = 0", "turn")
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: service.run("m = n; import time; time.sleep(0.02); n = m + 1", "turn"), range(8)))
    assert service.run("n", "turn")["stdout"] == "8\n"


def test_a_session_that_is_deleted_while_its_cell_runs_died(service: Service) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        running = threads.submit(service.run, "import time; time.sleep(20)", "gone", timeout=30)
        while requests.delete(f"{service.url}/sessions/gone", timeout=10).status_code == 404:
            time.sleep(0.05)
        assert running.result(timeout=10)["process_status"] == "died"
    assert service.run("1", "gone")["new_session_created"] is True


def test_when_all_are_in_use_the_client_is_told_to_wait(service: Service) -> None:
    names = [f"full{index}" for index in range(7)]
    codes = [service.execute("1", name).status_code for name in names]
    assert 429 in codes
    assert service.execute("1", names[codes.index(429)]).headers.get("Retry-After") == "1"
    for name in names:
        requests.delete(f"{service.url}/sessions/{name}", timeout=10)
    assert service.run("1", "full0")["stdout"] == "1\n"


def test_a_key_is_needed_where_one_is_set() -> None:
    bare_policy()
    service = start("--ready", "1", FOURFOLD_SANDBOX_API_KEY="key", FOURFOLD_SANDBOX_ADMIN_KEY="admin")

    def ask(method: str, path: str, key: str) -> requests.Response:
        return requests.request(method, service.url + path, headers={"Authorization": f"Bearer {key}"}, timeout=10)

    try:
        assert service.execute("1").status_code == 401
        assert ask("GET", "/sessions", "admin").json()["sessions"] == {}
        # Names are for the administrator alone; a name is what its own client has.
        assert ask("GET", "/sessions", "key").status_code == 401
        assert ask("DELETE", "/sessions/x", "key").status_code == 404
        assert ask("DELETE", "/sessions/x", "admin").status_code == 401
    finally:
        # Killed without a chance to clean up: the kernel ends the sandboxes with it.
        children = psutil.Process(service.process.pid).children(recursive=True)
        service.process.kill()
        service.process.wait()
    assert len(children) >= 3
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []


@pytest.mark.parametrize(
    ("options", "path", "code", "said"),
    [
        ((), "/nowhere", 78, "bubblewrap is missing; install it: apt-get install bubblewrap"),
        (("--host", "0.0.0.0"), None, 1, "--host: 0.0.0.0 can be reached from other machines; give an --api-key"),
        (("--ready", "3", "--max-sessions", "2"), None, 1, "--ready: 3 sandboxes, but there may be 2 at once"),
    ],
)
def test_a_service_that_may_not_run_is_one_line(
    options: tuple[str, ...], path: str | None, code: int, said: str
) -> None:
    environment = {**os.environ, **({"PATH": path} if path else {})}
    command = [*FOURFOLD, "sandbox", "--port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == code
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@given(st.binary(max_size=64), st.integers(0, 2**32 - 1))
def test_no_bytes_make_a_reply_but_the_right_ones(body: bytes, size: int) -> None:
    assert parse_reply(size.to_bytes(4, "big") + body, "name") in (None, "protocol")
    assert parse_reply(len(body).to_bytes(4, "big") + body, "name") == "protocol"


@pytest.mark.parametrize(
    "text",
    ['{"id":"name","ok":1}', '{"id":"\\ud800","ok":true}', '{"id":"name","ok":true,"x":0}', "[" * 4000, "NaN", "{}"],
)
def test_a_reply_has_exactly_its_two_fields(text: str) -> None:
    frame = len(text).to_bytes(4, "big") + text.encode()
    assert parse_reply(frame, "name") == "protocol"


def test_a_right_reply_is_taken_when_it_is_whole() -> None:
    text = b'{"id": "name", "ok": true}'
    frame = len(text).to_bytes(4, "big") + text
    assert [parse_reply(frame[:end], "name") for end in range(len(frame))] == [None] * len(frame)
    assert parse_reply(frame, "name") == "completed"
    assert parse_reply(frame + b"x", "name") == "protocol"


def soak(service: Service, sessions: int, seed: int) -> None:
    """Sessions that end in every way, some killed from outside; afterwards the service is as it was."""
    process = psutil.Process(service.process.pid)
    mounts = Path(f"/proc/{process.pid}/mountinfo").read_text()

    def settled() -> tuple[int, int]:
        for _ in range(1200):
            health = requests.get(f"{service.url}/health", timeout=10).json()
            if health["ready"] == 1 and health["sessions"] == 0:
                break
            time.sleep(0.05)
        # The least of several: a connection may be closing.
        descriptors = []
        for _ in range(20):
            descriptors.append(process.num_fds())
            time.sleep(0.02)
        return min(descriptors), len(process.children(recursive=True))

    def one(index: int) -> str:
        dice = random.Random(seed + index)
        name = f"soak{index}"
        while service.execute("x = 1", name).status_code == 429:
            time.sleep(0.05)
        kind = dice.choice(("delete", "exit", "crash", "kill", "stop"))
        if kind == "exit":
            assert service.run("import os; os._exit(3)", name)["process_status"] == "died"
        elif kind == "crash":
            assert service.run("import ctypes; ctypes.string_at(0)", name)["process_status"] == "died"
        elif kind == "stop":
            code = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
            assert service.run(code, name, timeout=0.1)["process_status"] == "timeout"
        elif kind == "kill" and (victims := process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                dice.choice(victims).kill()
        requests.delete(f"{service.url}/sessions/{name}", timeout=30)
        return kind

    def guarded(index: int) -> str:
        try:
            return one(index)
        except AssertionError:
            # A neighbour's kill may have met this session; only what is left behind counts then.
            requests.delete(f"{service.url}/sessions/soak{index}", timeout=30)
            return "met"

    for name in requests.get(f"{service.url}/sessions", timeout=10).json()["sessions"]:
        requests.delete(f"{service.url}/sessions/{name}", timeout=10)
    before = settled()
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        kinds = list(threads.map(guarded, range(sessions)))
    assert kinds.count("met") < sessions / 2
    assert settled() == before
    assert not [child for child in process.children(recursive=True) if child.status() == psutil.STATUS_ZOMBIE]
    assert Path(f"/proc/{process.pid}/mountinfo").read_text() == mounts


def test_nothing_is_left_of_sessions_that_ended_in_every_way(service: Service) -> None:
    soak(service, 12, seed=0)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_nothing_is_left_of_a_thousand_sessions(service: Service) -> None:
    soak(service, 1000, seed=1)
