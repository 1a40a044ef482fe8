"""One vLLM engine: exact ids in and out, behaviour logprobs, and new weights without ending a sequence.

    sample()        prompt ids -> Completion, its tokens stamped with the policy version that sampled each
    load_weights()  stage and check, beside sampling -> pause -> take over, verify -> version -> resume -> probe (docs/weights.md)

This module and `vllm_plugin` are the only importers of vLLM. The engine proper lives in a process of its own, which ends with
this one whatever happens to it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import psutil
from numpy.typing import NDArray

from rl_core.architectures import has_full_attention_only
from rl_core.config import RolloutConfig
from rl_core.process_env import with_huge_pages
from rl_core.types import Completion, Receipt, SamplingParams
from rollout_workers.completions import completion, cut_off
from rollout_workers.vllm_plugin import BACKEND, OWNER_VARIABLE
from rollout_workers.vllm_plugin.auto_k import AUTO_VARIABLE
from rollout_workers.vllm_plugin.places import PLACES_VARIABLE, PROBE
from rollout_workers.vllm_plugin.thought_cap import THINKING

T = TypeVar("T")
log = logging.getLogger(__name__)

PROBES = 4
"""Completions sampled after every weight update as its proof. Their places in the batch are kept free, so that a proof never
queues behind the run's own work (vllm_plugin/places.py)."""
QUEUED = 1 / 4
"""Sequences that wait inside the engine, per sequence that it decodes at a time: whoever ends has a successor in the same step."""
PROBE_TOKENS = 24
"""Tokens per probe: 96 in all, enough for a mean; a wrong recurrent state shows after three or four."""

CACHED_BLOCK = 32
"""Tokens per block of an engine on CPU that caches prompts: whole blocks are shared, and 128, vLLM's choice, are more than many prompts
have. Its attention wants a multiple of 32."""
WARM_UP_TOKENS = 8
CONTROL_TIMEOUT_S = 120.0
"""Bound on one control call (pause, load, resume). They take milliseconds; a step of 32k prefill tokens may come first."""
PROBE_TIMEOUT_S = 300.0
STAGE_POLL_S = 0.01
"""Seconds between two questions whether weights are staged; each costs the engine a fraction of a step."""


class EngineError(RuntimeError):
    """An engine does not do what it was asked. The message is a sentence; the worker that hosts it is restarted."""


class WeightsMismatch(RuntimeError):
    """An engine does not hold the weights that were published: the run stops with this sentence, which names worker and tensor."""


