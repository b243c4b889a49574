"""The command line: one command a stage, the same that the workflow's rules call.

Stages are imported inside the commands, so that `fourfold --help` and a dry run stay quick.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from pydantic import TypeAdapter, ValidationError

from fourfold.artifacts import check_folder, check_place
from fourfold.config.load import describe
from fourfold.errors import FourfoldError, refusal
from fourfold.progress import logger, start_logging

app = typer.Typer(
    help="Fast math inference as file targets: every stage of the workflow as a command.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def manifest_option(what: str) -> Any:
    """An option that names an artifact by its manifest."""
    return typer.Option(exists=True, dir_okay=False, help=f"manifest.json of {what}.")


Settings = Annotated[str, typer.Option(help="The stage's part of the configuration, as JSON.")]
Output = Annotated[Path, typer.Option(callback=check_place, help="manifest.json of the artifact to write.")]
Model = Annotated[Path, manifest_option("the model's checkpoint")]
Target = Annotated[Path, manifest_option("the checkpoint to draft for")]
Problems = Annotated[Path, manifest_option("the problems")]
Work = Annotated[Path, typer.Option(callback=check_folder, help="Folder for what a killed run resumes from.")]


def take_gpu(device: str) -> str:
    """The device; where it may be a GPU, one that no other process has."""
    from fourfold.profiles.gpus import take_gpus

    if device in ("auto", "cuda"):
        take_gpus()
    return device


Device = Annotated[str, typer.Option(envvar="FOURFOLD_DEVICE", callback=take_gpu, help="auto, cpu or cuda.")]


@app.callback()
def main(
    context: typer.Context,
    log: Annotated[Path | None, typer.Option(help="Also write messages and all other output to this file.")] = None,
) -> None:
    """Sets up logging for every command."""
    context.call_on_close(start_logging(log))


def parse(kind: Any, text: str) -> Any:
    """Reads a section of the configuration from JSON. Raises FourfoldError."""
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise FourfoldError(f"--settings: {describe(error)}") from None


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
    quantized: Annotated[Path, manifest_option("the quantised checkpoint")],
    problems: Problems,
    output: Output,
    device: Device = "auto",
) -> None:
    """Measures how far a quantised checkpoint's logits are from the model's, on held-out problems."""
    from fourfold.config.stages import FidelityStage
    from fourfold.fidelity.stage import compare_logits as stage

    stage(parse(FidelityStage, settings), model, quantized, problems, output, device)


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
def check_checkpoint(
    directory: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="config.json and rank*.safetensors.")],
) -> None:
    """Checks a TensorRT-LLM checkpoint, whoever wrote it: keys, tensors, shapes, dtypes, scales."""
    from fourfold.trtllm.validate import validate_checkpoint

    config = validate_checkpoint(directory)
    typer.echo(f"{directory}: a whole {config['architecture']} for {config['mapping']['tp_size']} GPUs")


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
def bench_serve(
    problems: Problems,
    output: Annotated[Path, typer.Option(help="JSONL file to write, one line a load: the fields of vllm bench serve.")],
    base_url: Annotated[str, typer.Option(help="The server's address.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="FOURFOLD_API_KEY", help="The server's key.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The model's tokenizer; if not given, the directory that the server names.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(help="Problems to ask.")] = 16,
    max_concurrency: Annotated[list[int], typer.Option(help="Requests at once; may be given several times.")] = [8],  # noqa: B006
    request_rate: Annotated[
        list[float] | None, typer.Option(help="Requests a second; may be given several times.")
    ] = None,
    burstiness: Annotated[float, typer.Option(help="1: a Poisson process; less: in bursts; more: evenly.")] = 1.0,
    goodput: Annotated[
        list[str] | None, typer.Option(help="Limits of good requests in seconds: ttft:1, tpot:0.05, e2e_latency:20.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    repeats: Annotated[int, typer.Option(help="From 2 on, there are intervals.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 0,
) -> None:
    """Measures any server with OpenAI's API that runs already."""
    from fourfold.benchmark.any_server import bench_serve as program
    from fourfold.benchmark.any_server import parse_goodput
    from fourfold.config.benchmark import BenchmarkSettings

    settings = {
        "problems": num_prompts,
        "concurrency": max_concurrency,
        "request_rate": request_rate or [],
        "burstiness": burstiness,
        "goodput": parse_goodput(goodput or []),
        "same_problem": False,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "repeats": repeats,
        "seed": seed,
    }
    try:
        checked = BenchmarkSettings.model_validate(settings)
    except ValidationError as error:
        raise FourfoldError(describe(error)) from None
    program(base_url, problems, output, checked, api_key=api_key, tokenizer=tokenizer)


