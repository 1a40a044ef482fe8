"""What vLLM's own engine processes need from us; they find it by the entry point `vllm.general_plugins`.

Everywhere: the weight-transfer backend "object_store", a stop where a thought is full (thought_cap.py), a prompt cache that can be
emptied while sequences run (prefix_cache.py), places in the batch for probes (places.py), a count of all passes (passes.py), tokens that
leave the engine a few times a second, and not one by one (parcels.py), and an engine process that never outlives the process that owns it.
On CPU only, where stock vLLM 0.32 is wrong or refuses for Mamba-2 / attention / MoE hybrids:

    conv_update.py   speculative decoding left rejected draft tokens in the convolution state (silently wrong samples)
    sampling.py      speculative decoding sampled at a temperature read from uninitialised memory (silently wrong samples)
    ssm_update.py    and the wrong recurrent states were read for drafts (silently wrong samples)
    conv_alias.py    a weight update in bfloat16 left the convolutions as they were (silently wrong samples)
    mtp_dtype.py     the MTP head took bfloat16 for float32 where the checkpoint was float32 (no draft was ever accepted)
    latent_moe.py    ungated (relu^2) experts are refused
    seeded.py        a seeded request ended the engine when its prompt was prefilled in parts
    kernel_scan.py   an engine in a process that has numba loaded did not start

and where it is right, but takes longer than a small model's forward pass (docs/speculation.md):

    mtp_draft.py     drafts of the MTP head
    rejection.py     verification of drafts
    auto_k.py        how many to draft, from what is measured
    kernels.py       what few tokens take of the above, compiled
    raw_weights.py   what kernels.py multiplies with
    lone_rank.py     process groups of an engine that is one process

On CUDA no layer is touched.
"""

from __future__ import annotations

import os
import select
import threading

OWNER_VARIABLE = "POLYRL_ENGINE_OWNER"
"""Environment variable with the id of the process that owns an engine; inherited by the engine's processes."""

BACKEND = "object_store"
"""Name of our weight-transfer engine."""


def register() -> None:
    """Called once or more in every vLLM process, before the model is built."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    from rollout_workers.vllm_plugin import parcels, passes, places, prefix_cache, thought_cap

    _die_with_owner()
    thought_cap.install()
    prefix_cache.install()
    places.install()
    passes.install()
    parcels.install()
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "rollout_workers.vllm_plugin.weights", "ObjectStoreWeights")
    if current_platform.is_cpu():
        from rollout_workers.vllm_plugin import (
            auto_k,
            conv_update,
            kernel_scan,
            latent_moe,
            lone_rank,
            mtp_draft,
            mtp_dtype,
            raw_weights,
            rejection,
            sampling,
            seeded,
            ssm_update,
        )

        for part in (
            auto_k, conv_update, kernel_scan, latent_moe, lone_rank, mtp_draft, mtp_dtype, raw_weights, rejection, sampling, seeded,
            ssm_update,
        ):  # fmt: skip
            part.install()


_watched: list[int] = []


def _die_with_owner() -> None:
    """End this process when the owner is gone: a killed Ray actor cannot shut its engine down, and an orphan would keep its cores.

    Waiting on a pidfd costs nothing and, unlike a parent-death signal, does not depend on which of the owner's threads forked.
    """
    owner = int(os.environ.get(OWNER_VARIABLE, "0"))
    if not owner or owner == os.getpid() or _watched:
        return
    _watched.append(owner)
    try:
        pidfd = os.pidfd_open(owner)
    except ProcessLookupError:
        os._exit(1)

    def watch() -> None:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        poller.poll()
        os._exit(1)

    threading.Thread(target=watch, name="owner-watch", daemon=True).start()
