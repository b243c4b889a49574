"""The engines: how much each drafts, and one self-contained directory each."""


rule tune_engine:
    input:
        target=engine_target,
        drafter="results/{name}/drafter/checkpoint/manifest.json",
        data="results/{name}/drafter/data/manifest.json",
    output:
        manifest="results/{name}/tuning/{engine}/manifest.json",
        plan="results/{name}/tuning/{engine}/plan.json",
        search="results/{name}/tuning/{engine}/search.csv",
    log:
        "results/{name}/logs/tune_engine/{engine}.log",
    benchmark:
        "results/{name}/usage/tune_engine/{engine}.tsv"
    conda:
        "../../envs/base.yaml"
    threads: 64
    resources:
        machine=1,
        mem_mb=gigabytes(64),
        runtime=120,
    params:
        settings=settings("tune_engine", "engine"),
        code=code_hash("fourfold.tuning.stage"),
        versions=versions("torch", "transformers", "tokenizers"),
    message:
        "Measuring how much engine {wildcards.engine} should draft"
    shell:
        "fourfold --log {log} tune-engine --settings {params.settings:q}"
        " --target {input.target} --drafter {input.drafter} --data {input.data} --output {output.manifest}"


rule build_engine:
    input:
        target=engine_target,
        drafter=engine_drafter,
        tuning=engine_tuning,
    output:
        manifest="results/{name}/engines/{engine}/manifest.json",
        engine="results/{name}/engines/{engine}/engine.json",
        model="results/{name}/engines/{engine}/model.safetensors",
    log:
        "results/{name}/logs/build_engine/{engine}.log",
    benchmark:
        "results/{name}/usage/build_engine/{engine}.tsv"
    wildcard_constraints:
        engine=engines_of("torch"),
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
        tuning=option("tuning"),
    message:
        "Building engine {wildcards.engine}"
    shell:
        "fourfold --log {log} build-engine --settings {params.settings:q}"
        " --target {input.target} {params.drafter} {params.tuning} --output {output.manifest}"
