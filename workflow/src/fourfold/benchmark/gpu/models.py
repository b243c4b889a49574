"""What is timed: a target in bf16 and FP8 with a drafter; random, carried into the large shape, or a small model."""

import copy
import gc
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fourfold.artifacts import read_manifest
from fourfold.config.problems import Prompt
from fourfold.engine import LLMEngine
from fourfold.engine.draft_plan import NO_DRAFTS, DraftPlan, DraftShape
from fourfold.errors import FourfoldError
from fourfold.model.carrier import carry, carry_drafter, random_drafter, random_weights
from fourfold.model.tokenizer import (
    encode_rendered,
    end_token_ids,
    load_tokenizer,
    render_conversation,
    render_prompt,
)
from fourfold.modeling.checkpoint import Weights, build_transformer, compute_dtype, read_weights
from fourfold.modeling.config import TransformerConfig
from fourfold.modeling.linear import round_lm_head
from fourfold.modeling.redrafter import Redrafter, check_target, load_redrafter
from fourfold.modeling.transformer import Transformer
from fourfold.problems.read import Problem, Split, read_problems
from fourfold.quantize.on_device import input_ranges, to_fp8

CALIBRATION_TOKENS = (4, 512)
"""Random texts and their tokens, where there is no real text."""
PROMPT = Prompt()


@dataclass(frozen=True)
class Text:
    """Real text: a model's tokenizer, and problems in its chat template."""

    tokenizer: PreTrainedTokenizerBase
    end_token_ids: tuple[int, ...]
    problems: dict[Split, list[Problem]]

    @classmethod
    def read(cls, model: Path, problems: Path) -> "Text":
        """Reads both. Raises FourfoldError for broken artifacts, and when a split is empty.

        Args: manifests of the model and of the problems.
        """
        tokenizer = load_tokenizer(model.parent)
        splits: tuple[Split, ...] = ("calibration", "benchmark", "unseen")
        found = {split: read_problems(problems, split) for split in splits}
        if empty := [split for split in splits if not found[split]]:
            raise FourfoldError(f"{problems.parent} has no problems of split {empty[0]}; raise problems.splits")
        return cls(tokenizer, end_token_ids(model.parent, tokenizer), found)

    def prompt(self, problem: Problem) -> list[int]:
        """Token ids that ask for an answer."""
        return render_prompt(self.tokenizer, PROMPT, problem.problem)

    def conversations(self) -> Iterator[list[int]]:
        """Token ids of each calibration problem with its solution."""
        for problem in self.problems["calibration"]:
            text = render_conversation(self.tokenizer, PROMPT, problem.problem, problem.solution)
            yield encode_rendered(self.tokenizer, text)


@dataclass(frozen=True)
class Measured:
    """Models to time: the target by precision, and a drafter.

    The precisions are bf16; fp8, whose output matrix and cache are bf16; and fp8-all, whose are FP8 too.
    """

    weights: str
    """random, carrier, or small: the carried model itself."""
    targets: dict[str, Transformer]
    drafter: Redrafter
    fp8_drafter: bool
    text: Text | None = None

    def engine(
        self, precision: str, shape: DraftShape, sequences: int, length: int, prefix_caching: bool = False
    ) -> LLMEngine:
        """An engine, after what earlier ones held is free. shape: what is drafted, or NO_DRAFTS."""
        target, text = self.targets[precision], self.text
        free_memory(target.device)
        return LLMEngine(
            target,
            no_tokenizer() if text is None else text.tokenizer,
            end_token_ids=() if text is None else text.end_token_ids,
            drafter=self.drafter if shape != NO_DRAFTS else None,
            fp8_drafter=self.fp8_drafter,
            plan=DraftPlan({1: shape}),
            kv_cache_dtype=torch.float8_e4m3fn if precision == "fp8-all" else None,
            max_num_seqs=sequences,
            max_model_len=length,
            enable_prefix_caching=prefix_caching,
        )

    def prompt(self, context: int) -> list[int]:
        """A prompt of `context` tokens: problems with solutions, the last one's open; or random tokens."""
        if self.text is None:
            generator = torch.Generator().manual_seed(1)
            vocab_size = self.targets["bf16"].config.vocab_size
            tokens: list[int] = torch.randint(0, vocab_size, (context,), generator=generator).tolist()
            return tokens
        prompt: list[int] = []
        conversations = itertools.cycle(self.text.conversations())
        while len(prompt) < context:  # each conversation has a token or more
            prompt += next(conversations)
        return prompt[-context:]