class Engine:
    """Hosts one vLLM engine. Create it with `await Engine.start(...)`; end it with `shutdown()`."""

    def __init__(self, llm: Any, *, name: str, rollout: RolloutConfig, stop_ids: Sequence[int], vocab_size: int, version: int) -> None:
        self.name, self.version = name, version
        self._llm = llm
        self._rollout = rollout
        self._stop_ids = list(stop_ids)
        self._probe_prompts = probe_prompts(vocab_size)
        self._room = asyncio.Semaphore(rollout.max_num_seqs + math.ceil(QUEUED * rollout.max_num_seqs))
        self._loading = asyncio.Lock()
        self._updated = asyncio.Event()
        """Set, and replaced, when an update has ended, well or not."""
        self._unfit = ""
        """Why nothing may be sampled from the weights that are live; "" if they were verified."""
        self._began: dict[str, int] = {}
        """{request: version that it was sent under}."""
        self._stages = False
        self._caches_prompts: bool = llm.vllm_config.cache_config.enable_prefix_caching
        self._processes = _descendants()

    @staticmethod
    async def start(
        *, name: str, model_path: str, dtype: str, rollout: RolloutConfig, stop_ids: Sequence[int], seed: int = 0, version: int = 0
    ) -> Engine:
        """Load the checkpoint, warm up, and serve as policy `version`. Blocks the event loop while vLLM loads (10 to 20 s on CPU)."""
        os.environ.update(environment(rollout))
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = engine_arguments(model_path, dtype, rollout, seed)
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        vocab_size = int(llm.model_config.get_vocab_size())
        engine = Engine(llm, name=name, rollout=rollout, stop_ids=stop_ids, vocab_size=vocab_size, version=version)
        await engine._prepare()
        return engine

    async def sample(self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str) -> Completion:
        """Sample until a stop id, `max_tokens` or a full thought. Cancelling the awaiting task frees the sequence."""
        room = self._rollout.max_model_len - len(prompt_ids)
        if room < 1:
            raise ValueError(
                f"a prompt of {len(prompt_ids)} tokens leaves no room to answer: rollout.max_model_len is {self._rollout.max_model_len}"
            )
        async with self._room:
            times = 0
            while True:
                if self._unfit:
                    raise WeightsMismatch(self._unfit)
                # Sampled again, it is another request: what was seen of the first (`under_way`) is not the beginning of the second.
                updated, name = self._updated, f"{request_id}+{times}" if times else request_id
                done = await self._generate(prompt_ids, params, min(params.max_tokens, room), self._stop_ids, name)
                if done is not None:
                    return done
                await updated.wait()
                times += 1

    async def load_weights(self, version: int, blob: NDArray[np.uint8]) -> Receipt:
        """Bring `blob` (a sealed safetensors file's bytes: policy and `mtp.*` tensors) into policy and draft; running sequences go on
        under it. Returns once fresh completions were sampled under `version`.

        Raises WeightsMismatch if the engine does not hold them. Found before they were live, the engine goes on under the version that it
        has. Found after, it samples from nothing: its sequences end with the same sentence, and so does who asks for more, until an
        update has been verified. After an EngineError its state is unknown: restart it.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        async with self._loading:
            async with in_memory_file(blob) as path:
                update = WeightTransferUpdateRequest({"path": path, "version": version})
                began = time.monotonic()
                if self._stages:
                    await self._stage(version, update)
                staged = time.monotonic()
                await self._pause()
                paused = time.monotonic()  # the step that was under way has ended
                report = await (self._take_over() if self._stages else self._load_in_place(update))
                if report["mismatch"]:
                    await self._stand_still(self._sentence(version, report))
                if self._caches_prompts and not await self._control(self._llm.reset_prefix_cache(), "forget its prompts"):
                    raise EngineError(f"worker {self.name} did not forget the prompts of version {self.version}")
                await self._control(self._llm.update_weight_version(str(version)), "name its version")
                self.version, self._unfit = version, ""
                await self._control(self._llm.resume_generation(), "resume")
                self._update_ended()
                resumed = time.monotonic()
            probe = await self._probe(version)
        return Receipt(
            worker=self.name,
            version=version,
            pause_s=resumed - paused,
            stage_s=staged - began,
            num_bytes=int(blob.nbytes),
            checksums=report["checksums"],
            probe=probe,
        )

    async def _pause(self) -> None:
        """Sequences stand still, with what they have; or they end here, and `sample` starts them again."""
        # Not `pause_generation`, which does this and then sleeps for 20 ms, so that outputs arrive before it returns.
        mode = "keep" if self._rollout.in_flight == "keep" else "abort"
        await self._control(self._llm.engine_core.pause_scheduler_async(mode=mode, clear_cache=False), "pause")

    async def _stand_still(self, sentence: str) -> NoReturn:
        """Paused as it is, the engine stays so. Every sequence ends."""
        self._unfit = sentence
        await self._control(self._llm.engine_core.pause_scheduler_async(mode="abort", clear_cache=False), "end its sequences")
        self._update_ended()
        raise WeightsMismatch(sentence)

    def _update_ended(self) -> None:
        self._updated.set()
        self._updated = asyncio.Event()

    async def _stage(self, version: int, update: Any) -> None:
        """Build and check the new weights beside the live ones, which go on sampling."""
        await self._control(self._llm.start_weight_update(), "begin a weight update")
        await self._control(self._llm.update_weights(update), "stage the weights")
        report = await self._bounded(self._staged(), PROBE_TIMEOUT_S, "stage the weights")
        if report["mismatch"]:
            await self._control(self._llm.finish_weight_update(), "give up a weight update")
            raise WeightsMismatch(self._sentence(version, report))

    async def _take_over(self) -> Mapping[str, Any]:
        """What was staged becomes live, and is looked at once more."""
        await self._control(self._llm.finish_weight_update(), "take the weights over")
        return await self._report()

    async def _load_in_place(self, update: Any) -> Mapping[str, Any]:
        """Policy, then draft, layer by layer into the live models."""
        await self._control(self._llm.start_weight_update(), "begin a weight update")
        await self._control(self._llm.update_weights(update), "load the policy")
        await self._control(self._llm.finish_weight_update(), "finish the policy's update")
        if self._rollout.speculative_tokens:
            await self._control(self._llm.start_draft_weight_update(), "begin the draft's update")
            await self._control(self._llm.update_weights(update), "load the draft")
            await self._control(self._llm.finish_weight_update(), "finish the draft's update")
        return await self._report()

    def _sentence(self, version: int, report: Mapping[str, Any]) -> str:
        return f"worker {self.name} does not hold version {version}: {report['mismatch']}"

    async def _staged(self) -> Mapping[str, Any]:
        """What staging came to, once it has ended."""
        while not (report := await self._report()):
            await asyncio.sleep(STAGE_POLL_S)
        return report

    async def _report(self) -> Mapping[str, Any]:
        """{} while weights are being staged; otherwise of the worker that has something to complain of, if one has."""
        reports = await self._control(self._llm.collective_rpc("weights_report"), "say what it holds")
        if None in reports:
            return {}
        return next((r for r in reports if r["mismatch"]), reports[0])

    def under_way(self, since: Mapping[str, int]) -> dict[str, Completion]:
        """Of each sequence in `since` that has not ended: tokens after its first `since[id]` that have arrived (vllm_plugin/parcels.py).

        vLLM keeps them in this process anyway; nothing is sent, and nothing is copied twice.
        """
        states = {s.external_req_id: s for s in self._llm.output_processor.request_states.values()}
        return {name: cut_off(states[name], start, began=self._began[name]) for name, start in since.items() if name in states}

    async def hold_drafts(self, k: int | None) -> None:
        """Draft `k` tokens in every step from now on, 0 to `rollout.speculative_tokens`; None: choose again. With `rollout.auto_k` only."""
        most = self._rollout.speculative_tokens
        if not self._rollout.auto_k or (k is not None and not 0 <= k <= most):
            raise ValueError(f"{k} drafts to hold, wanted 0 to {most}, of an engine that chooses (rollout.auto_k)")
        await self._control(self._llm.collective_rpc("hold_drafts", args=(k,)), "hold its number of drafts")

    async def aclose(self) -> None:
        """`shutdown`, for whoever awaited the engine: what reads from it ends first, and so does not report its end as its death."""
        readers = [r for r in (self._llm.output_handler, self._llm.engine_core.resources.output_queue_task) if r is not None]
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        await asyncio.to_thread(self.shutdown)

    def shutdown(self) -> None:
        """End the engine's processes, by force if they do not end by themselves."""
        self._llm.shutdown()
        _, alive = psutil.wait_procs(self._processes, timeout=5)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=5)

    async def _prepare(self) -> None:
        """Name the version, open the weight channel, and take the first slow steps before anybody waits for them."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._control(self._llm.init_weight_transfer_engine(WeightTransferInitRequest({})), "open its weight channel")
        self._stages = all(await self._control(self._llm.collective_rpc("weights_open"), "look at its weights"))
        await self._control(self._llm.update_weight_version(str(self.version)), "name its version")
        if self._rollout.auto_k:  # nobody learns from the first steps: they are slow, and drafts behind prompts like these never stand
            await self.hold_drafts(self._rollout.speculative_tokens)
        params = SamplingParams(max_tokens=WARM_UP_TOKENS)
        count = self._rollout.max_num_seqs
        prompts = [self._probe_prompts[i % PROBES] for i in range(count)]
        work = [self._generate(ids, params, WARM_UP_TOKENS, [], f"warm-up-{i}") for i, ids in enumerate(prompts)]
        await self._bounded(asyncio.gather(*work), PROBE_TIMEOUT_S, "warm up")
        if self._rollout.auto_k:
            await self.hold_drafts(None)

    async def _probe(self, version: int) -> tuple[Completion, ...]:
        params = SamplingParams(max_tokens=PROBE_TOKENS, temperature=1.0)
        work = [
            self._generate(ids, params, PROBE_TOKENS, [], f"{PROBE}{version}-{i}-{time.monotonic_ns()}")
            for i, ids in enumerate(self._probe_prompts)
        ]
        done = await self._bounded(asyncio.gather(*work), PROBE_TIMEOUT_S, "sample its probes")
        probe = [c for c in done if c is not None]
        assert len(probe) == PROBES, "updates are one at a time: nothing else can end a probe"
        if wrong := {s.version for c in probe for s in c.spans} - {version}:
            raise EngineError(f"worker {self.name} sampled probes of version {version} under {sorted(wrong)}: updates overlapped")
        return tuple(probe)

    async def _generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, max_tokens: int, stop_ids: list[int], request_id: str
    ) -> Completion | None:
        """None if an update ended the sequence: `sample` knows what then."""
        from vllm import sampling_params
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        request = sampling_params.SamplingParams(
            max_tokens=max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            seed=params.seed,
            stop_token_ids=stop_ids,
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            skip_clone=True,
            output_kind=sampling_params.RequestOutputKind.FINAL_ONLY,
            extra_args={THINKING: asdict(params.thinking)} if params.thinking is not None else None,
        )
        final: Any = None
        prompt = [int(i) for i in prompt_ids]
        began = self._began[request_id] = self.version
        try:
            # The salt keeps apart what was computed under different weights; see vllm_plugin/prefix_cache.py.
            # As ids that need no rendering: everything else goes through a thread first.
            sent = tokens_input(prompt, cache_salt=str(began) if self._caches_prompts else None)
            async for output in self._llm.generate(sent, request, request_id):
                final = output
        except EngineDeadError as error:
            raise EngineError(f"the engine process of worker {self.name} died; its log says why") from error
        finally:
            del self._began[request_id]
        reason = None if final is None else final.outputs[0].finish_reason
        if reason == "abort" and (self._rollout.in_flight == "restart" or self._unfit):
            return None
        if reason not in ("stop", "length"):
            raise EngineError(f"worker {self.name} gave up request {request_id} (finish reason {reason!r}); wanted 'stop' or 'length'")
        return completion(prompt, final.outputs[0], began=began, speculative=bool(self._rollout.speculative_tokens))

    async def _control(self, call: Awaitable[T], what: str) -> T:
        return await self._bounded(call, CONTROL_TIMEOUT_S, what)

    async def _bounded(self, call: Awaitable[T], seconds: float, what: str) -> T:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return await asyncio.wait_for(call, seconds)
        except TimeoutError:
            raise EngineError(f"worker {self.name} did not {what} within {seconds:.0f} s") from None
        except EngineDeadError as error:
            raise EngineError(f"worker {self.name} could not {what}: its engine process died") from error


def engine_arguments(model_path: str, dtype: str, rollout: RolloutConfig, seed: int) -> dict[str, Any]:
    """vLLM's arguments."""
    from vllm.platforms import current_platform

    k = rollout.speculative_tokens
    arguments: dict[str, Any] = {
        "model": model_path,
        "dtype": dtype,
        "seed": seed,
        "skip_tokenizer_init": True,  # ids in, ids out: text never passes through here
        "enforce_eager": current_platform.is_cpu(),
        # Mamba states are kept per sequence, and not per block as keys and values are; with MTP they cannot be shared on CPU at all.
        "enable_prefix_caching": caches_prompts(model_path),
        # Room behind the longest sequence, so that drafting never meets the limit (wrong logprobs there: vllm#38711).
        "max_model_len": rollout.max_model_len + 1 + k,
        "max_num_seqs": rollout.max_num_seqs + PROBES,
        "max_num_batched_tokens": max(rollout.max_batched_tokens, (rollout.max_num_seqs + PROBES) * (1 + k)),
        "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled from: temperature and top-p included
        "weight_transfer_config": {"backend": BACKEND},
        "worker_extension_cls": "rollout_workers.vllm_plugin.weights.WorkerExtension",
        "disable_log_stats": True,
        "enable_log_requests": False,
    }
    if current_platform.is_cpu():
        arguments["kv_cache_memory_bytes"] = int(rollout.kv_cache_gib * 2**30)
        if caches_prompts(model_path):
            arguments["block_size"] = CACHED_BLOCK
    if k:
        if not has_mtp(model_path):
            raise EngineError(
                f"{model_path} has no MTP layer to draft with (num_nextn_predict_layers is missing in config.json); "
                f"set rollout.speculative_tokens=0"
            )
        arguments["speculative_config"] = {"method": "mtp", "num_speculative_tokens": k}
        arguments["per_request_spec_decode_metrics"] = "detailed"
    return arguments


