"""The files on this machine that a configuration names: the workflow's first inputs."""

from pathlib import Path

from fourfold.config.load import ConfigError
from fourfold.config.model import LocalModel, ModelSettings
from fourfold.config.problems import LocalProblems, ProblemsSettings

NO_WEIGHTS = (
    "holds no *.safetensors; save the model with save_pretrained (pickles such as pytorch_model.bin are not read: they "
    "run code when they are opened)"
)


def source_files(settings: ModelSettings | ProblemsSettings) -> list[str]:
    """Files that a local model or local problems consist of; none for other sources.

    Raises ConfigError if they are not there.
    """
    path = Path(settings.path).expanduser() if isinstance(settings, LocalModel | LocalProblems) else None
    if path is None:
        return []
    if isinstance(settings, LocalProblems):
        if not path.is_file():
            raise ConfigError(f"problems.path: no file {path}")
        return [str(path)]
    if not (path / "config.json").is_file():
        raise ConfigError(f"model.path: no checkpoint in {path} (config.json is missing)")
    if not any(path.glob("*.safetensors")):
        raise ConfigError(f"model.path: {path} {NO_WEIGHTS}")
    return sorted(str(file) for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
