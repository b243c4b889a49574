"""The engine: requests come in, tokens come out.

A request waits until a slot of the KV cache is free; its prompt is then read (prefill), which gives the first token.
After that it decodes together with all other running requests, one step at a time: with a drafter, a step drafts a few
tokens for each, verifies them in one forward of the target, and yields the kept ones and one more.

Steps that read prompts (`engine.prefill`) and steps that decode (`engine.decoder`) take turns.

What goes wrong with one request ends that request alone: scores that are not finite, memory that cannot be had.
"""

import time
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from fourfold.engine.decoder import Decoder
from fourfold.engine.draft_plan import NO_DRAFTS, DraftPlan
from fourfold.engine.memory import check_draft_table, plan_kv_cache
from fourfold.engine.prefill import PREFILL_CHUNK, PREFILL_KEYS, PREFILL_ROWS, Prefill
from fourfold.engine.prefixes import Prefixes
from fourfold.engine.requests import RequestOutput, SamplingParams
from fourfold.engine.sequence import Sequence
from fourfold.engine.slots import Slots
from fourfold.errors import FourfoldError, is_out_of_memory
from fourfold.modeling.attention import padded_length
from fourfold.modeling.captures import Captures
from fourfold.modeling.kv_cache import KVCache
from fourfold.modeling.packed_drafter import pack_drafter
from fourfold.modeling.redrafter import Redrafter
from fourfold.modeling.transformer import Transformer

if TYPE_CHECKING:
    from fourfold.engine.graphs import DecodeGraphs
    from fourfold.engine.prompt_graphs import PromptGraphs
    from fourfold.modeling.draft_decode import DraftChain


