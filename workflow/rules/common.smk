"""What all rules share: the checked configuration, the wildcards, and functions for inputs, params and resources."""

import os
import re
import shlex
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
from fourfold.config.stages import numerics_of, stage_settings
from fourfold.report.files import BENCHMARK, OVERVIEW, PLOTS, TABLES
from fourfold.trtllm.commands import build_command, guard_arguments, image as tensorrt_llm_image, serve_command

os.environ.update(
    # The rules' commands are those of the environment that Snakemake runs in, also when it is not activated.
    PATH=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()]),
    # For envs/base.post-deploy.sh, which installs the package from this checkout, and for what runs in a container.
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
NUMERICS = numerics_of(CONFIG)
DRAFTING = [name for name, engine in CONFIG.engines.items() if engine.drafter == "redrafter"]


wildcard_constraints:
    name=re.escape(CONFIG.name),
    precision="fp8|int8_wo",
    numerics="|".join(NUMERICS),
    engine="|".join(map(re.escape, CONFIG.engines)),
    # What a TensorRT-LLM checkpoint is made of: a precision, and GPUs that share it.
    layout="(bf16|fp8|int8_wo)-tp[1-9][0-9]*",


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
    """The logits error of all that engines round, each kind once; plain bf16 is what they are compared with."""
    return [f"{RESULTS}/fidelity/{numerics}/manifest.json" for numerics in sorted(NUMERICS) if numerics != "bf16"]


def drafter_manifests():
    """The drafter and its evaluation; nothing if no engine drafts."""
    return [f"{RESULTS}/drafter/{part}/manifest.json" for part in ("checkpoint", "evaluation")] if DRAFTING else []


def engine_manifests():
    """All engines."""
    return [f"{RESULTS}/engines/{engine}/manifest.json" for engine in CONFIG.engines]


def benchmark_manifests():
    """A benchmark for each engine, in the configuration's order."""
    return [f"{RESULTS}/benchmark/{engine}/manifest.json" for engine in CONFIG.engines]


def engines_of(backend):
    """A wildcard's pattern for the engines of a backend; matches nothing if there are none."""
    return "|".join(re.escape(name) for name, row in CONFIG.engines.items() if row.backend == backend) or "(?!)"


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


def compared_checkpoint(wildcards):
    """The checkpoint whose logits are compared with the model's."""
    return checkpoint_manifest(NUMERICS[wildcards.numerics].precision)


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


def convert_target(wildcards):
    """The checkpoint that is split; of int8 weights the model's, since TensorRT-LLM rounds them itself."""
    precision = wildcards.layout.split("-tp")[0]
    return checkpoint_manifest("bf16" if precision == "int8_wo" else precision)


def base_checkpoint(wildcards):
    """The TensorRT-LLM checkpoint of an engine's precision, without a drafter."""
    row = CONFIG.engines[wildcards.engine]
    layout = f"{row.precision}-tp{row.tensor_parallel_size}"
    return f"{RESULTS}/tensorrt_llm/checkpoint/{layout}/manifest.json"


def compiled_checkpoint(wildcards):
    """The TensorRT-LLM checkpoint that an engine is built from, with its drafter if it has one."""
    if wildcards.engine in DRAFTING:
        return f"{RESULTS}/tensorrt_llm/merged/{wildcards.engine}/manifest.json"
    return base_checkpoint(wildcards)


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


def build_options(wildcards, input, output):
    """trtllm-build's command line."""
    row = CONFIG.engines[wildcards.engine]
    folders = (Path(file).parent for file in (input.checkpoint, output.config))
    return shlex.join(build_command(row, CONFIG.tensorrt_llm, *folders))


def guard_options(wildcards, input):
    """What is checked before trtllm-build starts."""
    row = CONFIG.engines[wildcards.engine]
    length = ["--checkpoint", str(Path(input.checkpoint).parent), "--max-seq-len", str(row.max_model_len)]
    return shlex.join([*guard_arguments(row, CONFIG.tensorrt_llm), *length])


def serving_message(name):
    """What the target that serves an engine says; with TensorRT-LLM's command, which is its server's."""
    row, directory = CONFIG.engines[name], f"{RESULTS}/engines/{name}"
    command = shlex.join(serve_command(row, CONFIG.tensorrt_llm, directory))
    return f"Serving engine {name}" + (f": {command}" if row.backend == "tensorrt_llm" else "")


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
    """Stops a run on this machine that builds TensorRT-LLM engines without that or its container, before any job."""
    if not workflow.local_exec or "apptainer" in map(str, workflow.deployment_settings.deployment_method):
        return
    for job in workflow.dag.needrun_jobs():
        if job.rule.name != "compile_engine":
            continue
        name = job.wildcards_dict["engine"]
        guard = guard_arguments(CONFIG.engines[name], CONFIG.tensorrt_llm)
        checked = subprocess.run(
            [sys.executable, "-m", "fourfold.trtllm.guard", *guard], stderr=subprocess.PIPE, text=True
        )
        if checked.returncode:
            sys.exit(f"engines.{name}: {checked.stderr.strip().removeprefix('error: ')}")


def fp8_key(job):
    """The configuration's key by which a job computes in FP8 with the embedded engine; None if it does not."""
    if job.rule.name in ("generate_drafter_data", "train_drafter", "evaluate_drafter"):
        return "drafter.target" if CONFIG.drafter.target == "fp8" else None
    if job.rule.name in ("tune_engine", "benchmark_engine"):
        name = job.wildcards_dict["engine"]
    elif job.rule.name == "compare_logits":
        name = next(name for name, row in CONFIG.engines.items() if row.numerics == job.wildcards_dict["numerics"])
    else:
        return None
    return next((f"engines.{name}.{key}" for key in CONFIG.engines[name].fp8_keys), None)


def refuse_unfit_device():
    """Stops a run on this machine whose jobs compute in FP8, where its GPU cannot, before any of them starts."""
    keys = [key for job in workflow.dag.needrun_jobs() if (key := fp8_key(job))] if workflow.local_exec else []
    if not keys:
        return
    # A process of its own: this one shall not hold PyTorch for the whole run.
    checked = subprocess.run(["fourfold", "check-device", "--fp8", min(keys)], stderr=subprocess.PIPE, text=True)
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
