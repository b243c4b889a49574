"""The report: combined CSV, tables and plots."""


localrules:
    make_report,


rule make_report:
    input:
        benchmark=benchmark_manifests(),
        drafter=drafter_part("checkpoint"),
        evaluation=drafter_part("evaluation"),
        fidelity=fidelity_manifests(),
        overhead=f"{RESULTS}/overhead/manifest.json",
    output:
        manifest="results/{name}/report/manifest.json",
        benchmark=report_file(BENCHMARK, "benchmark", table="All measurements"),
        table1=report_file("table1.html", "table1", table="Comparison"),
        gate=report_file("gate.html", "gate", table="Accuracy gate"),
        provenance=report_file("provenance.html", "provenance", table="What made the numbers"),
        overview=report_file(OVERVIEW, "overview", table="Everything on one page"),
        plots=report_plots(),
        tables=report_tables(),
    log:
        "results/{name}/logs/make_report.log",
    benchmark:
        "results/{name}/usage/make_report.tsv"
    conda:
        "../../envs/base.yaml"
    threads: 1
    resources:
        machine=1,
        mem_mb=gigabytes(4),
        runtime=30,
    params:
        settings=settings("make_report"),
        code=code_hash("fourfold.report.stage"),
        versions=versions("matplotlib", "jinja2"),
        # The first engine is the one that speed-ups refer to; Snakemake compares inputs without their order.
        engines=list(CONFIG.engines),
        benchmark=option("benchmark"),
        drafter=option("drafter"),
        evaluation=option("evaluation"),
        fidelity=option("fidelity"),
        overhead=option("overhead"),
    message:
        "Drawing the report"
    shell:
        "fourfold --log {log} make-report --settings {params.settings:q}"
        " {params.benchmark} {params.drafter} {params.evaluation} {params.fidelity} {params.overhead}"
        " --output {output.manifest}"
