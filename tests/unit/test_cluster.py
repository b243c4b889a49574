"""What the slurm profile asks for, for the clusters that its one file describes."""

from pathlib import Path

import pytest
from snakemake.profiles import ProfileConfigFileParser

from fourfold.config.load import ConfigError
from fourfold.profiles.cluster import Cluster, read_cluster
from fourfold.profiles.queue import waiting_jobs

PROFILE = Path(__file__).parents[2] / "profiles" / "slurm"


def read_profile(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setenv("FOURFOLD_CLUSTER", str(cluster))
    with (PROFILE / "profile.yaml").open() as file:
        return dict(ProfileConfigFileParser().parse(file))


def test_the_shipped_file_leaves_everything_to_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_cluster(PROFILE / "cluster.yaml") == Cluster()
    profile = read_profile(PROFILE / "cluster.yaml", monkeypatch)
    asked = profile["set-resources"]
    assert isinstance(asked, list)
    assert "train_drafter:gpu=1" in asked
    assert "build_calibration:mem_mb=8000 * attempt" in asked
    assert not [setting for setting in asked if "partition" in setting or "gpu_model" in setting]
    assert not {"default-resources", "slurm-status-command"} & set(profile)


def test_a_cluster_is_five_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("account: '042'\ncpu_partition: cpu-long\ngpu_partition: gpu\ngpu_model: h100\naccounting: false\n")
    profile = read_profile(file, monkeypatch)
    asked = profile["set-resources"]
    assert isinstance(asked, list)
    partitions = {setting.split(":")[0]: setting.split("=")[1] for setting in asked if "partition" in setting}
    on_cpu = {rule for rule, partition in partitions.items() if partition == "'cpu-long'"}
    assert on_cpu == {"build_calibration", "build_engine", "convert_checkpoint", "merge_drafter", "pack_engine"}
    assert set(partitions.values()) == {"'cpu-long'", "'gpu'"}
    with_gpu = {setting.split(":")[0] for setting in asked if setting.endswith(":gpu=1")}
    assert with_gpu == set(partitions) - on_cpu
    assert len([setting for setting in asked if setting.endswith("gpu_model='h100'")]) == len(with_gpu)
    assert profile["default-resources"] == ["slurm_account='042'"]
    assert profile["slurm-status-command"] == "squeue"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partition: gpu\n", r"cluster\.yaml: partition: unknown key"),
        ("account: 42\n", r"cluster\.yaml: account: Input should be a valid string \(given: 42\)"),
        ("", r"cluster\.yaml: expected keys"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_cluster(file)


def test_only_what_waits_for_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        f"7|Nodes required for job are DOWN, DRAINED or reserved|rule_train_drafter|{tmp_path}",
        f"8|Priority|rule_tune_engine|{tmp_path}",
        "9|PartitionDown|rule_build_engine|/elsewhere",
    ]
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\ncat <<END\n" + "\n".join(lines) + "\nEND\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert waiting_jobs(tmp_path) == [
        ("7", "Nodes required for job are DOWN, DRAINED or reserved", "rule_train_drafter")
    ]
