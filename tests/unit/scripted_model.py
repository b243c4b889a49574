"""A model that writes a fixed text, token by token, in the place of a real one in a real server.

It takes the part of the transformer alone: engine, cache, tokenizer, server are the product's. What it has read it
keeps in the KV cache and nowhere else, so a prefix that the cache gave back wrongly would show in what it writes.

Run by itself it is that server: `python scripted_model.py PORT SCRIPT.json`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fourfold.engine import LLMEngine
from fourfold.model.tokenizer import load_tokenizer
from fourfold.modeling.config import TransformerConfig
from fourfold.modeling.kv_cache import KVCache
from fourfold.tools.plain import pieces

TOKENIZER = Path(__file__).with_name("smollm2_tokenizer")
"""SmolLM2's own: its special tokens, its rules, and the first thousand of its 49,152 tokens."""
ASSISTANT = "<|im_start|>assistant\n"
OUTPUT_END = "```\n"
MAX_MODEL_LEN = 2048


class ScriptedModel:
    """Writes the first part of a script after the assistant's marker, and each next one after an output block."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, script: list[str]) -> None:
        self.tokenizer, self.script = tokenizer, script
        self.device, self.dtype = torch.device("cpu"), torch.float32
        shape = {"vocab_size": 1024, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
        defaults = {"max_position_embeddings": MAX_MODEL_LEN, "rms_norm_eps": 1e-5, "rope_theta": 1e4}
        self.config = TransformerConfig(
            **shape, **heads, **defaults, architecture="LlamaForCausalLM", rope_scaling=None, tie_word_embeddings=True
        )
        self.tokens_read = 0
        self._marker = tokenizer.convert_tokens_to_ids("<|im_start|>")

    def forward(self, token_ids: Tensor, positions: Tensor, cache: KVCache, length: int, beams: Any = None) -> Tensor:
        """Hidden states that hold the next token's id. Shapes as in `Transformer.forward`."""
        self.tokens_read += token_ids.numel()
        hidden = torch.zeros(*token_ids.shape, 8)
        for row in range(len(token_ids)):
            memory = cache.data[0, row, 0, :, 0]
            memory[positions[row]] = token_ids[row].float()
            # Only the last token's state is asked for the next one.
            hidden[row, -1, 0] = self._following(memory[: int(positions[row, -1]) + 1].int().tolist())
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """All weight on the next token."""
        return torch.nn.functional.one_hot(hidden[..., 0].long(), 1024).float() * 1000

    def _following(self, context: list[int]) -> int:
        # Its turn begins at the marker's token; text that only looks like one is nothing to it.
        turn = max(i for i, token in enumerate(context) if token == self._marker)
        answer = str(self.tokenizer.decode(context[turn:])).removeprefix(ASSISTANT)
        blocks = answer.count("```output\n")
        done = answer.rpartition(OUTPUT_END)[2] if blocks else answer
        part = self.script[blocks]
        assert part.startswith(done), f"the context has become {done!r}, not a beginning of {part!r}"
        if done == part:
            return int(self.tokenizer.eos_token_id)
        # It writes ordinary tokens alone.
        return int(self.tokenizer.encode(pieces(part[len(done) :])[0])[0])


def scripted_engine(script: list[str], **options: Any) -> LLMEngine:
    """The product's engine around the scripted model."""
    tokenizer = load_tokenizer(TOKENIZER)
    model: Any = ScriptedModel(tokenizer, script)
    options = {"max_num_seqs": 4, "max_model_len": MAX_MODEL_LEN, "enable_prefix_caching": True, **options}
    return LLMEngine(model, tokenizer, end_token_ids=(int(tokenizer.eos_token_id),), **options)


if __name__ == "__main__":
    from fourfold.progress import start_logging
    from fourfold.server import serve
    from fourfold.server.guard import Limits

    start_logging(None)
    port, script = int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    serve.load_engine = lambda directory, device, caching: scripted_engine(script)  # type: ignore[assignment]
    serve.read_manifest = lambda *_: {"settings": {"backend": "torch"}}  # type: ignore[assignment]
    serve.serve(
        TOKENIZER,
        host="127.0.0.1",
        port=port,
        api_key=None,
        served_model_name="scripted",
        max_waiting=8,
        drain_seconds=1,
        limits=Limits(),
        device="cpu",
        enable_prefix_caching=True,
    )
