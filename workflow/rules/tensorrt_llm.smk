"""TensorRT-LLM: checkpoints split over GPUs, the drafter merged in, engines built and packed."""


rule convert_checkpoint:
    input:
        target=convert_target,
    output:
        manifest="results/{name}/tensorrt_llm/checkpoint/{layout}/manifest.json",
        config="results/{name}/tensorrt_llm/checkpoint/{layout}/config.json",
    log:
        "results/{name}/logs/convert_checkpoint/{layout}.log",
    benchmark:
        "results/{name}/usage/convert_checkpoint/{layout}.tsv"
    conda:
        "../../envs/base.yaml"
    threads: 64
    resources:
        machine=1,
        mem_mb=gigabytes(96),
        runtime=240,
    params:
        settings=settings("convert_checkpoint", "layout"),
        code=code_hash("fourfold.trtllm.convert"),
        versions=versions("torch", "transformers", "safetensors"),
    message:
        "Writing the TensorRT-LLM checkpoint {wildcards.layout}"
    shell:
        "fourfold --log {log} convert-checkpoint --settings {params.settings:q}"
        " --target {input.target} --output {output.manifest}"


rule merge_drafter:
    input:
        checkpoint=base_checkpoint,
        drafter="results/{name}/drafter/checkpoint/manifest.json",
    output:
        manifest="results/{name}/tensorrt_llm/merged/{engine}/manifest.json",
        config="results/{name}/tensorrt_llm/merged/{engine}/config.json",
    log:
        "results/{name}/logs/merge_drafter/{engine}.log",
    benchmark:
        "results/{name}/usage/merge_drafter/{engine}.tsv"
    conda:
        "../../envs/base.yaml"
    threads: 64
    resources:
        machine=1,
        mem_mb=gigabytes(96),
        runtime=240,
    params:
        settings=settings("merge_drafter", "engine"),
        code=code_hash("fourfold.trtllm.merge"),
        versions=versions("torch", "safetensors"),
    message:
        "Merging the drafter into the TensorRT-LLM checkpoint of engine {wildcards.engine}"
    shell:
        "fourfold --log {log} merge-drafter --settings {params.settings:q}"
        " --checkpoint {input.checkpoint} --drafter {input.drafter} --output {output.manifest}"


# Runs in NVIDIA's container, where nothing of envs/base is: the guard needs Python alone. What the engine depends on is
# in the command line. Its files beside config.json are as many as GPUs; pack_engine checks them.
rule compile_engine:
    input:
        checkpoint=compiled_checkpoint,
    output:
        config="results/{name}/tensorrt_llm/compiled/{engine}/config.json",
    log:
        "results/{name}/logs/compile_engine/{engine}.log",
    benchmark:
        "results/{name}/usage/compile_engine/{engine}.tsv"
    container:
        tensorrt_llm_image(CONFIG.tensorrt_llm.version)
    threads: 64
    resources:
        machine=1,
        mem_mb=gigabytes(128),
        runtime=240,
    params:
        guard=guard_options,
        build=build_options,
    message:
        "Building engine {wildcards.engine} with TensorRT-LLM"
    shell:
        '(PYTHONPATH="$FOURFOLD_CHECKOUT/workflow/src" python3 -m fourfold.trtllm.guard {params.guard}'
        " && {params.build}) 2>&1 | tee {log:q}"


rule pack_engine:
    input:
        checkpoint=compiled_checkpoint,
        compiled="results/{name}/tensorrt_llm/compiled/{engine}/config.json",
    output:
        manifest="results/{name}/engines/{engine}/manifest.json",
        engine="results/{name}/engines/{engine}/engine.json",
        config="results/{name}/engines/{engine}/config.json",
    log:
        "results/{name}/logs/pack_engine/{engine}.log",
    benchmark:
        "results/{name}/usage/pack_engine/{engine}.tsv"
    wildcard_constraints:
        engine=engines_of("tensorrt_llm"),
    conda:
        "../../envs/base.yaml"
    threads: 64
    resources:
        machine=1,
        mem_mb=gigabytes(8),
        runtime=60,
    params:
        settings=settings("pack_engine", "engine"),
        code=code_hash("fourfold.trtllm.pack"),
        versions=versions("safetensors"),
    message:
        "Packing engine {wildcards.engine}"
    shell:
        "fourfold --log {log} pack-engine --settings {params.settings:q}"
        " --checkpoint {input.checkpoint} --compiled {input.compiled} --output {output.manifest}"
