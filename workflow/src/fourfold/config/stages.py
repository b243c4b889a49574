"""The part of the configuration that each stage reads, and nothing more: what a rule's `params` hold."""

from typing import cast

from fourfold.config.base import Section
from fourfold.config.benchmark import BenchmarkSettings
from fourfold.config.drafter import DrafterData, DrafterEvaluation, DrafterShape, DrafterTraining
from fourfold.config.engine import EngineSettings, Numerics
from fourfold.config.problems import Prompt
from fourfold.config.quantize import CalibrationSettings, FidelitySettings, Precision, QuantizeSettings
from fourfold.config.root import Config
from fourfold.config.trtllm import TensorrtLlmSettings


class CalibrationStage(Section):
    """What build_calibration reads."""

    calibration: CalibrationSettings
    prompt: Prompt


class QuantizeStage(Section):
    """What quantize_model reads."""

    precision: Precision
    quantize: QuantizeSettings


class FidelityStage(Section):
    """What compare_logits reads."""

    numerics: Numerics
    fidelity: FidelitySettings
    prompt: Prompt


class DrafterDataStage(Section):
    """What generate_drafter_data reads."""

    data: DrafterData
    prompt: Prompt


class DrafterTrainStage(Section):
    """What train_drafter reads."""

    shape: DrafterShape
    training: DrafterTraining


class DrafterEvaluationStage(Section):
    """What evaluate_drafter reads."""

    evaluation: DrafterEvaluation
    prompt: Prompt


class ConvertStage(Section):
    """What convert_checkpoint reads."""

    precision: Precision
    tensor_parallel_size: int


class MergeStage(Section):
    """What merge_drafter reads, in TensorRT-LLM's terms."""

    tensor_parallel_size: int
    redrafter_num_beams: int
    redrafter_draft_len_per_beam: int
    """Drafts of a beam: its length without the last accepted token."""
    redrafter_greedy_search: bool


class TensorrtLlmStage(Section):
    """What pack_engine reads."""

    engine: EngineSettings
    tensorrt_llm: TensorrtLlmSettings


class BenchmarkStage(Section):
    """What benchmark_engine reads."""

    benchmark: BenchmarkSettings
    prompt: Prompt


def stage_settings(config: Config, stage: str, wildcard: str | None = None) -> str:
    """The settings of a stage as JSON, for `--settings`.

    Args:
        config: the checked configuration.
        stage: name of the stage's rule.
        wildcard: the precision (quantize_model), the numerics such as `fp8-kv_cache` (compare_logits), the layout such
            as `fp8-tp2` (convert_checkpoint), or the engine's name (the stages that are an engine's own).
    Raises KeyError for an unknown stage, and for numerics that no engine has.
    """
    sections: dict[str, Section] = {
        "fetch_model": config.model,
        "fetch_problems": config.problems,
        "build_calibration": CalibrationStage(calibration=config.calibration, prompt=config.prompt),
        "generate_drafter_data": DrafterDataStage(data=config.drafter.data, prompt=config.prompt),
        "train_drafter": DrafterTrainStage(shape=config.drafter.shape, training=config.drafter.training),
        "evaluate_drafter": DrafterEvaluationStage(evaluation=config.drafter.evaluation, prompt=config.prompt),
        "benchmark_engine": BenchmarkStage(benchmark=config.benchmark, prompt=config.prompt),
        "make_report": config.report,
    }
    if stage == "quantize_model":
        return QuantizeStage(precision=cast(Precision, wildcard), quantize=config.quantize).model_dump_json()
    if stage == "compare_logits":
        numerics = numerics_of(config)[str(wildcard)]
        return FidelityStage(numerics=numerics, fidelity=config.fidelity, prompt=config.prompt).model_dump_json()
    if stage == "convert_checkpoint":
        precision, size = str(wildcard).split("-tp")
        return ConvertStage(precision=cast(Precision, precision), tensor_parallel_size=int(size)).model_dump_json()
    if stage in ("tune_engine", "build_engine", "merge_drafter", "pack_engine"):
        assert wildcard is not None
        return _engine_stage(config, stage, engine_settings(config, wildcard)).model_dump_json()
    return sections[stage].model_dump_json()


def _engine_stage(config: Config, stage: str, engine: EngineSettings) -> Section:
    """What a stage reads of an engine's row."""
    if stage == "merge_drafter":
        assert engine.beam_width != "auto"
        assert engine.beam_length != "auto"
        return MergeStage(
            tensor_parallel_size=engine.tensor_parallel_size,
            redrafter_num_beams=engine.beam_width,
            redrafter_draft_len_per_beam=engine.beam_length - 1,
            redrafter_greedy_search=config.tensorrt_llm.redrafter_greedy_search,
        )
    if stage == "pack_engine":
        return TensorrtLlmStage(engine=engine, tensorrt_llm=config.tensorrt_llm)
    return engine


def engine_settings(config: Config, engine: str) -> EngineSettings:
    """The row of an engine. Raises KeyError."""
    return config.engines[engine]


def numerics_of(config: Config) -> dict[str, Numerics]:
    """What the engines' numbers are rounded to, by name; engines that differ in nothing else share one."""
    fields = set(Numerics.model_fields)
    return {row.numerics: Numerics(**row.model_dump(include=fields)) for row in config.engines.values()}
