"""The quantised checkpoints."""


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
