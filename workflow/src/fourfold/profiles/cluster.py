"""A Slurm cluster as profiles/slurm/cluster.yaml describes it, and what a stage asks of it."""

import os
from pathlib import Path

from pydantic import ValidationError

from fourfold.config.base import Section
from fourfold.config.load import ConfigError, describe, read_values

FILE = Path("profiles", "slurm", "cluster.yaml")
Resources = dict[str, str | int]


class Cluster(Section):
    """A cluster; what is null is left to Slurm."""

    account: str | None = None
    """Whom jobs are charged to."""

    cpu_partition: str | None = None
    """Where stages without a GPU run."""

    gpu_partition: str | None = None
    """Where stages with a GPU run."""

    gpu_model: str | None = None
    """The kind of GPU, as Slurm names it, where the partition has several."""

    accounting: bool = True
    """Whether Slurm keeps accounts: `sacct` works, and jobs have an account."""

    def stage(self, *, gigabytes: int, hours: int, gpus: int = 0) -> Resources:
        """What a stage asks for, in the names of Snakemake's Slurm plugin; each retry asks for that much memory more.

        Args:
            gigabytes: memory of the first attempt, in units of 1000 MB.
            hours: time limit.
            gpus: GPUs, all of one node.
        """
        # Snakemake reads the values as Python's expressions: strings are quoted.
        resources: Resources = {"mem_mb": f"{1000 * gigabytes} * attempt", "runtime": 60 * hours}
        partition = self.gpu_partition if gpus else self.cpu_partition
        if partition:
            resources["slurm_partition"] = repr(partition)
        if gpus:
            resources["gpu"] = gpus
            if self.gpu_model:
                resources["gpu_model"] = repr(self.gpu_model)
        return resources


def read_cluster(file: Path | None = None) -> Cluster:
    """Reads a cluster's file: $FOURFOLD_CLUSTER, or profiles/slurm/cluster.yaml if that is not set.

    Raises ConfigError with the file, the key, what was given and what is allowed.
    """
    file = file or Path(os.environ.get("FOURFOLD_CLUSTER") or FILE).expanduser()
    try:
        return Cluster.model_validate(read_values(file))
    except ValidationError as error:
        raise ConfigError(f"{file}: {describe(error)}") from None
