"""Tokens leave an engine in parcels, a few times a second; a sequence that ends takes its last ones along.

Upstream (vLLM 0.32) sends every token after the step that sampled it: for 64 sequences, 192 arrays of one number to pack in the engine's
process and to unpack in its owner's, which share the processors. Who asked for the outcome only (`FINAL_ONLY`) sees nothing of it
before the end. Outputs of such requests are held, joined, and sent together:

    step 1   a b c         held
    step 2   a b c         held
    step 3   a b(ends)     b's three sent
    step 4   a   c         HOLD_S have passed: a's four and c's three sent, each as one output

What is held was sampled under one version of the weights: before another is named, it is sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

HOLD_S = 0.2
"""Drafts are written twice a second from what has been sent (rollout_workers/worker.py)."""


class Parcels:
    """What one engine has sampled and not yet sent."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._sent = clock, clock()
        self._held: dict[int, dict[str, list[Any]]] = {}  # by client and request

    def gather(self, step: Mapping[int, Any], requests: Mapping[str, Any]) -> dict[int, Any]:
        """Of a step's `EngineCoreOutputs` per client, what is to be sent now. `requests`: the scheduler's, those that have not ended."""
        now = self._clock()
        due = now - self._sent >= HOLD_S
        if due:
            self._sent = now
        for client, outputs in step.items():
            held = self._held.setdefault(client, {})
            send = []
            for one in outputs.outputs:
                name = one.request_id
                if can_wait(one, requests.get(name)):
                    held.setdefault(name, []).append(one)
                else:
                    send.append(joined([*held.pop(name, ()), one]))
            outputs.outputs = send + (self._taken(client, requests) if due else [])
        return {client: outputs for client, outputs in step.items() if says_anything(outputs)}

    def take(self, requests: Mapping[str, Any]) -> dict[int, list[Any]]:
        """Everything that is held, by client: it is to be sent now."""
        self._sent = self._clock()
        return {client: taken for client in self._held if (taken := self._taken(client, requests))}

    def _taken(self, client: int, requests: Mapping[str, Any]) -> list[Any]:
        """Without what belongs to requests that were cancelled: nobody waits for it."""
        held, self._held[client] = self._held[client], {}
        return [joined(parts) for name, parts in held.items() if name in requests]


def can_wait(one: Any, request: Any) -> bool:
    """Whether an output is tokens and their logprobs and nothing else, of a request whose owner reads the outcome only."""
    from vllm.sampling_params import RequestOutputKind

    return (
        one.finish_reason is None
        and request is not None
        and request.sampling_params is not None
        and request.sampling_params.output_kind is RequestOutputKind.FINAL_ONLY
        and one.events is None
        and one.routed_experts is None
        and one.new_sampling_mask is None
        and one.new_prompt_logprobs_tensors is None
        and one.prompt_token_id_logprobs is None
        and one.kv_transfer_params is None
        and one.ec_transfer_params is None
        and one.mm_cache_miss_hashes is None
    )


def joined(parts: Sequence[Any]) -> Any:
    """The outputs of one request in a row, as one. The last of them says how it stands."""
    if len(parts) == 1:
        return parts[0]
    last = parts[-1]
    last.new_token_ids = [token for part in parts for token in part.new_token_ids]
    if lists := [part.new_logprobs for part in parts if part.new_logprobs is not None]:
        last.new_logprobs = lists[0]._replace(
            logprob_token_ids=np.concatenate([one.logprob_token_ids for one in lists]),
            logprobs=np.concatenate([one.logprobs for one in lists]),
            sampled_token_ranks=np.concatenate([one.sampled_token_ranks for one in lists]),
        )
    last.prefill_stats = parts[0].prefill_stats  # the prompt is read before the first token
    return last


def says_anything(outputs: Any) -> bool:
    """Whether there is something to send to a client after a step."""
    more = (outputs.scheduler_stats, outputs.utility_output, outputs.finished_requests, outputs.wave_complete, outputs.start_wave)
    return bool(outputs.outputs) or any(one is not None for one in more)


def install() -> None:
    """Between the steps of engines that have a process of their own, and the queue of what they send."""
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.engine.core import EngineCoreProc

    if hasattr(EngineCoreProc, "polyrl_parcels"):
        return

    def parcels_of(core: Any) -> Parcels:
        return core.__dict__.setdefault("polyrl_held", Parcels())  # type: ignore[no-any-return]

    def gathering(stock: Callable[[Any], tuple[dict[int, Any] | None, bool]]) -> Callable[[Any], tuple[dict[int, Any] | None, bool]]:
        def step(core: Any) -> tuple[dict[int, Any] | None, bool]:
            outputs, executed = stock(core)
            return parcels_of(core).gather(outputs, core.scheduler.requests) if outputs else outputs, executed

        return step

    named = EngineCoreProc.set_weight_version

    def set_weight_version(core: Any, weight_version: str) -> None:
        for client, outputs in parcels_of(core).take(core.scheduler.requests).items():
            core.output_queue.put_nowait((client, EngineCoreOutputs(outputs=outputs, weight_version=core._weight_version)))
        named(core, weight_version)

    EngineCoreProc.step = gathering(EngineCoreProc.step)
    EngineCoreProc.step_with_batch_queue = gathering(EngineCoreProc.step_with_batch_queue)
    EngineCoreProc.set_weight_version = set_weight_version
    EngineCoreProc.polyrl_parcels = True
