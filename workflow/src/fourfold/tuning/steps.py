"""How long a step takes with a draft shape, on the engine itself, with real prompts."""

import time
from collections.abc import Sequence
from itertools import count, cycle
from statistics import median

import torch

from fourfold.drafter.samples import Text
from fourfold.engine.draft_plan import DraftPlan, DraftShape
from fourfold.engine.llm_engine import LLMEngine
from fourfold.engine.requests import SamplingParams

ROUNDS = 5
"""Timed steps of each shape; their median counts. Rounds go through all shapes, so that a machine whose speed drifts
treats them alike."""


class StepTimer:
    """Keeps a number of requests running and times the steps of all of them."""

    def __init__(self, engine: LLMEngine, texts: Sequence[Text], temperature: float) -> None:
        self.engine, self.temperature = engine, temperature
        # A step is timed alone.
        engine.runs_ahead = False
        self._prompts = cycle([list(text.prompt_token_ids) for text in texts])
        self._seeds = count()

    def seconds(self, running: int, shapes: Sequence[DraftShape]) -> dict[DraftShape, float]:
        """Median time of a step with `running` requests, for each shape."""
        times: dict[DraftShape, list[float]] = {shape: [] for shape in shapes}
        for _ in range(ROUNDS):
            for shape in shapes:
                self._step(running, shape)  # opens lanes and fills caches
                times[shape].append(self._step(running, shape))
        return {shape: median(values) for shape, values in times.items()}

    def _step(self, running: int, shape: DraftShape) -> float:
        while self.engine.num_running < running:
            self._add()
        self.engine.draft_by(DraftPlan({1: shape}))
        self._wait()
        start = time.perf_counter()
        self.engine.step()
        self._wait()
        return time.perf_counter() - start

    def clear(self) -> None:
        """Ends all requests."""
        self.engine.cancel_all()

    def _add(self) -> None:
        """Adds a request and has the engine read its prompt."""
        prompt = next(self._prompts)
        room = self.engine.max_model_len - len(prompt)
        params = SamplingParams(max_tokens=room, temperature=self.temperature, seed=next(self._seeds), ignore_eos=True)
        self.engine.add_request(prompt, params)
        while self.engine.num_waiting:
            self.engine.step()

    def _wait(self) -> None:
        if self.engine.target.device.type == "cuda":
            torch.cuda.synchronize(self.engine.target.device)
