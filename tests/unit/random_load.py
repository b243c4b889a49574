"""Random requests for an engine over a tiny model, that come and are cancelled at any time, as in a server."""

import hashlib
import random
from dataclasses import dataclass, field

from fourfold.engine import LLMEngine, RequestOutput, SamplingParams

VOCABULARY = 320
Answer = tuple[str, tuple[int, ...], str, str | None]


def request(seed: int, number: int) -> tuple[list[int], SamplingParams]:
    """A request's prompt and parameters: greedy and sampled, with stop strings and stop tokens, short and long."""
    rng = random.Random(f"{seed}/{number}")
    prompt = [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(1, 24))]
    params = SamplingParams(
        max_tokens=rng.choice((1, 2, rng.randint(3, 24))),
        temperature=rng.choice((0.0, 0.0, 0.7, 1.3)),
        top_p=rng.choice((1.0, 0.9)),
        top_k=rng.choice((0, 20)),
        seed=rng.randrange(2**32),
        stop=tuple(f"w{rng.randrange(1, VOCABULARY)}" for _ in range(rng.choice((0, 0, 12)))),
        stop_token_ids=tuple(rng.sample(range(1, VOCABULARY), rng.choice((0, 0, 12)))),
        ignore_eos=rng.random() < 0.5,
    )
    return prompt, params


@dataclass
class Load:
    """Runs requests and judges what becomes of them; nothing of a request is kept but counts and checksums."""

    engine: LLMEngine
    seed: int = 0
    check_every: int = 1
    """One request in so many is asked again, alone."""
    made: int = 0
    cancelled_waiting: int = 0
    cancelled_running: int = 0
    stopped: int = 0
    """Ended by an end-of-text token, a stop token or a stop string."""
    full: int = 0
    """Ended by max_tokens."""
    tokens: int = 0
    checked: int = 0
    checksum: int = 0
    """Of all answers that were not cancelled: the same for every engine over a model, however much it drafts."""
    remembered: list[Answer] = field(default_factory=list)

    def run(self, requests: int) -> None:
        """Makes so many more requests, runs until all have ended, and asks some of them again, alone.

        Raises AssertionError when a request is lost, ends twice, is overtaken, or answers otherwise than alone.
        """
        rng = random.Random(f"{self.seed}/arrivals/{self.made}")
        running: dict[str, RequestOutput] = {}
        waiting: list[str] = []
        engine, last = self.engine, self.made + requests
        while self.made < last or engine.has_unfinished:
            # Arrivals in bursts: now slots are idle, now a queue waits for them.
            for _ in range(min(rng.choice((1, 3, 12)) if rng.random() < 0.12 else 0, last - self.made)):
                name = f"r{self.made}"
                assert engine.add_request(*request(self.seed, self.made), name) == name
                waiting.append(name)
                self.made += 1
            # One request in seven may be cancelled: these have no part in the checksum, wherever they were cut.
            among = waiting if rng.random() < 0.3 else running
            if rng.random() < 0.1 and (may := [name for name in among if int(name[1:]) % 7 == 3]):
                self._cancel(rng.choice(may), waiting, running)
            for output in engine.step():
                if output.request_id not in running:
                    assert output.request_id == waiting.pop(0), "a request was admitted before an earlier one"
                    running[output.request_id] = output
                assert output is running[output.request_id]
                if output.finish_reason is not None:
                    self._judge(running.pop(output.request_id))
            assert engine.num_running == len(running) <= engine.max_num_seqs
            assert engine.num_waiting == len(waiting)
        assert not waiting
        assert not running
        self._ask_again()

    def _cancel(self, name: str, waiting: list[str], running: dict[str, RequestOutput]) -> None:
        if not self.engine.cancel(name):
            # It has ended in a step that was launched ahead; the next one tells.
            assert name in running
            assert self.engine.decoder.graphs is not None
            return
        assert not self.engine.cancel(name)
        if name in waiting:
            waiting.remove(name)
            self.cancelled_waiting += 1
            return
        output = running.pop(name)
        assert output.finish_reason == "cancelled"
        self.cancelled_running += 1
        self._remember(output)

    def _judge(self, output: RequestOutput) -> None:
        number = int(output.request_id[1:])
        prompt, params = request(self.seed, number)
        assert output.prompt_token_ids == prompt
        assert 1 <= len(output.token_ids) <= params.max_tokens
        if output.finish_reason == "length":
            assert len(output.token_ids) == params.max_tokens
            self.full += 1
        else:
            assert output.finish_reason == "stop"
            self.stopped += 1
        self.tokens += len(output.token_ids)
        if number % 7 != 3:
            answer = repr((number, output.token_ids, output.text, output.finish_reason))
            self.checksum ^= int.from_bytes(hashlib.sha256(answer.encode()).digest()[:8])
        self._remember(output)

    def _remember(self, output: RequestOutput) -> None:
        if int(output.request_id[1:]) % self.check_every == 0:
            answer = (output.request_id, tuple(output.token_ids), output.text, output.finish_reason)
            self.remembered.append(answer)

    def _ask_again(self) -> None:
        for name, token_ids, text, reason in self.remembered:
            prompt, params = request(self.seed, int(name[1:]))
            (alone,) = self.engine.generate([prompt], [params])
            if reason == "cancelled":
                assert tuple(alone.token_ids[: len(token_ids)]) == token_ids, name
                # The text of what was there; a stop string that follows would have cut it.
                assert alone.text.startswith(text) or text.startswith(alone.text), name
            else:
                assert (tuple(alone.token_ids), alone.text, alone.finish_reason) == (token_ids, text, reason), name
            self.checked += 1
        self.remembered.clear()
