"""Commands of the workflow's stages, in their order; its rules call them."""

from pathlib import Path
from typing import Annotated

import typer

from fourfold.cli.program import Device, Model, Output, Problems, Settings, Target, Work, app, manifest_option, parse


@app.command()
def fetch_model(settings: Settings, output: Output) -> None:
    """Fetches the base model: a Hugging Face checkpoint directory."""
    from fourfold.config.model import ModelSettings
    from fourfold.model.stage import fetch_model as stage

    stage(parse(ModelSettings, settings), output)


@app.command()
def fetch_problems(settings: Settings, output: Output) -> None:
    """Fetches the problems and splits them by a hash: train, calibration, benchmark."""
    from fourfold.config.problems import ProblemsSettings
    from fourfold.problems.stage import fetch_problems as stage

    stage(parse(ProblemsSettings, settings), output)


@app.command()
def build_calibration(settings: Settings, model: Model, problems: Problems, output: Output) -> None:
    """Writes the calibration texts: problems and solutions in the model's chat template."""
    from fourfold.calibration.stage import build_calibration as stage
    from fourfold.config.stages import CalibrationStage

    stage(parse(CalibrationStage, settings), model, problems, output)


@app.command()
def quantize_model(
    settings: Settings,
    model: Model,
    output: Output,
    calibration: Annotated[Path | None, manifest_option("the calibration texts (fp8)")] = None,
    device: Device = "auto",
) -> None:
    """Quantises the model with NVIDIA ModelOpt and exports the unified Hugging Face checkpoint."""
    from fourfold.config.stages import QuantizeStage
    from fourfold.quantize.stage import quantize_model as stage

    stage(parse(QuantizeStage, settings), model, calibration, output, device)


@app.command()
def compare_logits(
    settings: Settings,
    model: Model,
    checkpoint: Annotated[Path, manifest_option("the checkpoint in the engine's precision")],
    problems: Problems,
    output: Output,
    device: Device = "auto",
) -> None:
    """Measures how far an engine's logits are from the model's, on held-out problems."""
    from fourfold.config.stages import FidelityStage
    from fourfold.fidelity.stage import compare_logits as stage

    stage(parse(FidelityStage, settings), model, checkpoint, problems, output, device)


@app.command()
def generate_drafter_data(
    settings: Settings, target: Target, problems: Problems, work: Work, output: Output, device: Device = "auto"
) -> None:
    """Writes the texts that the drafter learns from: the target's own answers, or the dataset's."""
    from fourfold.config.stages import DrafterDataStage
    from fourfold.drafter.data import generate_drafter_data as stage

    stage(parse(DrafterDataStage, settings), target, problems, work, output, device)


@app.command()
def train_drafter(
    settings: Settings,
    target: Target,
    data: Annotated[Path, manifest_option("the drafter's training data")],
    work: Work,
    output: Output,
    device: Device = "auto",
) -> None:
    """Trains the ReDrafter on the frozen target; run it under torchrun for several processes."""
    from fourfold.config.stages import DrafterTrainStage
    from fourfold.drafter.train import train_drafter as stage

    stage(parse(DrafterTrainStage, settings), target, data, work, output, device)


@app.command()
def evaluate_drafter(
    settings: Settings,
    target: Target,
    drafter: Annotated[Path, manifest_option("the drafter")],
    problems: Problems,
    output: Output,
    device: Device = "auto",
) -> None:
    """Measures the drafter's acceptance on held-out problems."""
    from fourfold.config.stages import DrafterEvaluationStage
    from fourfold.drafter.evaluate import evaluate_drafter as stage

    stage(parse(DrafterEvaluationStage, settings), target, drafter, problems, output, device)


