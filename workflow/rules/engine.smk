"""The engines: one self-contained directory each."""


rule build_engine:
    input:
        target=engine_target,
        drafter=engine_drafter,
    output:
        manifest="results/{name}/engines/{engine}/manifest.json",
        engine="results/{name}/engines/{engine}/engine.json",
        model="results/{name}/engines/{engine}/model.safetensors",
    log:
        "results/{name}/logs/build_engine/{engine}.log",
    benchmark:
        "results/{name}/usage/build_engine/{engine}.tsv"
    conda:
        "../../envs/base.yaml"
    threads: 64
    resources:
        machine=1,
        mem_mb=gigabytes(96),
        runtime=240,
    params:
        settings=settings("build_engine", "engine"),
        code=code_hash("fourfold.engine.build"),
        versions=versions("torch", "transformers", "safetensors"),
        drafter=option("drafter"),
    message:
        "Building engine {wildcards.engine}"
    shell:
        "fourfold --log {log} build-engine --settings {params.settings:q}"
        " --target {input.target} {params.drafter} --output {output.manifest}"
