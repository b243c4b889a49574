"""The calibration texts: problems and solutions in the model's chat template."""


rule build_calibration:
    input:
        model="results/{name}/model/manifest.json",
        problems="results/{name}/problems/manifest.json",
    output:
        manifest="results/{name}/calibration/manifest.json",
        data="results/{name}/calibration/data.parquet",
    log:
        "results/{name}/logs/build_calibration.log",
    benchmark:
        "results/{name}/usage/build_calibration.tsv"
    conda:
        "../../envs/base.yaml"
    threads: 1
    resources:
        machine=1,
        mem_mb=gigabytes(4),
        runtime=30,
    params:
        settings=settings("build_calibration"),
        code=code_hash("fourfold.calibration.stage"),
        versions=versions("transformers", "tokenizers", "pyarrow"),
    message:
        "Writing the calibration texts"
    shell:
        "fourfold --log {log} build-calibration --settings {params.settings:q}"
        " --model {input.model} --problems {input.problems} --output {output.manifest}"
