"""What all rules share: the checked configuration, the wildcards, and functions for inputs, params and resources."""

import os
import re
import subprocess
import sys
from pathlib import Path

from fourfold.artifacts.code import code_hash
from fourfold.artifacts.files import write_text
from fourfold.artifacts.provenance import library_versions
from fourfold.artifacts.artifact import check_folder
from fourfold.config.load import ConfigError, check_files, parse_config, with_overrides
from fourfold.errors import FourfoldError
from fourfold.profiles.queue import watch_queue
from fourfold.config.sources import source_files
from fourfold.config.stages import stage_settings
from fourfold.report.files import BENCHMARK, OVERVIEW, PLOTS, TABLES

os.environ.update(
    # The rules' commands are those of the environment that Snakemake runs in, also when it is not activated.
    PATH=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()]),
    # For envs/base.post-deploy.sh, which installs the package from this checkout.
    FOURFOLD_CHECKOUT=str(workflow.basedir),
)

try:
    check_files(workflow.overwrite_configfiles or [Path(workflow.basedir, "config", "config.yaml")])
    CONFIG = parse_config(with_overrides(config, workflow.config_settings.config))
    MODEL_FILES = source_files(CONFIG.model)
    PROBLEM_FILES = source_files(CONFIG.problems)
except ConfigError as error:
    files = workflow.overwrite_configfiles
    merged = f", merged from {' and '.join(map(str, files))}" if len(files) > 1 else ""
    sys.exit(f"configuration{merged}: {error}")

RESULTS = f"results/{CONFIG.name}"
try:
    check_folder(Path(RESULTS))
except FourfoldError as error:
    sys.exit(str(error))
DRAFTING = [name for name, engine in CONFIG.engines.items() if engine.drafter == "redrafter"]


wildcard_constraints:
    name=re.escape(CONFIG.name),
    precision="fp8|int8_wo",
    engine="|".join(map(re.escape, CONFIG.engines)),


# Targets: the manifests that the configuration asks for.


def checkpoint_manifest(precision):
    """Manifest of the checkpoint of a precision; bf16 is the base model itself."""
    return f"{RESULTS}/model/manifest.json" if precision == "bf16" else f"{RESULTS}/quantize/{precision}/manifest.json"


def quantized_manifests():
    """Checkpoints that engines, or the drafter of an engine, compute with."""
    precisions = {engine.precision for engine in CONFIG.engines.values()}
    if DRAFTING:
        precisions.add(CONFIG.drafter.target)
    return [checkpoint_manifest(precision) for precision in sorted(precisions)]


def fidelity_manifests():
    """The logits error of each quantised precision that an engine computes with."""
    precisions = {engine.precision for engine in CONFIG.engines.values()} - {"bf16"}
    return [f"{RESULTS}/fidelity/{precision}/manifest.json" for precision in sorted(precisions)]


def drafter_manifests():
    """The drafter and its evaluation; nothing if no engine drafts."""
    return [f"{RESULTS}/drafter/{part}/manifest.json" for part in ("checkpoint", "evaluation")] if DRAFTING else []


def engine_manifests():
    """All engines."""
    return [f"{RESULTS}/engines/{engine}/manifest.json" for engine in CONFIG.engines]


def benchmark_manifests():
    """A benchmark for each engine, in the configuration's order."""
    return [f"{RESULTS}/benchmark/{engine}/manifest.json" for engine in CONFIG.engines]


def report_manifest():
    """The report."""
    return f"{RESULTS}/report/manifest.json"


# Inputs.


def drafter_target(wildcards):
    """The checkpoint that the drafter is trained for."""
    return checkpoint_manifest(CONFIG.drafter.target)


def calibration_texts(wildcards):
    """FP8 needs activation scales, hence texts; int8 weights need none."""
    return f"{RESULTS}/calibration/manifest.json" if wildcards.precision == "fp8" else []


def engine_target(wildcards):
    """The checkpoint of an engine's precision."""
    return checkpoint_manifest(CONFIG.engines[wildcards.engine].precision)


def engine_drafter(wildcards):
    """The drafter, for the engines that draft."""
    return f"{RESULTS}/drafter/checkpoint/manifest.json" if wildcards.engine in DRAFTING else []


def engine_tuning(wildcards):
    """The measured draft plan, for the engines that leave it open."""
    tuned = CONFIG.engines[wildcards.engine].is_tuned
    return f"{RESULTS}/tuning/{wildcards.engine}/manifest.json" if tuned else []


def drafter_part(part):
    """The drafter's checkpoint or evaluation, for the report; nothing if no engine drafts."""
    return [f"{RESULTS}/drafter/{part}/manifest.json"] if DRAFTING else []


# Params: what a stage depends on beside its inputs, as plain built-in types.


def settings(stage, wildcard=None):
    """The configuration that a stage reads; with a wildcard's name, its part for that wildcard."""
    # A function, since Snakemake would look for wildcards between the braces of a plain string.
    return lambda wildcards: stage_settings(CONFIG, stage, wildcard and getattr(wildcards, wildcard))


