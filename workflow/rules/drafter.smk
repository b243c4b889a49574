"""The drafter: its training data, its training, its evaluation."""


rule generate_drafter_data:
    input:
        target=drafter_target,
        problems="results/{name}/problems/manifest.json",
    output:
        manifest="results/{name}/drafter/data/manifest.json",
        train="results/{name}/drafter/data/train.jsonl",
    log:
        "results/{name}/logs/generate_drafter_data.log",
    benchmark:
        "results/{name}/usage/generate_drafter_data.tsv"
    conda:
        "../../envs/base.yaml"
    threads: 64
    resources:
        machine=1,
        mem_mb=gigabytes(64),
        runtime=1440,
    params:
        settings=settings("generate_drafter_data"),
        code=code_hash("fourfold.drafter.data"),
        versions=versions("torch", "transformers", "tokenizers"),
        work=work("drafter_data"),
    message:
        "Writing the texts that the drafter learns from"
    shell:
        "fourfold --log {log} generate-drafter-data --settings {params.settings:q}"
        " --target {input.target} --problems {input.problems} --work {params.work} --output {output.manifest}"


rule train_drafter:
    input:
        target=drafter_target,
        data="results/{name}/drafter/data/manifest.json",
    output:
        manifest="results/{name}/drafter/checkpoint/manifest.json",
        config="results/{name}/drafter/checkpoint/config.json",
        model="results/{name}/drafter/checkpoint/model.safetensors",
        training="results/{name}/drafter/checkpoint/training.csv",
    log:
        "results/{name}/logs/train_drafter.log",
    benchmark:
        "results/{name}/usage/train_drafter.tsv"
    conda:
        "../../envs/base.yaml"
    threads: 64
    resources:
        machine=1,
        mem_mb=gigabytes(96),
        runtime=1440,
    params:
        settings=settings("train_drafter"),
        code=code_hash("fourfold.drafter.train"),
        versions=versions("torch", "transformers", "tokenizers"),
        work=work("drafter_checkpoint"),
        command=training_command(),
    message:
        "Training the drafter"
    shell:
        "{params.command} --log {log} train-drafter --settings {params.settings:q}"
        " --target {input.target} --data {input.data} --work {params.work} --output {output.manifest}"


rule evaluate_drafter:
    input:
        target=drafter_target,
        drafter="results/{name}/drafter/checkpoint/manifest.json",
        problems="results/{name}/problems/manifest.json",
    output:
        manifest="results/{name}/drafter/evaluation/manifest.json",
        acceptance="results/{name}/drafter/evaluation/acceptance.csv",
        summary="results/{name}/drafter/evaluation/summary.csv",
    log:
        "results/{name}/logs/evaluate_drafter.log",
    benchmark:
        "results/{name}/usage/evaluate_drafter.tsv"
    conda:
        "../../envs/base.yaml"
    threads: 64
    resources:
        machine=1,
        mem_mb=gigabytes(64),
        runtime=240,
    params:
        settings=settings("evaluate_drafter"),
        code=code_hash("fourfold.drafter.evaluate"),
        versions=versions("torch", "transformers", "tokenizers"),
    message:
        "Measuring the drafter's acceptance on held-out problems"
    shell:
        "fourfold --log {log} evaluate-drafter --settings {params.settings:q}"
        " --target {input.target} --drafter {input.drafter} --problems {input.problems} --output {output.manifest}"
