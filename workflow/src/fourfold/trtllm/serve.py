"""Serves an engine of TensorRT-LLM: its own server takes this process's place."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

from fourfold.config.engine import EngineSettings
from fourfold.config.trtllm import TensorrtLlmSettings
from fourfold.errors import FourfoldError
from fourfold.listening import is_loopback
from fourfold.progress import logger
from fourfold.trtllm.commands import image, serve_command
from fourfold.trtllm.guard import check_version


def serve_engine(directory: Path, host: str, port: int, api_key: str | None) -> NoReturn:
    """Becomes `trtllm-serve`. Raises FourfoldError when that is not here, or could not keep others out."""
    if api_key is not None or not is_loopback(host):
        raise FourfoldError(
            "trtllm-serve knows no keys: listen on 127.0.0.1 without --api-key, behind a proxy that asks for one"
        )
    command = engine_command(directory, host, port)
    logger.info("%s", " ".join(command))
    os.execvp(command[0], command)


def engine_command(directory: Path, host: str, port: int) -> list[str]:
    """What serves an engine's directory: the installed server, or else that of the release's container image.

    Raises FourfoldError when `engine.json` cannot be read, or neither TensorRT-LLM of its release nor Apptainer is
    here.
    """
    try:
        engine: dict[str, Any] = json.loads((directory / "engine.json").read_text(encoding="utf-8"))
        row = EngineSettings.model_validate(engine["settings"])
        shared = TensorrtLlmSettings.model_validate(engine["tensorrt_llm"])
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise FourfoldError(f"{directory}: no TensorRT-LLM engine ({reason}); build it again") from None
    command = serve_command(row, shared, directory.absolute(), host, port)
    if shutil.which(command[0]) is None and (apptainer := shutil.which("apptainer")) is not None:
        return [apptainer, "exec", "--nv", "--bind", str(directory.absolute()), image(shared.version), *command]
    check_version(shared.version, program=command[0])
    return command
