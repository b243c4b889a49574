"""What an answer says of its cost: token counts, times, and how many drafts were accepted."""

from typing import Any

from fourfold.engine.requests import RequestOutput, SpeculationStats


def usage(outputs: list[RequestOutput], prompts: int) -> dict[str, Any]:
    """OpenAI's counts. Each of the `prompts` counts once, however many answers it got."""
    choices = len(outputs) // prompts
    read = sum(len(output.prompt_token_ids) for output in outputs[::choices])
    generated = sum(len(output.token_ids) for output in outputs)
    cached = sum(output.num_cached_tokens for output in outputs[::choices])
    return {
        "prompt_tokens": read,
        "completion_tokens": generated,
        "total_tokens": read + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def request_metrics(outputs: list[RequestOutput], num_spec_tokens: int) -> dict[str, Any] | None:
    """Times and acceptance of a call's only request; None for calls with several, as in vLLM.

    Args:
        outputs: of the call's requests, all ended.
        num_spec_tokens: the most drafts of a verification.
    """
    if len(outputs) > 1:
        return None
    (output,) = outputs
    arrival, scheduled, first, end = (
        output.arrival_time,
        output.scheduled_time,
        output.first_token_time,
        output.finished_time,
    )
    assert scheduled is not None
    assert first is not None
    assert end is not None
    later = len(output.token_ids) - 1
    return {
        "time_to_first_token_ms": 1000 * (first - arrival),
        "queue_time_ms": 1000 * (scheduled - arrival),
        "generation_time_ms": 1000 * (end - first),
        "mean_itl_ms": 1000 * (end - first) / later if later else None,
        "tokens_per_second": len(output.token_ids) / (end - scheduled),
        "speculative_decoding": acceptance(output.speculation, num_spec_tokens),
    }


def acceptance(stats: SpeculationStats, num_spec_tokens: int) -> dict[str, Any] | None:
    """vLLM's record of a request's drafts; None if there were none.

    mean_acceptance_length counts the token that every verification yields; acceptance_histogram[i] is how many
    verifications accepted i drafts.
    """
    if not stats.num_drafts:
        return None
    # At least so many accepted: differences of neighbours are exactly so many.
    positions = stats.accepted_per_position
    reached = [stats.num_drafts, *positions, *[0] * (num_spec_tokens - len(positions)), 0]
    return {
        "mean_acceptance_length": stats.acceptance_length,
        "draft_acceptance_rate": stats.num_accepted_tokens / stats.num_draft_tokens if stats.num_draft_tokens else None,
        "acceptance_histogram": [reached[i] - reached[i + 1] for i in range(num_spec_tokens + 1)],
        "num_spec_steps": stats.num_drafts,
        "num_accepted_draft_tokens": stats.num_accepted_tokens,
        "num_draft_tokens": stats.num_draft_tokens,
        "num_spec_tokens": num_spec_tokens,
    }
