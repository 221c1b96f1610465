"""The most probable tokens of each row, in PyTorch: the oracle of the kernel, and what runs on a CPU."""

from __future__ import annotations

from torch import Tensor


def top_tokens_reference(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` most probable tokens and their log-probabilities; ties in any order.

    Args:
        logits: ``[T, V]`` of any floating dtype, -inf for masked tokens.
        width: W.

    Returns:
        ``(tokens [T, W] int64, log_probs [T, W] float32)``.
    """
    logits = logits.float()
    values, tokens = logits.topk(width, dim=-1)
    log_probs = values - logits.logsumexp(dim=-1, keepdim=True)
    # Only a row that is masked as a whole needs this: -inf minus -inf is NaN.
    return tokens, log_probs.masked_fill_(values.isneginf(), float("-inf"))
