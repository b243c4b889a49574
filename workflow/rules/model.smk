"""The base model: a Hugging Face checkpoint directory."""


localrules:
    fetch_model,


rule fetch_model:
    input:
        files=MODEL_FILES,
    output:
        manifest="results/{name}/model/manifest.json",
        config="results/{name}/model/config.json",
    log:
        "results/{name}/logs/fetch_model.log",
    benchmark:
        "results/{name}/usage/fetch_model.tsv"
    conda:
        "../../envs/base.yaml"
    threads: 64
    resources:
        machine=1,
        mem_mb=gigabytes(8),
        runtime=240,
    params:
        settings=settings("fetch_model"),
        code=code_hash("fourfold.model.stage"),
        versions=versions("torch", "transformers", "tokenizers", "gguf", "safetensors"),
    message:
        "Fetching the base model"
    shell:
        "fourfold --log {log} fetch-model --settings {params.settings:q} --output {output.manifest}"
