"""The benchmark: one CSV for each engine, one JSON line for each request; and what the HTTP server costs."""


rule benchmark_engine:
    input:
        engine="results/{name}/engines/{engine}/manifest.json",
        problems="results/{name}/problems/manifest.json",
    output:
        manifest="results/{name}/benchmark/{engine}/manifest.json",
        table="results/{name}/benchmark/{engine}/benchmark.csv",
        rates="results/{name}/benchmark/{engine}/rates.csv",
        bench_serve="results/{name}/benchmark/{engine}/bench_serve.jsonl",
        workloads="results/{name}/benchmark/{engine}/workloads.csv",
        requests="results/{name}/benchmark/{engine}/requests.jsonl",
        problems="results/{name}/benchmark/{engine}/problems.jsonl",
    log:
        "results/{name}/logs/benchmark_engine/{engine}.log",
    benchmark:
        "results/{name}/usage/benchmark_engine/{engine}.tsv"
    conda:
        "../../envs/base.yaml"
    threads: 64
    resources:
        machine=1,
        mem_mb=gigabytes(64),
        runtime=720,
    params:
        settings=settings("benchmark_engine"),
        code=code_hash("fourfold.benchmark.stage"),
        # A process of its own, which the stage starts.
        server=code_hash("fourfold.server.serve"),
        versions=versions("torch", "transformers", "tokenizers", "math-verify", "sympy", "httpx2", "uvicorn", "fastapi"),
    message:
        "Benchmarking engine {wildcards.engine}"
    shell:
        "fourfold --log {log} benchmark-engine --settings {params.settings:q}"
        " --engine {input.engine} --problems {input.problems} --output {output.manifest}"


rule measure_overhead:
    output:
        manifest="results/{name}/overhead/manifest.json",
        table="results/{name}/overhead/overhead.csv",
    log:
        "results/{name}/logs/measure_overhead.log",
    benchmark:
        "results/{name}/usage/measure_overhead.tsv"
    conda:
        "../../envs/base.yaml"
    threads: 64
    resources:
        machine=1,
        mem_mb=gigabytes(4),
        runtime=10,
    params:
        code=code_hash("fourfold.benchmark.overhead"),
        server=code_hash("fourfold.server.serve"),
        versions=versions("torch", "httpx2", "uvicorn", "fastapi"),
    message:
        "Measuring what the HTTP server costs"
    shell:
        "fourfold --log {log} measure-overhead --output {output.manifest}"