@app.command()
def measure_overhead(output: Output, device: Device = "auto") -> None:
    """Measures what the HTTP server adds to the engine's time per token."""
    from fourfold.benchmark.overhead import measure_overhead as stage

    stage(output, device)


@app.command()
def serve(
    engine: Annotated[Path, typer.Argument(help="The engine's directory: results/NAME/engines/ENGINE.")],
    host: Annotated[str, typer.Option(help="Address to listen on; any but loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="FOURFOLD_API_KEY", help="What clients must send as a bearer token.")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="The model's name for clients; the directory's if not given.")
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait for a slot.")] = 512,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Largest body of a request.")] = 4 * 2**20,
    request_seconds: Annotated[float, typer.Option(min=0, help="Longest time of a request.")] = 3600,
    drain_seconds: Annotated[int, typer.Option(min=0, help="Time to end what runs after SIGTERM.")] = 60,
    device: Device = "auto",
    enable_prefix_caching: Annotated[
        bool, typer.Option(help="Keep what ended requests left in the cache for prompts that begin alike.")
    ] = True,
) -> None:
    """Serves an engine over HTTP, with OpenAI's API, until SIGTERM or Ctrl-C."""
    from fourfold.server.guard import Limits
    from fourfold.server.serve import serve as program

    program(
        engine,
        host=host,
        port=port,
        api_key=api_key,
        served_model_name=served_model_name,
        max_waiting=max_waiting,
        drain_seconds=drain_seconds,
        limits=Limits(body_bytes=max_body_bytes, request_seconds=request_seconds),
        device=device,
        enable_prefix_caching=enable_prefix_caching,
    )


