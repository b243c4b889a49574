"""The problems, split by a hash: for training, for calibration, for the benchmark, and of groups seen by none."""


localrules:
    fetch_problems,


rule fetch_problems:
    input:
        files=PROBLEM_FILES,
    output:
        manifest="results/{name}/problems/manifest.json",
        train="results/{name}/problems/train.jsonl",
        calibration="results/{name}/problems/calibration.jsonl",
        benchmark="results/{name}/problems/benchmark.jsonl",
        unseen="results/{name}/problems/unseen.jsonl",
    log:
        "results/{name}/logs/fetch_problems.log",
    benchmark:
        "results/{name}/usage/fetch_problems.tsv"
    conda:
        "../../envs/base.yaml"
    threads: 1
    resources:
        machine=1,
        mem_mb=gigabytes(4),
        runtime=120,
    params:
        settings=settings("fetch_problems"),
        code=code_hash("fourfold.problems.stage"),
        versions=versions("datasets"),
    message:
        "Fetching and splitting the problems"
    shell:
        "fourfold --log {log} fetch-problems --settings {params.settings:q} --output {output.manifest}"
