"""Commands that check or measure this machine and what lies on it."""

import gc
import os
from pathlib import Path
from typing import Annotated

import typer

from fourfold.cli.program import Device, Model, Problems, app, manifest_option


@app.command()
def check_device(
    fp8: Annotated[str, typer.Option(help="The configuration's key that asks for FP8.")],
    device: Annotated[str, typer.Option(envvar="FOURFOLD_DEVICE", help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Makes sure that this machine's device can compute in FP8; the workflow asks before its first job."""
    from fourfold.modeling.checkpoint import check_fp8, resolve_device

    check_fp8(resolve_device(device), f"{fp8}: fp8", "use precision int8_wo or bf16, and no fp8 options")


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def on_gpus(
    count: Annotated[int, typer.Argument(min=1, help="GPUs to take.")],
    command: Annotated[list[str], typer.Argument(help="The command, and its arguments.")],
) -> None:
    """Runs a command on so many GPUs that no other process has; where there is no GPU, it just runs."""
    from fourfold.profiles.gpus import take_gpus

    take_gpus(count, keep_in_exec=True)
    os.execvp(command[0], command)


@app.command()
def check_checkpoint(
    directory: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="config.json and rank*.safetensors.")],
) -> None:
    """Checks a TensorRT-LLM checkpoint, whoever wrote it: keys, tensors, shapes, dtypes, scales."""
    from fourfold.trtllm.validate import validate_checkpoint

    config = validate_checkpoint(directory)
    typer.echo(f"{directory}: a whole {config['architecture']} for {config['mapping']['tp_size']} GPUs")


@app.command()
def compare_transformers(
    model: Model,
    problems: Problems,
    output: Annotated[Path, typer.Option(help="CSV file to write: one row a measurement.")],
    concurrency: Annotated[list[int], typer.Option(help="Prompts at once; may be given several times.")] = [1, 8],  # noqa: B006
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 64,
    rounds: Annotated[int, typer.Option(help="Measurements of each side, alternated.")] = 3,
) -> None:
    """Measures plain decoding of the engine beside transformers.generate, on the CPU."""
    from fourfold.benchmark.compare import compare_transformers as program

    program(model, problems, output, concurrency, new_tokens, rounds)


@app.command()
def measure_sandbox(
    cells: Annotated[int, typer.Option(help="Cells (`1+1`) to time in one session.", min=100)] = 2000,
    starts: Annotated[int, typer.Option(help="Sandboxes to start, one after another.", min=1)] = 6,
) -> None:
    """Prints what a sandbox costs on this machine: start, hand-out, a cell, memory."""
    from fourfold.sandbox.figures import measure

    typer.echo(measure(cells, starts))


@app.command()
def bench_gpu(
    output: Annotated[Path, typer.Option(help="CSV file to write: one row a case.")],
    model: Annotated[Path | None, manifest_option("a small bf16 model to carry; else weights are random")] = None,
    drafter: Annotated[Path | None, manifest_option("that model's drafter")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Configuration by whose section drafter one is trained; not with --drafter.",
        ),
    ] = None,
    problems: Annotated[Path | None, manifest_option("problems for real text")] = None,
    parts: Annotated[
        list[str], typer.Option(help="drafter, steps, text, oracle, recipe; may be given several times.")
    ] = [],  # noqa: B006
    sequences: Annotated[list[int], typer.Option(help="Sequences at once; may be given several times.")] = [1, 12, 32],  # noqa: B006
    contexts: Annotated[list[int], typer.Option(help="Tokens of a prompt; may be given several times.")] = [200, 2200],  # noqa: B006
    steps: Annotated[int, typer.Option(help="Steps of each case, of which the median counts.")] = 30,
    drafts: Annotated[int, typer.Option(help="Draft tokens of a verification.")] = 3,
    draft_vocab_size: Annotated[int, typer.Option(help="Tokens that a random drafter drafts among.")] = 32768,
    fp8_drafter: Annotated[bool, typer.Option(help="Compute the drafter in FP8 too; on a CPU it is not.")] = True,
    answers: Annotated[int, typer.Option(help="About how many answers to each kind of problem.")] = 24,
    max_tokens: Annotated[int, typer.Option(help="Longest answer to a problem.")] = 256,
    longest: Annotated[int, typer.Option(help="Longest answer of the recipe's workload, tokens.")] = 1600,
    device: Device = "auto",
) -> None:
    """Checks a GPU, then times a 14B shape on it: bf16, FP8, FP8 with a drafter; steps, real text, held acceptance."""
    from fourfold.benchmark.gpu import GpuBenchmark
    from fourfold.benchmark.gpu import benchmark_gpu as program

    settings = GpuBenchmark(
        parts=tuple(parts) or GpuBenchmark.parts,
        sequences=tuple(sequences),
        contexts=tuple(contexts),
        steps=steps,
        drafts=drafts,
        draft_vocab_size=draft_vocab_size,
        fp8_drafter=fp8_drafter,
        answers=answers,
        max_tokens=max_tokens,
        longest=longest,
    )
    # What has been imported stays: looking through it before each of a hundred engines would take a while.
    gc.freeze()
    program(settings, output, model, drafter, problems, device, config=config)


@app.command()
def plot_gpu(
    rows: Annotated[Path, typer.Option(help="CSV file that bench-gpu wrote.")],
    output: Annotated[Path, typer.Option(help="SVG file to write.")],
) -> None:
    """Draws bench-gpu's curve of speed over held acceptance."""
    from fourfold.report.plots_gpu import plot_gpu as program

    program(rows, output)
