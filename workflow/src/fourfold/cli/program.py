"""The program: options that commands share, and how errors reach the user."""

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

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
