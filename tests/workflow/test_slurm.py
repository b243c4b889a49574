"""The slurm profile on a real Slurm: who gets which GPU, and what is left after a cancelled job and a drained node.

The jobs are stages of the tiny configuration. Its finished run is taken apart so far that Slurm has to make what shows
the point: a stage for a CPU and three for a GPU, none of which waits for another.
"""

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import pytest
from conftest import Run, Workspace
from slurm_cluster import Cluster, search_path, slurm_cluster, why_not

pytestmark = pytest.mark.slurm
T = TypeVar("T")
CLUSTER = "cpu_partition: cpu\ngpu_partition: gpu\naccounting: false\n"
GPU_RULES = {"benchmark_engine": 64000, "compare_logits": 96000}
"""Memory in MB that the profile asks for, at first."""
MISSING = ("engines/bf16", "benchmark/fp8", "benchmark/fp8-redrafter", "fidelity/fp8")
TARGETS = [f"results/tiny/{folder}/manifest.json" for folder in MISSING]
WAITS = r"Slurm job \d+ \(rule_benchmark_engine_wildcards_tiny_fp8\) waits: (.*)"
OPTIONS = [
    *("--workflow-profile", "slurm", "--configfile", "config/tiny.yaml"),
    *("--slurm-init-seconds-before-status-checks", 2, "--seconds-between-status-checks", 2, "--latency-wait", 5),
]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("PATH", search_path())
    if reason := why_not():
        pytest.skip(reason)
    # The node's GPUs are plain files: stages that are given one shall not look for it.
    monkeypatch.setenv("FOURFOLD_DEVICE", "cpu")
    with slurm_cluster() as cluster:
        yield cluster


@pytest.fixture
def place(finished: Workspace, tmp_path: Path) -> Workspace:
    """A run in which some is missing, and the cluster's file."""
    workspace = finished.copy(tmp_path / "checkout")
    for folder in (*MISSING, "report"):
        shutil.rmtree(workspace.path / "results" / "tiny" / folder)
    (workspace.path / "profiles" / "slurm" / "cluster.yaml").write_text(CLUSTER)
    return workspace


def wait_until(condition: Callable[[], T], what: str, output: Path, seconds: float = 180) -> T:
    """What the condition gives once it holds; a run's output says why it never did."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not seen: {what}\n{output.read_text()}"
        time.sleep(0.2)
    return found


def test_gpus_are_never_shared_and_a_run_goes_on_after_a_cancelled_job_and_a_drained_node(
    place: Workspace, cluster: Cluster
) -> None:
    said = interrupted_run(place, cluster)
    cancelled = cluster.jobs()
    assert "SLURM status is: 'CANCELLED'" in said
    assert re.search(r"results/slurm-logs/rule_benchmark_engine/tiny_fp8/\d+\.log", said)
    waits = re.search(WAITS, said)
    assert waits is not None, said
    assert "DRAINED" in waits[1] or "ReqNodeNotAvail" in waits[1]
    first, second = [job.memory for job in cancelled if job.comment.endswith("benchmark_engine_wildcards_tiny_fp8")]
    assert (first, second) == (64000, 128000), "a retried job asks for twice the memory"

    missing = [
        folder for folder in MISSING if not (place.path / "results" / "tiny" / folder / "manifest.json").exists()
    ]
    assert "benchmark/fp8" in missing
    cluster.call("scontrol", "update", f"nodename={cluster.host}", "state=resume")
    run = finish(place, cluster, *TARGETS)
    assert run.returncode == 0, run.output
    assert sum(run.jobs.values()) == len(missing), run.output
    rest = finish(place, cluster)
    assert rest.returncode == 0, rest.output
    assert rest.jobs == {"make_report": 1}
    assert (place.path / "results" / "tiny" / "report" / "report.html").stat().st_size > 100_000
    assert_gpus_belong_to_one_job(cluster)
    refused = finish(place, cluster, "--config", "drafter={training: {num_processes: 2}}")
    assert refused.returncode == 1
    assert "num_processes: 2, but the profile asks for 1 GPU for train_drafter; write gpus=2" in refused.output
    assert "submitted" not in refused.output


def interrupted_run(place: Workspace, cluster: Cluster) -> str:
    """A run in which a job is cancelled and the node drained, ended with Ctrl-C; what it said."""
    output = place.path / "output"

    def running() -> list[int]:
        benchmark = "benchmark_engine_wildcards_tiny_fp8"
        return [job.number for job in cluster.jobs() if job.state == "RUNNING" and job.comment.endswith(benchmark)]

    with (
        output.open("w") as file,
        subprocess.Popen(
            # A shell's background job, as the tests may be, ignores SIGINT, and so would this run.
            [*cluster.namespace, "env", "--default-signal=INT", *place.command(*TARGETS, *OPTIONS)],
            cwd=place.path,
            env=place.environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            # Which jobs have the two GPUs first is Slurm's choice, so the others may still wait or be over by now.
            number = wait_until(running, "the benchmark runs", output)[0]
            cluster.call("scontrol", "update", f"nodename={cluster.host}", "state=drain", "reason=test")
            cluster.call("scancel", str(number))
            wait_until(lambda: re.search(WAITS, output.read_text()), "a job that waits is named", output)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) != 0
        finally:
            process.kill()
    return output.read_text()


def finish(place: Workspace, cluster: Cluster, *arguments: str) -> Run:
    """A run to the end."""
    done = subprocess.run(
        [*cluster.namespace, *place.command(*arguments, *OPTIONS)],
        cwd=place.path,
        env=place.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return Run(done.returncode, done.stdout)


def assert_gpus_belong_to_one_job(cluster: Cluster) -> None:
    """By the controller's and the node's own records."""
    jobs = {job.number: job for job in cluster.jobs()}
    allocations = cluster.allocations()
    ran = [jobs[allocation.number].rule for allocation in allocations]
    assert {*GPU_RULES, "build_engine"} == set(ran)
    for allocation in allocations:
        job = jobs[allocation.number]
        expected = 1 if job.rule in GPU_RULES else 0
        assert (job.gpus, len(allocation.gpus)) == (expected, expected), job
        assert job.partition == ("gpu" if expected else "cpu")
    together = [
        (one, other)
        for one, other in combinations(allocations, 2)
        if one.begin < other.end and other.begin < one.end and one.gpus and other.gpus
    ]
    assert together, "GPU jobs ran at the same time"
    assert all(one.gpus != other.gpus for one, other in together)
