"""The rules: lint-clean, and each with everything that a rule needs."""

import re

import pytest
from conftest import CHECKOUT, Workspace

RULES = {
    match[1]: match[2]
    for path in sorted((CHECKOUT / "workflow" / "rules").glob("*.smk"))
    for match in re.finditer(r"^rule (\w+):\n((?:    .*\n|\n)+)", path.read_text(encoding="utf-8"), re.MULTILINE)
}
DIRECTIVES = ["input", "output", "log", "benchmark", "conda", "threads", "resources", "params", "message", "shell"]

WITHOUT_CONFIGURATION = {"measure_overhead"}
"""Rules that read neither configuration nor artifacts: this one has a model of its own."""


def test_all_stages_have_their_rule() -> None:
    assert set(RULES) == {
        "fetch_model",
        "fetch_problems",
        "build_calibration",
        "quantize_model",
        "compare_logits",
        "generate_drafter_data",
        "train_drafter",
        "evaluate_drafter",
        "tune_engine",
        "build_engine",
        "benchmark_engine",
        "measure_overhead",
        "make_report",
    }


@pytest.mark.parametrize("name", RULES)
def test_a_rule_states_everything(name: str) -> None:
    body = RULES[name]
    alone = name in WITHOUT_CONFIGURATION
    assert re.findall(r"^    (\w+):", body, re.MULTILINE) == DIRECTIVES[alone:]
    assert re.search(r"output:\n        manifest=", body), "the manifest comes first"
    assert alone or f'settings=settings("{name}"' in body
    for part in ("code=code_hash(", "versions=versions(", "machine=1", "mem_mb=", "runtime="):
        assert part in body
    assert "directory(" not in body
    options = "--output {output.manifest}" if alone else "--settings {params.settings:q}"
    assert f" {name.replace('_', '-')} {options}" in body.replace('"\n        "', "")


def test_snakemake_finds_nothing_to_criticise(workspace: Workspace) -> None:
    run = workspace.snakemake("--lint", "--configfile", "config/tiny.yaml")
    assert run.returncode == 0, run.output
