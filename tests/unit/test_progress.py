"""The log of a stage: messages, whatever else is printed, and the last words of a crash."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fourfold import progress as module

BEGIN = "import sys, os\nfrom pathlib import Path\nfrom fourfold.progress import logger, progress, start_logging\n"
STOP = "\nstop()\n"


def run(
    code: str, log: Path | None, stop: bool = True, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    start = f"stop = start_logging({f'Path({str(log)!r})' if log else None})\n"
    return subprocess.run(
        [sys.executable, "-c", BEGIN + start + code + (STOP if stop else "")],
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
        timeout=60,
    )


def test_messages_reach_screen_and_log_once(tmp_path: Path) -> None:
    log = tmp_path / "deep" / "stage.log"
    done = run("logger.info('hello')", log)
    assert done.stderr == "hello\n"
    assert log.read_text().count("hello") == 1
    assert "INFO hello" in log.read_text()


def test_other_output_reaches_screen_and_log(tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    code = "print('printed')\nprint('warned', file=sys.stderr)\nsys.stdout.flush()\nos.system('echo from a child')"
    done = run(code, log)
    for words in ("printed", "warned", "from a child"):
        assert words in log.read_text()
        assert words in done.stderr


def test_output_after_the_end_goes_to_the_screen_alone(tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    done = run("stop(); print('later'); stop = lambda: None", log)
    assert done.stdout == "later\n"
    assert "later" not in log.read_text()


def test_the_last_words_of_a_crash_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    code = "import faulthandler; faulthandler.enable(); os.kill(os.getpid(), 11)"
    done = run(code, log, stop=False)
    assert done.returncode == -11
    assert "Segmentation fault" in log.read_text()


def test_a_second_run_starts_a_new_log(tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    run("logger.info('first')", log)
    run("logger.info('second')", log)
    assert "first" not in log.read_text()


def test_other_ranks_add_warnings_to_the_first_ones_log(tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    run("logger.info('of rank 0')", log)
    run("logger.info('of rank 1'); logger.warning('trouble')", log, environment={"RANK": "1"})
    text = log.read_text()
    assert "of rank 0" in text
    assert "trouble" in text
    assert "of rank 1" not in text


def test_without_a_log_nothing_is_redirected() -> None:
    done = run("print('printed'); logger.info('hello')", None)
    assert done.stdout == "printed\n"
    assert done.stderr == "hello\n"


def test_progress_is_lines_without_a_terminal(tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    code = "with progress('train', 3, 'steps') as task:\n    for i in range(3): task.advance(1, f'loss {i}')"
    done = run(code, log)
    assert "train: 3/3 steps" in done.stderr
    assert "loss 2" in log.read_text()


def test_progress_lines_are_rare(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One line each ten seconds, and one at the end."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    module.logger.handlers = [caplog.handler]
    task = module.Task("train", 100, "steps", None)
    for _ in range(100):
        now[0] += 1
        task.advance()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 10
    assert lines[0] == "train: 10/100 steps, 10 s, 90 s left"
    assert lines[-1].startswith("train: 100/100 steps")
