"""The experiment's configuration: strict models, one file a section."""

from fourfold.config.load import ConfigError, load_config, parse_config
from fourfold.config.root import Config

__all__ = ["Config", "ConfigError", "load_config", "parse_config"]
