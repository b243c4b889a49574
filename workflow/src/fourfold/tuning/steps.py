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

STEPS = 5
"""Steps that are timed for each shape; their median counts."""


class StepTimer:
    """Keeps a number of requests running and times the steps of all of them."""

    def __init__(self, engine: LLMEngine, texts: Sequence[Text], temperature: float) -> None:
        self.engine, self.temperature = engine, temperature
        self._prompts = cycle([list(text.prompt_token_ids) for text in texts])
        self._seeds = count()

    def seconds(self, running: int, shape: DraftShape) -> float:
        """Median time of a step with `running` requests."""
        self.engine.plan = DraftPlan({1: shape})
        times = []
        for number in range(STEPS + 1):
            self._fill(running)
            self._wait()
            start = time.perf_counter()
            self.engine.step()
            self._wait()
            if number:  # the first one opens lanes and fills caches
                times.append(time.perf_counter() - start)
        return median(times)

    def clear(self) -> None:
        """Ends all requests."""
        self.engine.cancel_all()

    def _fill(self, running: int) -> None:
        while self.engine.num_running < running:
            prompt = next(self._prompts)
            room = self.engine.max_model_len - len(prompt)
            params = SamplingParams(
                max_tokens=room, temperature=self.temperature, seed=next(self._seeds), ignore_eos=True
            )
            self.engine.add_request(prompt, params)
            self.engine.step()

    def _wait(self) -> None:
        if self.engine.target.device.type == "cuda":
            torch.cuda.synchronize(self.engine.target.device)
