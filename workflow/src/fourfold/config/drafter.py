"""The ReDrafter: its training data, its shape, its training and its evaluation."""

from typing import Annotated, Literal

from pydantic import Field

from fourfold.config.base import Section, Seed
from fourfold.config.quantize import Precision

Positive = Annotated[int, Field(ge=1)]


class DrafterData(Section):
    """The texts that the drafter learns to continue."""

    source: Literal["generations", "solutions"] = "generations"
    """`generations`: the target model's own answers (best acceptance); `solutions`: the dataset's."""
    problems: Positive = 256
    """How many training problems to use."""
    samples_per_problem: Positive = 1
    """Generations: answers sampled for each problem."""
    max_tokens: Positive = 256
    """Generations: longest answer, in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """Generations: sampling temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Generations: nucleus probability."""
    max_num_seqs: Positive = 16
    """Generations: answers generated at once."""
    seed: Seed = 0
    """Generations: seed of the sampling."""


class DrafterShape(Section):
    """Architecture of the drafter, in recurrent-drafting's terms."""

    num_draft_layers: Positive = 2
    """Residual blocks before the drafter's output layer."""
    rnn: bool = True
    """Combine draft tokens by the recurrence; if false, by summing their embeddings."""
    exit_dim: Positive | None = None
    """Width of the residual blocks; null means twice the model's hidden size, which TensorRT-LLM expects."""
    draft_vocab_size: Positive | None = None
    """Draft only among the most frequent tokens of the training data; null means the whole vocabulary."""


class DrafterTraining(Section):
    """How the drafter is trained; the target model stays frozen."""

    predict_tokens: Positive = 3
    """Draft positions that are trained; an engine cannot draft more than these."""
    loss: Literal["distillation", "cross_entropy"] = "distillation"
    """What the drafter learns at each position: the target's distribution, or the token alone (the recipe's way)."""
    epochs: Positive = 2
    """Passes over the training data. More help less and less: a million tokens gained up to the eighth."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate of AdamW; warm-up is linear, then cosine to zero."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps in which the learning rate warms up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of AdamW."""
    max_length: Positive = 512
    """Tokens of each text that are used; longer ones are cut."""
    micro_batch_size: Positive = 8
    """Texts in one forward pass, on each process."""
    gradient_accumulation: Positive = 1
    """Forward passes that make one optimiser step."""
    num_processes: Positive = 1
    """Processes started by torchrun: one on a CPU, one a GPU."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 2.0
    """Minutes between checkpoints from which a killed training resumes."""
    trackers: list[Literal["wandb", "tensorboard"]] = []
    """Experiment trackers to report to, if they are installed."""
    seed: Seed = 0
    """Seed of the initial weights and of the order of the data."""


class DrafterEvaluation(Section):
    """Acceptance on problems that were never trained on."""

    problems: Positive = 32
    """How many benchmark problems the target answers for the evaluation."""
    unseen_problems: Annotated[int, Field(ge=0)] = 0
    """How many problems of groups that the training had none of (`problems.splits.unseen`)."""
    temperatures: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)] = [0.0]
    """Sampling temperatures at which they are answered; 0 is greedy."""
    max_tokens: Positive = 256
    """Longest answer, in tokens."""
    max_num_seqs: Positive = 16
    """Answers generated at once."""


class DrafterSettings(Section):
    """The ReDrafter (Zhang et al., arXiv 2403.09919)."""

    target: Precision = "fp8"
    """The checkpoint whose text and hidden states the drafter learns from: the one it will draft for."""
    data: DrafterData = DrafterData()
    shape: DrafterShape = DrafterShape()
    training: DrafterTraining = DrafterTraining()
    evaluation: DrafterEvaluation = DrafterEvaluation()
