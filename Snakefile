"""fourfold: base model -> quantised checkpoints -> drafter -> engines -> benchmarks -> report."""

from snakemake.utils import min_version

min_version("9.27.0")


report: "workflow/report/workflow.rst"


# `--configfile` replaces the default configuration instead of being merged over it.
if not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/model.smk"
include: "workflow/rules/problems.smk"
include: "workflow/rules/calibration.smk"
include: "workflow/rules/quantize.smk"
include: "workflow/rules/drafter.smk"
include: "workflow/rules/engine.smk"
include: "workflow/rules/tensorrt_llm.smk"
include: "workflow/rules/benchmark.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        report_manifest(),


rule report:
    input:
        report_manifest(),


rule quantize:
    input:
        quantized_manifests(),


rule draft:
    input:
        drafter_manifests(),


rule engine:
    input:
        engine_manifests(),


rule bench:
    input:
        benchmark_manifests(),


# A notebook that serves the last engine, solves a problem with tools, and draws the engines' comparison. It needs the
# sandbox, hence bubblewrap.
rule notebook:
    input:
        notebook="workflow/notebooks/solve.ipynb",
        engines=engine_manifests(),
        benchmarks=benchmark_manifests(),
    output:
        f"{RESULTS}/notebook/solve.ipynb",
    log:
        f"{RESULTS}/logs/notebook.log",
    conda:
        "envs/base.yaml"
    threads: 64
    resources:
        machine=1,
        mem_mb=gigabytes(64),
        runtime=60,
    params:
        engine=list(CONFIG.engines)[-1],
        code=code_hash("fourfold.tools.run"),
    message:
        "Running the notebook for engine {params.engine}"
    shell:
        # Its paths are seen from the notebook's folder.
        'folder=$(realpath "$(dirname {output:q})")'
        ' && FOURFOLD_RESULTS="$folder/.." FOURFOLD_ENGINE={params.engine:q}'
        ' jupyter-execute {input.notebook:q} --output="$folder/solve.ipynb" >{log:q} 2>&1'


# `snakemake serve_ENGINE` serves an engine, built first if need be, until Ctrl-C; `fourfold serve` has more options.
for name in CONFIG.engines:

    rule:
        name:
            f"serve_{name}"
        input:
            f"{RESULTS}/engines/{name}/manifest.json",
        log:
            f"{RESULTS}/logs/serve/{name}.log",
        localrule: True
        conda:
            "envs/base.yaml"
        threads: 64
        resources:
            machine=1,
        message:
            serving_message(name)
        shell:
            f"fourfold --log {{log:q}} serve {RESULTS}/engines/{name}"


onstart:
    refuse_missing_backends()
    refuse_unfit_device()
    refuse_missing_gpus()
    say_why_jobs_wait()


onsuccess:
    make_html_report()
