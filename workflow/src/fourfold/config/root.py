"""The whole configuration, and the rules that hold between its sections."""

from typing import Annotated

from pydantic import Field, model_validator

from fourfold.config.base import Section
from fourfold.config.benchmark import BenchmarkSettings, ReportSettings
from fourfold.config.drafter import DrafterSettings
from fourfold.config.engine import EngineSettings
from fourfold.config.model import ModelSettings
from fourfold.config.problems import ProblemsSettings, Prompt
from fourfold.config.quantize import CalibrationSettings, FidelitySettings, QuantizeSettings
from fourfold.config.trtllm import TensorrtLlmSettings

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+_-]*$")]


class Config(Section):
    """A fourfold experiment: one model, one set of problems, and the engines to compare."""

    name: Name
    """Name of the experiment; its results are in `results/NAME`."""
    model: ModelSettings
    problems: ProblemsSettings
    prompt: Prompt = Prompt()
    calibration: CalibrationSettings = CalibrationSettings()
    quantize: QuantizeSettings = QuantizeSettings()
    fidelity: FidelitySettings = FidelitySettings()
    drafter: DrafterSettings = DrafterSettings()
    engines: Annotated[dict[Name, EngineSettings], Field(min_length=1)]
    """Engines to build and compare, by name; the first is the one that speed-ups refer to."""
    tensorrt_llm: TensorrtLlmSettings = TensorrtLlmSettings()
    benchmark: BenchmarkSettings = BenchmarkSettings()
    report: ReportSettings = ReportSettings()

    @model_validator(mode="after")
    def _check(self) -> "Config":
        splits = self.problems.splits
        needs = {
            "calibration.samples": (self.calibration.samples, splits.calibration, "calibration"),
            "fidelity.problems": (self.fidelity.problems, splits.benchmark, "benchmark"),
            "benchmark.problems": (self.benchmark.problems, splits.benchmark, "benchmark"),
        }
        if any(engine.drafter == "redrafter" for engine in self.engines.values()):
            data, evaluation = self.drafter.data, self.drafter.evaluation
            needs |= {
                "drafter.data.problems": (data.problems, splits.train, "train"),
                "drafter.evaluation.problems": (evaluation.problems, splits.benchmark, "benchmark"),
                "drafter.evaluation.unseen_problems": (evaluation.unseen_problems, splits.unseen, "unseen"),
            }
        for key, (wanted, given, split) in needs.items():
            if wanted > given:
                raise ValueError(f"{key} is {wanted}, but problems.splits.{split} holds {given}")
        most = self.drafter.training.predict_tokens + 1
        for name, engine in self.engines.items():
            if engine.drafter == "redrafter" and engine.beam_length != "auto" and engine.beam_length > most:
                raise ValueError(
                    f"engines.{name}.beam_length is {engine.beam_length}, but drafter.training.predict_tokens "
                    f"trains for at most {most}"
                )
            tokens = self.drafter.shape.draft_vocab_size
            widest = 1 if engine.drafter == "none" or engine.beam_width == "auto" else engine.beam_width
            if tokens is not None and widest > tokens:
                raise ValueError(
                    f"engines.{name}.beam_width is {widest}, but drafter.shape.draft_vocab_size is {tokens}"
                )
            most_at_once = max(self.benchmark.concurrency)
            if most_at_once > engine.max_num_seqs:
                raise ValueError(
                    f"benchmark.concurrency is {most_at_once}, but engines.{name}.max_num_seqs is "
                    f"{engine.max_num_seqs}; raise max_num_seqs or lower the concurrency"
                )
            if self.benchmark.max_tokens >= engine.max_model_len:
                raise ValueError(
                    f"benchmark.max_tokens is {self.benchmark.max_tokens}, but engines.{name}.max_model_len is "
                    f"{engine.max_model_len}, prompt included; raise max_model_len or lower max_tokens"
                )
            if engine.backend == "tensorrt_llm":
                self._check_tensorrt_llm(name, engine)
            if engine.backend == "torch" and engine.tensor_parallel_size > 1:
                raise ValueError(f"engines.{name}.tensor_parallel_size needs backend tensorrt_llm")
        return self

    def _check_tensorrt_llm(self, name: str, engine: EngineSettings) -> None:
        """Raises ValueError for what TensorRT-LLM's engines cannot do."""
        if engine.is_tuned:
            raise ValueError(f"engines.{name}: auto needs backend torch; give beam_width and beam_length")
        if engine.kv_cache_dtype != "auto" or engine.fp8_lm_head:
            key = "fp8_lm_head" if engine.fp8_lm_head else "kv_cache_dtype"
            raise ValueError(f"engines.{name}.{key} needs backend torch; leave it out")
        if engine.drafter == "none":
            return
        if engine.draft_min_p or engine.draft_tokens:
            key = "draft_min_p" if engine.draft_min_p else "draft_tokens"
            raise ValueError(f"engines.{name}.{key} needs backend torch; leave it out")
        if self.drafter.shape.draft_vocab_size is not None:
            raise ValueError(
                f"drafter.shape.draft_vocab_size needs backend torch, but engines.{name} is of backend tensorrt_llm, "
                "whose drafters score the whole vocabulary; set it to null"
            )
        if engine.precision == "fp8" and self.drafter.shape.exit_dim is not None:
            # Twice the hidden size would do, but which model it is, is not known yet; null always is that.
            raise ValueError(
                f"drafter.shape.exit_dim is {self.drafter.shape.exit_dim}, but engines.{name} (fp8, tensorrt_llm) "
                "takes no input projection; set it to null"
            )