def versions(*libraries):
    """Versions of the libraries that shape an artifact."""
    return library_versions(list(libraries))


def option(name):
    """`--NAME FILE` for each of the job's input files of that name; empty if there is none."""

    def arguments(wildcards, input):
        files = input.get(name, [])
        return " ".join(f"--{name} {file}" for file in ([files] if isinstance(files, str) else files))

    return arguments


def work(path):
    """Folder for what a killed job resumes from; outside the outputs, which Snakemake deletes."""
    return lambda wildcards: f"results/{wildcards.name}/resume/{path}"


def training_command():
    """The command line, under torchrun if several processes train."""
    processes = CONFIG.drafter.training.num_processes
    if processes == 1:
        return "fourfold"
    return f"fourfold on-gpus {processes} torchrun --standalone --nproc-per-node {processes} -m fourfold.cli"


def report_file(file, caption, **labels):
    """A file of the report's directory that `snakemake --report` shows."""
    path = f"results/{{name}}/report/{file}"
    return report(path, caption=f"../report/{caption}.rst", category="Results", labels=labels)


def report_plots():
    """The plots, each with its caption."""
    suffix = CONFIG.report.plot_format
    return [report_file(f"{plot}.{suffix}", plot, plot=plot.capitalize()) for plot in PLOTS]


def report_tables():
    """The other forms of the tables that the HTML report shows."""
    return [f"results/{{name}}/report/{file}" for file in TABLES if not file.endswith(".html")]


# Resources.


def gigabytes(amount):
    """Memory in MB; a retried job gets that much more each time."""
    return lambda wildcards, attempt: 1000 * amount * attempt


# Before and after the jobs.


def refuse_missing_backends():
    """Stops a run whose jobs need a backend that is not there, before any of them starts."""
    for job in workflow.dag.needrun_jobs():
        engine = job.wildcards_dict.get("engine")
        if engine in CONFIG.engines and CONFIG.engines[engine].backend == "tensorrt_llm":
            sys.exit(f"engines.{engine}.backend: tensorrt_llm cannot be built yet; use torch, or leave this engine out")


def computes_in(job):
    """The precision that a job computes in, if it runs a model with the embedded engine."""
    if job.rule.name == "benchmark_engine":
        return CONFIG.engines[job.wildcards_dict["engine"]].precision
    if job.rule.name == "compare_logits":
        return job.wildcards_dict["precision"]
    drafting = ("generate_drafter_data", "train_drafter", "evaluate_drafter")
    return CONFIG.drafter.target if job.rule.name in drafting else None


def refuse_unfit_device():
    """Stops a run on this machine whose jobs compute in FP8, where its GPU cannot, before any of them starts."""
    if not workflow.local_exec or not any(computes_in(job) == "fp8" for job in workflow.dag.needrun_jobs()):
        return
    # A process of its own: this one shall not hold PyTorch for the whole run.
    checked = subprocess.run(["fourfold", "check-device", "--precision", "fp8"], stderr=subprocess.PIPE, text=True)
    if checked.returncode:
        sys.exit(checked.stderr.strip())


def refuse_missing_gpus():
    """Stops a run on a cluster whose training would get another number of GPUs than of processes."""
    if workflow.local_exec:
        return
    processes = CONFIG.drafter.training.num_processes
    for job in workflow.dag.needrun_jobs():
        gpus = job.resources.get("gpu", processes)
        if job.rule.name == "train_drafter" and gpus != processes:
            sys.exit(
                f"drafter.training.num_processes: {processes}, but the profile asks for {gpus} GPU for train_drafter; "
                f"write gpus={processes} for it in profiles/slurm/profile.yaml, or change num_processes"
            )


def say_why_jobs_wait():
    """On a Slurm cluster, says what Slurm's queue holds back."""
    if not workflow.local_exec:
        watch_queue(logger.warning, workflow.remote_execution_settings.seconds_between_status_checks)


def make_html_report():
    """Writes Snakemake's own HTML report after a run that made the report, and says where everything is."""
    if not any(job.rule.name == "make_report" for job in workflow.dag.jobs):
        return
    resolved = Path(RESULTS, "config.json")
    write_text(resolved, CONFIG.model_dump_json(indent=2) + "\n")
    command = [sys.executable, "-m", "snakemake", "--snakefile", workflow.main_snakefile, "--configfile", resolved]
    html = f"{RESULTS}/report/report.html"
    # The profile's settings are this run's own, and none of the report's; the lock is this run's, too.
    finished = subprocess.run(
        [*map(str, command), "--workflow-profile", "none", "--nolock", "--quiet", "all", "--report", html],
        env={name: value for name, value in os.environ.items() if name != "SNAKEMAKE_PROFILE"},
    )
    print(f"Results: {RESULTS}/report/{OVERVIEW} (numbers in {BENCHMARK})", file=sys.stderr)
    if finished.returncode == 0:
        print(f"How they came about: {html}", file=sys.stderr)