@app.command()
def tune_engine(
    settings: Settings,
    target: Target,
    drafter: Annotated[Path, manifest_option("the drafter")],
    data: Annotated[Path, manifest_option("the drafter's training data")],
    output: Output,
    device: Device = "auto",
) -> None:
    """Measures how much an engine should draft, for each number of running sequences."""
    from fourfold.config.engine import EngineSettings
    from fourfold.tuning.stage import tune_engine as stage

    stage(parse(EngineSettings, settings), target, drafter, data, output, device)


@app.command()
def build_engine(
    settings: Settings,
    target: Target,
    output: Output,
    drafter: Annotated[Path | None, manifest_option("the drafter")] = None,
    tuning: Annotated[Path | None, manifest_option("the measured draft plan")] = None,
) -> None:
    """Combines checkpoint, drafter and tokenizer into one self-contained engine directory."""
    from fourfold.config.engine import EngineSettings
    from fourfold.engine.build import build_engine as stage

    stage(parse(EngineSettings, settings), target, drafter, tuning, output)


@app.command()
def convert_checkpoint(
    settings: Settings,
    target: Annotated[Path, manifest_option("the checkpoint of the precision; for int8_wo the model's")],
    output: Output,
) -> None:
    """Writes a TensorRT-LLM checkpoint, split over the GPUs that will share the model, and checks it."""
    from fourfold.config.stages import ConvertStage
    from fourfold.trtllm.convert import convert_checkpoint as stage

    stage(parse(ConvertStage, settings), target, output)


@app.command()
def merge_drafter(
    settings: Settings,
    checkpoint: Annotated[Path, manifest_option("the base's TensorRT-LLM checkpoint")],
    drafter: Annotated[Path, manifest_option("the drafter")],
    output: Output,
) -> None:
    """Merges a ReDrafter into a TensorRT-LLM checkpoint, and checks the result."""
    from fourfold.config.stages import MergeStage
    from fourfold.trtllm.merge import merge_drafter as stage

    stage(parse(MergeStage, settings), checkpoint, drafter, output)


@app.command()
def pack_engine(
    settings: Settings,
    checkpoint: Annotated[Path, manifest_option("the TensorRT-LLM checkpoint that was built")],
    compiled: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="config.json that trtllm-build wrote.")],
    output: Output,
) -> None:
    """Makes what trtllm-build wrote an engine like any other: checked, with its tokenizer."""
    from fourfold.config.stages import TensorrtLlmStage
    from fourfold.trtllm.pack import pack_engine as stage

    stage(parse(TensorrtLlmStage, settings), checkpoint, compiled, output)


@app.command()
def benchmark_engine(
    settings: Settings,
    engine: Annotated[Path, manifest_option("the engine")],
    problems: Problems,
    output: Output,
    device: Device = "auto",
) -> None:
    """Measures an engine: latency, throughput, acceptance, accuracy; one CSV, one JSON line a request."""
    from fourfold.benchmark.stage import benchmark_engine as stage
    from fourfold.config.stages import BenchmarkStage

    stage(parse(BenchmarkStage, settings), engine, problems, output, device)


@app.command()
def measure_overhead(output: Output, device: Device = "auto") -> None:
    """Measures what the HTTP server adds to the engine's time per token."""
    from fourfold.benchmark.overhead import measure_overhead as stage

    stage(output, device)


@app.command()
def make_report(
    settings: Settings,
    benchmark: Annotated[list[Path], manifest_option("a benchmark; give one for each engine, in order")],
    output: Output,
    drafter: Annotated[Path | None, manifest_option("the drafter")] = None,
    evaluation: Annotated[Path | None, manifest_option("the drafter's evaluation")] = None,
    fidelity: Annotated[
        list[Path] | None, manifest_option("a precision's logits error; may be given several times")
    ] = None,
    overhead: Annotated[Path | None, manifest_option("what the server costs")] = None,
) -> None:
    """Writes the combined CSV, the tables and the plots."""
    from fourfold.config.benchmark import ReportSettings
    from fourfold.report.stage import make_report as stage

    stage(parse(ReportSettings, settings), benchmark, drafter, evaluation, fidelity or [], overhead, output)