def environment(rollout: RolloutConfig) -> dict[str, str]:
    """Environment variables that this process must have before vLLM is imported; engine processes inherit them."""
    return {
        OWNER_VARIABLE: str(os.getpid()),
        AUTO_VARIABLE: "1" if rollout.auto_k else "0",
        PLACES_VARIABLE: str(PROBES),
        "OMP_NUM_THREADS": str(rollout.num_threads),
        "GLIBC_TUNABLES": with_huge_pages(),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # learner and environments share the cores; a pinned engine would lose its own to them
        # Keeps the model in the engine's own process. vLLM otherwise adds one more on CPU, and a hop through it to every step.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # for the few places behind the longest sequence only
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # what a command prints is its answer
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def has_mtp(model_path: str) -> bool:
    """Whether a checkpoint folder carries a multi-token-prediction layer."""
    config = json.loads(Path(model_path, "config.json").read_text())
    return bool(config.get("num_nextn_predict_layers"))


def caches_prompts(model_path: str) -> bool:
    """Whether a prompt's keys and values serve other sequences that begin with it, under the same weights."""
    return has_full_attention_only(json.loads(Path(model_path, "config.json").read_text()))


def probe_prompts(vocab_size: int) -> list[list[int]]:
    """Fixed prompts of different lengths. Any ids will do: what is compared is two computations of the same numbers."""
    rng = np.random.default_rng(20)
    return [rng.integers(0, vocab_size, 8 * 2**i).tolist() for i in range(PROBES)]


@asynccontextmanager
async def in_memory_file(blob: NDArray[np.uint8]) -> AsyncIterator[str]:
    """A path under which other processes of this user can read `blob`. It holds no disk, and goes with this process at the latest."""
    with os.fdopen(os.memfd_create("polyrl-weights"), "wb", buffering=0) as file:

        def write() -> None:
            view = memoryview(np.ascontiguousarray(blob).data).cast("B")
            while view:
                view = view[file.write(view) :]

        await asyncio.to_thread(write)  # half a second for half a gigabyte, in which tokens and environments go on
        yield f"/proc/{os.getpid()}/fd/{file.fileno()}"


def _descendants() -> list[psutil.Process]:
    """The engine processes: children of this process that vLLM named so, and what they started."""
    engines = [p for p in psutil.Process().children(recursive=True) if "EngineCore" in p.name() or "EngineCore" in " ".join(p.cmdline())]
    return [*engines, *(child for engine in engines for child in engine.children(recursive=True))]