class LLMEngine:
    """Continuous batching over one target model, with speculative decoding if a drafter is given."""

    def __init__(
        self,
        target: Transformer,
        tokenizer: PreTrainedTokenizerBase,
        *,
        end_token_ids: tuple[int, ...],
        drafter: Redrafter | None = None,
        fp8_drafter: bool = False,
        plan: DraftPlan | None = None,
        kv_cache_dtype: torch.dtype | None = None,
        max_num_seqs: int = 16,
        max_model_len: int = 2048,
        max_num_batched_tokens: int | None = None,
        gpu_memory_utilization: float = 0.9,
        enable_prefix_caching: bool = False,
        enforce_eager: bool = False,
        info: dict[str, Any] | None = None,
    ) -> None:
        """Takes the KV cache's memory.

        Args:
            target: the model.
            tokenizer: a fast tokenizer; makes text of tokens.
            end_token_ids: tokens that end an answer.
            drafter: on the target's device and in its dtype; its layers are packed in place.
            fp8_drafter: compute the drafter in FP8, on a GPU that has it and in bfloat16.
            plan: how much is drafted; None drafts three tokens, in one beam, whatever runs.
            kv_cache_dtype: torch.float8_e4m3fn, or None for the target's dtype.
            max_num_seqs: sequences that run at once.
            max_model_len: longest sequence, prompt and answer.
            max_num_batched_tokens: prompt tokens that are read between two decoding steps; None reads all that wait.
            gpu_memory_utilization: share of a GPU's memory that may be in use, weights and all.
            enable_prefix_caching: keep what ended requests left in the cache for prompts that begin alike; takes a slot
                more. Tokens are the same; on a GPU up to ties that other products round differently. There the shortest
                prompts are read from their start all the same, which takes less time.
            enforce_eager: launch each kernel by itself on a GPU too, as the reference for CUDA graphs.
            info: facts about the engine, for reports.
        Raises FourfoldError when the sizes do not fit the model or the memory.
        """
        config = target.config
        if max_model_len > config.max_position_embeddings:
            raise FourfoldError(
                f"max_model_len is {max_model_len}, more than the {config.max_position_embeddings} positions "
                "that the model was made for"
            )
        self.target, self.tokenizer, self.info = target, tokenizer, info or {}
        self.drafter = None if drafter is None else pack_drafter(drafter, fp8_drafter)
        plan = plan or DraftPlan.fixed(beam_width=1, beam_length=4)
        if drafter is None:
            plan = DraftPlan({1: NO_DRAFTS})
        self.max_num_seqs, self.max_model_len = max_num_seqs, max_model_len
        self.draft_table_bytes = 0
        captures = target.device.type == "cuda" and not enforce_eager
        # It takes memory that the cache then cannot have.
        chain = self._make_chain(plan) if captures else None
        self._ends = frozenset(end_token_ids)
        self._text: Tokenizer = tokenizer.backend_tokenizer
        # Drafts are written to the cache before it is known whether they stay, and so is the step that is launched
        # ahead: room for them beyond the last token.
        length = max_model_len + (2 * plan.most_nodes if captures else plan.beam_length) - 1
        length = padded_length(length, config.head_dim, target.device)
        lanes = max_num_seqs if captures else plan.lanes(max_num_seqs)
        slots = lanes + enable_prefix_caching
        prefixes = Prefixes(slots) if enable_prefix_caching else None
        # A prompt that takes several steps is read in a slot behind all others, unless nothing else can run meanwhile.
        self.max_num_batched_tokens = max_num_batched_tokens
        takes_steps = max_num_batched_tokens is not None and max_num_batched_tokens < max_model_len
        reading_slot = slots if takes_steps and max_num_seqs > 1 else 0
        slots += reading_slot > 0
        together = PREFILL_ROWS if target.device.type == "cuda" and max_num_seqs > 1 else 0
        dtype = kv_cache_dtype or target.dtype
        longest = min(PREFILL_CHUNK, max_model_len)
        captured_prompt = padded_length(longest, config.head_dim, target.device) if captures else 0
        self.kv_cache_bytes = plan_kv_cache(
            config,
            slots=slots,
            length=length,
            rows=max_num_seqs * plan.nodes if captures else lanes * plan.beam_length,
            chunk=longest,
            together=together,
            keys=PREFILL_KEYS if together and enable_prefix_caching else together,
            aside=captured_prompt,
            dtype=dtype,
            device=target.device,
            gpu_memory_utilization=gpu_memory_utilization,
        )
        self._cache = KVCache.allocate(config, slots, length, target.device, dtype)
        self._hidden = torch.zeros(max_num_seqs, config.hidden_size, device=target.device, dtype=target.dtype)
        self._late: list[Sequence] = []
        self._slots = Slots(self._cache, self._hidden, prefixes, reading_slot)
        self._running = self._slots.running
        graphs, prompts = self._make_graphs(chain, captured_prompt) if captures else (None, None)
        self.prefill = Prefill(target, self._slots, max_num_seqs, max_num_batched_tokens, together, prompts)
        self._waiting = self.prefill.waiting
        self.decoder = Decoder(target, self.drafter, self._slots, plan, graphs)
        self.runs_ahead = True
        self._ids = count()
        self._names: set[str] = set()
        self._admitted = False

    @property
    def plan(self) -> DraftPlan:
        """How much is drafted."""
        return self.decoder.plan

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.num_waiting or self._running or self._late)

    @property
    def num_running(self) -> int:
        """Requests that decode."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their first token, the one whose prompt is being read among them."""
        return self.prefill.num_waiting

    def add_request(self, prompt_token_ids: list[int], params: SamplingParams, request_id: str | None = None) -> str:
        """Queues a request; returns its id.

        Raises FourfoldError when the prompt is empty, holds unknown tokens, or is too long with its max_tokens, and
        when a request of that id has not ended yet.
        """
        self.check_request(prompt_token_ids, params)
        name = request_id if request_id is not None else f"request-{next(self._ids)}"
        if name in self._names:
            raise FourfoldError(f"request {name} has not ended yet; give another id")
        self._names.add(name)
        output = RequestOutput(name, list(prompt_token_ids), arrival_time=time.perf_counter())
        self._waiting.append(Sequence(output, params, self._ends, self._text))
        return name

    def check_request(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Raises FourfoldError when the prompt is empty, holds unknown tokens, or is too long with its max_tokens.

        Reads nothing that changes: any thread may ask.
        """
        tokens = len(prompt_token_ids) + params.max_tokens
        if not prompt_token_ids:
            raise FourfoldError("the prompt has no tokens")
        if not 0 <= min(prompt_token_ids) <= max(prompt_token_ids) < self.target.config.vocab_size:
            raise FourfoldError(f"the prompt holds a token outside 0 … {self.target.config.vocab_size - 1}")
        if tokens > self.max_model_len:
            raise FourfoldError(
                f"{len(prompt_token_ids)} prompt tokens + {params.max_tokens} max_tokens = {tokens}, "
                f"more than max_model_len {self.max_model_len}"
            )

    def cancel(self, request_id: str) -> bool:
        """Ends a request at once and frees its slot; False if it is not known (any more).

        Between two steps: other threads hand it to the one that steps.
        """
        for sequence in self.prefill.sequences:
            if sequence.output.request_id == request_id:
                self.prefill.drop(sequence)
                self._names.discard(request_id)
                return sequence.finish("cancelled")
        self._catch_up()
        for sequence in self._running:
            if sequence.output.request_id == request_id:
                sequence.finish("cancelled")
                self._release([sequence])
                # What it got from the step that was launched ahead nobody waits for.
                self._late = [late for late in self._late if late is not sequence]
                return True
        return False

    def draft_by(self, plan: DraftPlan) -> None:
        """Drafts by another plan from the next step on; no wider or longer than the one at the start."""
        self._catch_up()
        self.decoder.plan = plan
        # What is captured for a GPU has to take up where other shapes left off.
        self.decoder.running_changed()

    def cancel_all(self) -> None:
        """Ends all requests."""
        for sequence in [*self.prefill.sequences, *self._running]:
            self.cancel(sequence.output.request_id)

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Reads the prompts of waiting requests into free slots; with none to read, or after a step that did, decodes.

        Returns the outputs that grew or ended, those that did between steps among them: none while a long prompt is
        read. A request that fails ends with its output's `error`; the others go on.
        """
        if self._admits():
            self._catch_up()
        late, self._late = self._late, []
        # Running requests have every second step at least: a long prompt, or a stream of requests that end with their
        # first token and never fill the slots, would otherwise hold up all others.
        self._admitted = self._admits() and not (self._admitted and self._running)
        changed = self._read() if self._admitted else self._decode() if self._running else []
        return [sequence.output for sequence in dict.fromkeys([*late, *changed])]

    def _admits(self) -> bool:
        """Whether a waiting request could have a slot."""
        return self.num_waiting > 0 and len(self._running) < self.max_num_seqs

    def generate(
        self,
        prompts: list[list[int]],
        params: list[SamplingParams],
        on_output: Callable[[RequestOutput], None] | None = None,
        on_finish: Callable[[RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Runs requests to their end; returns their outputs in the order of the prompts.

        `on_output` is called for every output that grew, `on_finish` once for each that ended; either may cancel.
        Raises FourfoldError, when all have ended, if one of them failed.
        """
        outputs: list[RequestOutput] = []
        for prompt, p in zip(prompts, params, strict=True):
            self.add_request(prompt, p)
            outputs.append(self._waiting[-1].output)
        # A request that was cancelled between two steps is in no step's outputs any more.
        pending = {output.request_id: output for output in outputs}
        while pending:
            for output in self.step():
                if on_output is not None:
                    on_output(output)
            for name, output in list(pending.items()):
                if output.finish_reason is not None:
                    del pending[name]
                    if on_finish is not None:
                        on_finish(output)
        for output in outputs:
            output.check()
        return outputs

    def _read(self) -> list[Sequence]:
        """Reads prompts; returns the requests whose prompts were read."""
        read = self.prefill.step()
        if read:
            self.decoder.running_changed()
        self._release([sequence for sequence in read if sequence.output.finish_reason is not None])
        return read

    def _make_chain(self, plan: DraftPlan) -> "DraftChain | None":
        """What drafts on a GPU."""
        if self.drafter is None or not plan.drafts:
            return None
        from fourfold.modeling.draft_decode import DraftChain, table_bytes  # Triton is there where a GPU is

        self.draft_table_bytes = table_bytes(self.drafter, self.target.dtype)
        check_draft_table(self.draft_table_bytes, self.target.device)
        return DraftChain(self.drafter, self.target.embedding)

    def _make_graphs(self, chain: "DraftChain | None", longest: int) -> "tuple[DecodeGraphs, PromptGraphs]":
        """The captured steps and prompts, on a GPU. longest: tokens of a prompt."""
        from fourfold.engine.graphs import DecodeGraphs  # Triton is there where a GPU is
        from fourfold.engine.prompt_graphs import PromptGraphs

        captures = Captures()
        steps = DecodeGraphs(self.target, self.drafter, self._cache, self._hidden, self.max_num_seqs, chain, captures)
        return steps, PromptGraphs(self.target, longest, self._cache.data.dtype, captures)

    def _decode(self) -> list[Sequence]:
        """One step for every running request; returns those that it changed."""
        changed = list(self._running)
        try:
            self._release(self.decoder.step(self.runs_ahead and not self._admits()))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # Nothing of the step counts: the others take it again, without the request that came last.
            self.decoder.forget()
            for sequence in changed:
                sequence.forget_untold()
            last = max(self._running, key=lambda sequence: sequence.output.arrival_time)
            last.fail_for_memory(f"while {len(self._running)} requests were decoded")
            self._release([last])
        return changed

    def _catch_up(self) -> None:
        """Gives the running requests the tokens of the step that was launched ahead: they are about to change."""
        if self.decoder.is_ahead:
            self._late += self._running
            self._release(self.decoder.catch_up())

    def _release(self, ended: list[Sequence]) -> None:
        """Takes requests that have ended off the running ones; some may have failed before they ran."""
        if ended:
            ran = [sequence for sequence in ended if sequence in self._running]
            self._slots.release(ran, self.prefill.reading)
            self._names -= {sequence.output.request_id for sequence in ended}
            self.decoder.running_changed()