@app.command()
def solve(
    problem: Annotated[str, typer.Argument(help="The problem's text.")],
    engine: Annotated[
        Path | None, typer.Option(help="An engine's directory, served for this problem; instead of --server.")
    ] = None,
    server: Annotated[str | None, typer.Option(help="Address of a running server with OpenAI's API.")] = None,
    sandbox: Annotated[str | None, typer.Option(help="Address of a running sandbox; else one is started.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The model's name at the server; the first one's by default.")
    ] = None,
    preset: Annotated[
        Literal["openmath", "qwen", "llama3"], typer.Option(help="Tags of code and output.")
    ] = "openmath",
    prompt: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Text file with {problem} to be continued, instead of the chat template."
        ),
    ] = None,
    max_code_executions: Annotated[int, typer.Option(min=0, help="Calls that are run.")] = 8,
    code_execution_timeout: Annotated[float, typer.Option(min=0.1, max=60, help="Seconds of a call.")] = 10.0,
    max_code_output_characters: Annotated[int, typer.Option(min=0, help="Longest output of a call.")] = 1000,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, output of code included.")] = 2048,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the first generation; the next have the following ones.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the answer; may be given several times.")
    ] = None,
    generations: Annotated[int, typer.Option(min=1, help="Answers to begin at once.")] = 1,
    keep_first: Annotated[int | None, typer.Option(min=1, help="Stop when this many have ended.")] = None,
    max_seconds: Annotated[float | None, typer.Option(min=0, help="Stop after this long.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the answers to.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="FOURFOLD_API_KEY", help="The server's key.")] = None,
    sandbox_api_key: Annotated[
        str | None, typer.Option(envvar="FOURFOLD_SANDBOX_API_KEY", help="The sandbox's key.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Answers a problem with a model that may run Python in a sandbox while it does."""
    from contextlib import ExitStack

    from fourfold.config.tools import ToolSettings
    from fourfold.engine.requests import SamplingParams
    from fourfold.tools.run import engine_server, print_solution, sandbox_service

    if (engine is None) == (server is None):
        raise FourfoldError("give either --engine, a directory to serve, or --server, an address")
    settings = ToolSettings(
        preset=preset,
        max_code_executions=max_code_executions,
        code_execution_timeout=code_execution_timeout,
        max_code_output_characters=max_code_output_characters,
    )
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=tuple(stop or ())
    )
    with ExitStack() as stack:
        print_solution(
            server or stack.enter_context(engine_server(engine or Path(), device)),
            sandbox or stack.enter_context(sandbox_service()),
            problem,
            params,
            settings,
            prompt=prompt,
            generations=generations,
            keep_first=keep_first,
            max_seconds=max_seconds,
            model=model,
            api_key=api_key,
            sandbox_api_key=sandbox_api_key,
            output=output,
        )


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


@app.command()
def check_device(
    precision: Annotated[str, typer.Option(help="bf16, fp8 or int8_wo.")],
    device: Annotated[str, typer.Option(envvar="FOURFOLD_DEVICE", help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Makes sure that this machine's device can compute in a precision; the workflow asks before its first job."""
    from fourfold.modeling.checkpoint import check_device, resolve_device

    check_device(resolve_device(device), precision)


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
def sandbox(
    host: Annotated[str, typer.Option(help="Address to listen on; any but loopback needs --api-key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 6000,
    api_key: Annotated[
        str, typer.Option(envvar="FOURFOLD_SANDBOX_API_KEY", help="Bearer token that clients must send.")
    ] = "",
    admin_key: Annotated[
        str, typer.Option(envvar="FOURFOLD_SANDBOX_ADMIN_KEY", help="Bearer token that lists sessions, if given.")
    ] = "",
    ready: Annotated[int, typer.Option(help="Sandboxes to keep ready for new sessions.", min=1)] = 2,
    max_sessions: Annotated[
        int | None, typer.Option(help="Sandboxes at once; default: as many as fit in the memory that is free.", min=1)
    ] = None,
    max_running: Annotated[int | None, typer.Option(help="Cells at once; default: one a core.", min=1)] = None,
) -> None:
    """Serves Python sessions, each in an isolated process: code that a model wrote, kept away from this machine."""
    from fourfold.sandbox.pool import PoolSettings
    from fourfold.sandbox.server import serve

    serve(host, port, api_key, PoolSettings.for_this_machine(ready, max_sessions, max_running), admin_key)


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
    problems: Annotated[Path | None, manifest_option("problems for real text")] = None,
    parts: Annotated[list[str], typer.Option(help="steps, text, oracle, recipe; may be given several times.")] = [],  # noqa: B006
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
    program(settings, output, model, drafter, problems, device)


@app.command()
def plot_gpu(
    rows: Annotated[Path, typer.Option(help="CSV file that bench-gpu wrote.")],
    output: Annotated[Path, typer.Option(help="SVG file to write.")],
) -> None:
    """Draws bench-gpu's curve of speed over held acceptance."""
    from fourfold.report.plots_gpu import plot_gpu as program

    program(rows, output)


def run() -> None:
    """Entry point: bad input, and what the machine refuses, is one line and exit code 1 (78 where the sandbox cannot
    isolate); the rest is a traceback.
    """
    try:
        app()
    except FourfoldError as error:
        _fail(str(error), error.exit_code)
    except Exception as error:
        reason = refusal(error)
        if reason is None:
            logger.exception("unexpected error")
            sys.exit(2)
        path = error.filename if isinstance(error, OSError) else None
        _fail(reason if path is None else f"{path}: {reason}")


def _fail(text: str, code: int = 1) -> NoReturn:
    # One line, whatever a library or a file's name brought into it.
    logger.error("error: %s", " ".join(text.splitlines()))
    sys.exit(code)


if __name__ == "__main__":
    # For torchrun: `torchrun … -m fourfold.cli COMMAND`.
    run()
