"""The embedded torch engine: continuous batching, speculative decoding, one directory to serve from."""

from fourfold.engine.build import load_engine
from fourfold.engine.llm_engine import LLMEngine
from fourfold.engine.requests import RequestOutput, SamplingParams, SpeculationStats

__all__ = ["LLMEngine", "RequestOutput", "SamplingParams", "SpeculationStats", "load_engine"]