def free_memory(device: torch.device) -> None:
    """Frees what earlier engines and models held: captured steps and their engine refer to each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def random_models(shape: TransformerConfig, draft_vocab_size: int, fp8_drafter: bool, device: torch.device) -> Measured:
    """The large shape with random weights and a drafter of the recipe's shape."""
    with torch.device(device):
        drafter = Redrafter(
            random_drafter(shape, draft_vocab_size), torch.randperm(shape.vocab_size)[:draft_vocab_size]
        )
    return _measured("random", shape, random_weights(shape, device), drafter, fp8_drafter, device, None)


def carried_models(
    model: Path,
    drafter: Path,
    text: Text,
    shape: TransformerConfig,
    fp8_drafter: bool,
    device: torch.device,
) -> Measured:
    """The small model and its drafter inside the large shape. Raises FourfoldError when they do not fit."""
    read_manifest(model)
    read_manifest(drafter)
    config, weights = read_weights(model.parent)
    small = load_redrafter(drafter.parent, torch.bfloat16)
    check_target(small.config, config, drafter.parent)
    carrier, weights = carry(config, weights, shape, device)
    return _measured("carrier", carrier, weights, carry_drafter(small, carrier), fp8_drafter, device, text)


def small_models(model: Path, drafter: Path, text: Text, fp8_drafter: bool, device: torch.device) -> Measured:
    """The small model itself. Raises FourfoldError when the drafter is another model's."""
    read_manifest(model)
    read_manifest(drafter)
    config, weights = read_weights(model.parent)
    network = load_redrafter(drafter.parent, torch.bfloat16)
    check_target(network.config, config, drafter.parent)
    weights = {name: weight.to(device) for name, weight in weights.items()}
    return _measured("small", config, weights, network, fp8_drafter, device, text)


def _measured(
    name: str,
    config: TransformerConfig,
    weights: Weights,
    drafter: Redrafter,
    fp8_drafter: bool,
    device: torch.device,
    text: Text | None,
) -> Measured:
    """The targets share what is not quantised; FP8 has the ranges of the calibration's texts, or random ones."""
    dtype = compute_dtype(device)
    plain = build_transformer(config, dict(weights), device, dtype)
    ranges = input_ranges(plain, _calibration(config, text, device))
    fp8 = build_transformer(config, to_fp8(weights, ranges), device, dtype)
    whole = copy.copy(fp8)
    whole.lm_head = round_lm_head(weights.get("lm_head", weights["embed"]).to(device, dtype))
    targets = {"bf16": plain, "fp8": fp8, "fp8-all": whole}
    return Measured(
        name,
        targets,
        drafter.to(device, dtype).requires_grad_(False),
        fp8_drafter and device.type == "cuda",
        text,
    )


def _calibration(config: TransformerConfig, text: Text | None, device: torch.device) -> Iterator[Tensor]:
    if text is None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, config.vocab_size, CALIBRATION_TOKENS, generator=generator)
        yield tokens[:, : config.max_position_embeddings].to(device)
        return
    for tokens_of_one in text.conversations():
        yield torch.tensor([tokens_of_one[: config.max_position_embeddings]], device=device)


def no_tokenizer() -> PreTrainedTokenizerFast:
    """Random weights have no text; an engine wants a tokenizer all the same."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<end>": 0}, unk_token="<end>")))
