#!/usr/bin/env bash
# Snakemake runs this inside the new environment; the Snakefile sets FOURFOLD_CHECKOUT.
set -euo pipefail
python -m pip install --requirement "$FOURFOLD_CHECKOUT/envs/requirements.txt"
python -m pip install --no-deps --no-build-isolation --editable "$FOURFOLD_CHECKOUT"
