"""The generate_drafter_data stage: the texts that the drafter learns to continue.

Either the target's own answers, sampled by the engine, or the dataset's solutions, both to the prompts that the
benchmark asks with. `train.jsonl` has one row a text: id, problem_id, prompt_token_ids, token_ids (end-of-text
included), finish_reason (`length`: the answer was cut and has no end-of-text token).
"""

import hashlib
import time
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fourfold.artifacts import write_artifact
from fourfold.artifacts.code import code_hash
from fourfold.artifacts.files import sha256_file, write_jsonl
from fourfold.artifacts.provenance import device_name
from fourfold.config.drafter import DrafterData
from fourfold.config.problems import Prompt
from fourfold.config.stages import DrafterDataStage
from fourfold.drafter.journal import Journal, work_key
from fourfold.drafter.samples import DATA_FILE
from fourfold.engine.llm_engine import LLMEngine
from fourfold.engine.requests import SamplingParams
from fourfold.errors import FourfoldError
from fourfold.model.tokenizer import encode_rendered, end_token_ids, load_tokenizer, messages, render_prompt
from fourfold.modeling.checkpoint import load_transformer, resolve_device
from fourfold.problems.read import Problem, read_problems
from fourfold.progress import logger, progress

READ_SHARE = 16
"""Prompts are read when one in so many slots is free: one forward reads several on a GPU, in the time of one."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """One answer to generate."""

    id: str
    problem_id: str
    prompt_token_ids: list[int]
    seed: int


def generate_drafter_data(
    settings: DrafterDataStage, target: Path, problems: Path, work: Path, output: Path, device: str
) -> None:
    """Writes the drafter's training texts.

    Args:
        settings: data and prompt.
        target: manifest of the checkpoint to draft for; its tokenizer makes the tokens.
        problems: manifest of the problems.
        work: folder for the journal of finished answers.
        output: manifest of the artifact to write.
        device: auto, cpu or cuda.
    Raises FourfoldError when there are too few problems, or the prompts do not fit the model.
    """
    data = settings.data
    tokenizer = load_tokenizer(target.parent)
    ends = end_token_ids(target.parent, tokenizer)
    chosen = read_problems(problems, "train")[: data.problems]
    if len(chosen) < data.problems:
        raise FourfoldError(
            f"{problems}: drafter.data.problems is {data.problems}, but the train split holds {len(chosen)}"
        )
    with write_artifact(
        output,
        stage="generate_drafter_data",
        settings=settings.model_dump(),
        inputs={"target": target, "problems": problems},
        libraries=["torch", "transformers"],
        device=device_name(str(resolve_device(device))) if data.source == "generations" else None,
    ) as staging:
        if data.source == "solutions":
            rows = [solution_row(tokenizer, settings.prompt, problem, ends) for problem in chosen]
        else:
            inputs = {"target": sha256_file(target), "problems": sha256_file(problems), "code": code_hash(__name__)}
            with Journal(work, "answers", work_key(settings.model_dump_json(), inputs)) as journal:
                requests = plan_requests(data, tokenizer, settings.prompt, chosen)
                generate(data, requests, journal, target.parent, tokenizer, ends, device)
                rows = [journal.rows[request.id] for request in requests]
        write_jsonl(staging.path / DATA_FILE, rows)
        staging.facts = {
            "end_token_ids": list(ends),
            "texts": len(rows),
            "prompt_tokens": sum(len(row["prompt_token_ids"]) for row in rows),
            "answer_tokens": sum(len(row["token_ids"]) for row in rows),
            "finish_reasons": dict(sorted(Counter(row["finish_reason"] for row in rows).items())),
        }
    if data.source == "generations":
        journal.remove()


def answer_seed(seed: int, problem_id: str, sample: int) -> int:
    """Seed of one answer's sampling, 0 … 2^31 - 1: it depends on nothing but these three."""
    digest = hashlib.sha256(f"{seed}/{problem_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


def plan_requests(
    data: DrafterData, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, problems: list[Problem]
) -> list[Request]:
    """All answers to generate, in the order of the artifact."""
    requests = []
    for problem in problems:
        token_ids = render_prompt(tokenizer, prompt, problem.problem)
        for sample in range(data.samples_per_problem):
            seed = answer_seed(data.seed, problem.id, sample)
            requests.append(Request(f"{problem.id}-{sample}", problem.id, token_ids, seed))
    return requests


def generate(
    data: DrafterData,
    requests: list[Request],
    journal: Journal,
    target: Path,
    tokenizer: PreTrainedTokenizerBase,
    ends: tuple[int, ...],
    device: str,
) -> None:
    """Generates the answers that the journal does not have; each is in it as soon as it is finished."""
    pending = [request for request in requests if request.id not in journal.rows]
    if len(pending) < len(requests):
        logger.info("%d of %d answers are in the journal already", len(requests) - len(pending), len(requests))
    if not pending:
        return
    engine = LLMEngine(
        load_transformer(target, device),
        tokenizer,
        end_token_ids=ends,
        max_num_seqs=min(data.max_num_seqs, len(pending)),
        max_model_len=max(len(request.prompt_token_ids) for request in requests) + data.max_tokens,
    )
    waiting = deque(pending)
    problem_ids = {request.id: request.problem_id for request in pending}
    seeds = {request.id: request.seed for request in pending}
    start, tokens = time.monotonic(), 0
    with progress("generate", len(pending), "answers") as task:
        while waiting or engine.has_unfinished:
            free = engine.max_num_seqs - engine.num_running - engine.num_waiting
            if free >= max(1, engine.max_num_seqs // READ_SHARE):
                for _ in range(min(free, len(waiting))):
                    request = waiting.popleft()
                    params = SamplingParams(
                        max_tokens=data.max_tokens, temperature=data.temperature, top_p=data.top_p, seed=request.seed
                    )
                    engine.add_request(request.prompt_token_ids, params, request.id)
            for answer in engine.step():
                answer.check()
                if answer.finish_reason is None:
                    continue
                row = {
                    "id": answer.request_id,
                    "problem_id": problem_ids[answer.request_id],
                    "prompt_token_ids": answer.prompt_token_ids,
                    "token_ids": answer.token_ids,
                    "finish_reason": answer.finish_reason,
                    "seed": seeds[answer.request_id],
                }
                journal.append(row)
                tokens += len(answer.token_ids)
                task.advance(1, f"{tokens / (time.monotonic() - start):.0f} tok/s")


def solution_row(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, problem: Problem, ends: tuple[int, ...]) -> Row:
    """The dataset's solution as an answer: what follows the prompt in the chat template, up to its end-of-text token.

    Prompt and answer are tokenised apart, as they are when the model generates. Raises FourfoldError when the template
    renders the conversation differently once it has an answer.
    """
    conversation = messages(prompt, problem.problem)
    asked = str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
    conversation.append({"role": "assistant", "content": problem.solution})
    answered = str(tokenizer.apply_chat_template(conversation, tokenize=False))
    if not answered.startswith(asked):
        raise FourfoldError(
            "drafter.data.source: the model's chat template renders an answered conversation differently from a "
            "question, so solutions cannot be aligned with prompts; use generations"
        )
    token_ids = encode_rendered(tokenizer, answered[len(asked) :])
    end = next((place for place, token in enumerate(token_ids) if token in ends), None)
    return {
        "id": f"{problem.id}-solution",
        "problem_id": problem.id,
        "prompt_token_ids": encode_rendered(tokenizer, asked),
        "token_ids": token_ids if end is None else token_ids[: end + 1],
        "finish_reason": "length" if end is None else "stop",
        "seed": None,
    }
