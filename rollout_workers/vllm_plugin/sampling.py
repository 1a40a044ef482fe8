"""Temperature and top-p for the tokens that speculative decoding verifies.

Defect upstream (vLLM 0.32, CPU): the kernel that repeats each sequence's temperature and top-p for its draft tokens writes into an
int64 copy of its output and drops the copy. The sampler then divides the policy's logits by uninitialised memory: tokens are
drawn at a random temperature, nearly every draft is rejected, and nothing reports an error. `raw` logprobs hide it, since they
are taken before the division; `processed` ones show NaN, 0 and log(1 / vocabulary).
"""

from __future__ import annotations

import torch
from torch import Tensor


def expand_batch_to_tokens(x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0) -> Tensor:
    """x [B], of which sequence i has cu[i] - cu[i - 1] tokens -> [num_tokens]; `replace_from` becomes `replace_to` on the way.

    [a, b, c] with cu = [2, 5, 6]  ->  [a, a, b, b, b, c]
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1)).long()
    value = torch.where(x == replace_from, torch.as_tensor(replace_to, dtype=x.dtype, device=x.device), x)
    return value.repeat_interleave(counts, output_size=num_tokens)


def install() -> None:
    """Replace the stock function where the rejection sampler looks it up."""
    import vllm.v1.sample.rejection_sampler as rejection_sampler

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
