"""Commands for what is served: engines, the sandbox, a problem solved with both, any server measured."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import ValidationError

from fourfold.cli.program import Device, Problems, app
from fourfold.config.load import describe
from fourfold.errors import FourfoldError


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
