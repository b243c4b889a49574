"""The quantised checkpoints, and how far engines' logits are from the model's."""


rule quantize_model:
    input:
        model="results/{name}/model/manifest.json",
        calibration=calibration_texts,
    output:
        manifest="results/{name}/quantize/{precision}/manifest.json",
        config="results/{name}/quantize/{precision}/config.json",
    log:
        "results/{name}/logs/quantize_model/{precision}.log",
    benchmark:
        "results/{name}/usage/quantize_model/{precision}.tsv"
    conda:
        "../../envs/base.yaml"
    threads: 64
    resources:
        machine=1,
        mem_mb=gigabytes(96),
        runtime=240,
    params:
        settings=settings("quantize_model", "precision"),
        code=code_hash("fourfold.quantize.stage"),
        versions=versions("torch", "transformers", "nvidia-modelopt", "safetensors"),
        calibration=option("calibration"),
    message:
        "Quantising the model to {wildcards.precision}"
    shell:
        "fourfold --log {log} quantize-model --settings {params.settings:q}"
        " --model {input.model} {params.calibration} --output {output.manifest}"


rule compare_logits:
    input:
        model="results/{name}/model/manifest.json",
        checkpoint=compared_checkpoint,
        problems="results/{name}/problems/manifest.json",
    output:
        manifest="results/{name}/fidelity/{numerics}/manifest.json",
        texts="results/{name}/fidelity/{numerics}/texts.csv",
        summary="results/{name}/fidelity/{numerics}/summary.csv",
    log:
        "results/{name}/logs/compare_logits/{numerics}.log",
    benchmark:
        "results/{name}/usage/compare_logits/{numerics}.tsv"
    conda:
        "../../envs/base.yaml"
    threads: 64
    resources:
        machine=1,
        mem_mb=gigabytes(96),
        runtime=120,
    params:
        settings=settings("compare_logits", "numerics"),
        code=code_hash("fourfold.fidelity.stage"),
        versions=versions("torch", "transformers", "tokenizers"),
    message:
        "Comparing the logits of {wildcards.numerics} with the model's"
    shell:
        "fourfold --log {log} compare-logits --settings {params.settings:q}"
        " --model {input.model} --checkpoint {input.checkpoint} --problems {input.problems} --output {output.manifest}"
