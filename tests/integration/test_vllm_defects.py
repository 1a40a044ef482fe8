"""What is wrong in stock vLLM on CPU, by name: each test holds with our patch and fails without it.

A test of the stock code that passes (XPASS, which strict xfail reports as a failure) says that upstream is right now: delete the patch,
its line in `vllm_plugin.register`, and the test here. Nothing here starts an engine. Upstream's functions are taken from where no patch
puts anything, so an engine in the same process changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("vllm")
from vllm.platforms import current_platform

from rollout_workers.vllm_plugin import conv_alias, conv_update, kernel_scan, latent_moe, mtp_dtype, sampling, seeded, ssm_update
from tests.unit.test_ssm_update import check_states

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not current_platform.is_cpu(), reason="the defects are of vLLM's CPU build"),
]


def stock(patch: str, error: type[BaseException] | tuple[type[BaseException], ...]) -> Any:
    """The parameter that stands for upstream's code."""
    reason = f"vLLM 0.32 on CPU, the reason for rollout_workers/vllm_plugin/{patch}.py"
    return pytest.param("stock", marks=pytest.mark.xfail(strict=True, raises=error, reason=reason))


@pytest.mark.parametrize("whose", ["ours", stock("conv_update", AssertionError)])
def test_the_convolution_forgets_rejected_drafts(whose: str) -> None:
    """`causal_conv1d_update` ignores num_accepted_tokens: rejected tokens stay in the state."""
    from vllm.model_executor.layers.mamba.ops.cpu.causal_conv1d import causal_conv1d_update_cpu

    update = conv_update.causal_conv1d_update if whose == "ours" else causal_conv1d_update_cpu
    torch.manual_seed(1)
    batch, dim, width, k = 2, 32, 4, 2
    weight, state = torch.randn(dim, width), torch.randn(8, dim, width - 1 + k)
    slots, starts = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32), torch.tensor([0, 3, 6], dtype=torch.int32)
    before = state[[1, 4], :, : width - 1].clone()  # one token was accepted before: the window starts at the beginning
    first, second, accepted = torch.randn(batch, 3, dim), torch.randn(batch, 3, dim), [1, 2]

    def step(x: Tensor, stands: list[int]) -> Tensor:
        return update(
            x.reshape(-1, dim).clone(), state, weight, None, None, conv_state_indices=slots,
            num_accepted_tokens=torch.tensor(stands, dtype=torch.int32), query_start_loc=starts,
        ).view(batch, 3, dim)  # fmt: skip

    step(first, [1, 1])
    out = step(second, accepted)
    for s in range(batch):
        inputs = torch.cat([before[s], first[s, : accepted[s]].T, second[s].T], 1)[None]
        wanted = F.conv1d(inputs, weight[:, None], groups=dim)[0, :, -3:].T
        torch.testing.assert_close(out[s], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("whose", ["ours", stock("ssm_update", (AssertionError, RuntimeError))])
def test_the_recurrent_state_forgets_rejected_drafts(whose: str) -> None:
    """`selective_state_update_cpu` ignores num_accepted_tokens, and finds the states of the first sequence only."""
    from vllm.model_executor.layers.mamba.ops.cpu.mamba_ssm import selective_state_update

    def upstream(state: Tensor, x: Tensor, dt: Tensor, *rest: Tensor) -> None:
        a, b, c, d, bias, slots, accepted, starts, out = rest
        selective_state_update(
            state, x, dt.contiguous(), a.contiguous(), b, c, D=d.contiguous(), dt_bias=bias.contiguous(), dt_softplus=True,
            state_batch_indices=slots.int(), dst_state_batch_indices=slots.int(), out=out, num_accepted_tokens=accepted.int(),
            cu_seqlens=starts.int(),
        )  # fmt: skip

    check_states(ssm_update.verify_update if whose == "ours" else upstream)


@pytest.mark.parametrize("whose", ["ours", stock("sampling", AssertionError)])
def test_each_draft_token_has_its_sequences_temperature(whose: str) -> None:
    """The kernel behind `expand_batch_to_tokens` writes into an int64 copy of its output, which is dropped."""
    from vllm.utils import cpu_triton_utils

    def upstream(x: Tensor, ends: Tensor, count: int, replace_from: int, replace_to: int) -> Tensor:
        out = torch.full((count,), 77.0)  # upstream's caller does not even fill it
        cpu_triton_utils._expand_kernel_impl(out, x, ends, replace_from, replace_to)
        return out

    expand = sampling.expand_batch_to_tokens if whose == "ours" else upstream
    temperature, ends = torch.tensor([0.5, 0.0, 1.5]), torch.tensor([2, 5, 6], dtype=torch.int32)
    assert expand(temperature, ends, 6, 0, 1).tolist() == [0.5, 0.5, 1.0, 1.0, 1.0, 1.5]


@pytest.mark.parametrize("whose", ["ours", stock("latent_moe", NotImplementedError)])
def test_experts_without_a_gate_are_no_reason_to_refuse_a_model(whose: str) -> None:
    """The fused MoE layer is told is_act_and_mul=False, as NemotronH's relu^2 experts need, and refuses on CPU."""
    if whose == "ours":
        torch.manual_seed(0)
        z, up, down = torch.randn(5, 8), torch.randn(3, 6, 8), torch.randn(8, 3, 6)
        weight, index = torch.rand(5, 2), torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]])
        chosen = ((F.relu(z[t] @ up[e].T) ** 2 @ down[:, e].T) * weight[t, r] for t in range(5) for r, e in enumerate(index[t].tolist()))
        wanted = torch.stack(list(chosen)).view(5, 2, 8).sum(1)
        torch.testing.assert_close(latent_moe.dense_experts(z, up, down, weight, index), wanted)
        torch.testing.assert_close(latent_moe.sparse_experts(z, up, down, weight, index), wanted)
        return
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType

    FusedMoEConfig(
        num_experts=4, experts_per_token=2, hidden_dim=64, intermediate_size=64, num_local_experts=4, num_logical_experts=4,
        activation=MoEActivation.RELU2_NO_MUL, device="cpu", routing_method=RoutingMethodType.DeepSeekV3,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(), in_dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="other CPUs do not pack these weights")
@pytest.mark.parametrize("whose", ["ours", stock("conv_alias", AssertionError)])
def test_a_reload_in_bfloat16_reaches_the_convolutions(whose: str) -> None:
    """Packing moves `conv1d.weight` to new memory, and the view that the mixer computes with stays behind."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    mixer = torch.nn.Module()
    mixer.conv1d = torch.nn.Module()
    mixer.conv1d.weight = torch.nn.Parameter(torch.randn(64, 1, 4, dtype=torch.bfloat16), requires_grad=False)
    mixer.register_buffer("conv_weights", mixer.conv1d.weight.view(64, 4), persistent=False)
    dispatch_cpu_unquantized_gemm(mixer.conv1d, remove_weight=True)  # after the first load
    new = torch.randn(64, 1, 4, dtype=torch.bfloat16)
    mixer.conv1d.weight = torch.nn.Parameter(new.clone(), requires_grad=False)  # the layerwise reload makes the layer anew
    dispatch_cpu_unquantized_gemm(mixer.conv1d, remove_weight=True)
    if whose == "ours":
        conv_alias.refresh(mixer)
    assert torch.equal(mixer.conv_weights, new[:, 0])


def as_written(function: Any, file: str) -> Any:
    """The function within its wrappers: for compilation, which want a whole VllmConfig, and maybe our patch."""
    while function.__code__.co_filename != file:
        function = next(c.cell_contents for c in function.__closure__ if getattr(c.cell_contents, "__name__", "") in ("__init__", "made"))
    return function


@pytest.mark.parametrize("whose", ["ours", stock("mtp_dtype", AssertionError)])
def test_the_mtp_head_is_made_in_the_engines_precision(whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`eh_proj` is made in `config.dtype`, which is the checkpoint's, and is then given what the engine computes with."""
    from vllm.model_executor.models import nemotron_h_mtp

    made: list[torch.dtype] = []

    class Layer(torch.nn.Module):
        def __init__(self, config: Any, **_: Any) -> None:
            super().__init__()
            made.append(config.dtype)

    for name in ("NemotronHMTPAttentionDecoderLayer", "NemotronHMTPMoEDecoderLayer"):
        monkeypatch.setattr(nemotron_h_mtp, name, Layer)
    monkeypatch.setattr(nemotron_h_mtp, "VocabParallelEmbedding", lambda *_: torch.nn.Identity())
    monkeypatch.setattr(nemotron_h_mtp, "get_draft_quant_config", lambda _: None)
    config = SimpleNamespace(
        dtype=torch.float32, vocab_size=8, hidden_size=4, num_hidden_layers=2, num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*E"
    )
    config.get_text_config = lambda: config
    draft = SimpleNamespace(hf_config=config, dtype=torch.bfloat16)
    settings = SimpleNamespace(speculative_config=SimpleNamespace(draft_model_config=draft), cache_config=None, parallel_config=None)

    init = as_written(nemotron_h_mtp.NemotronHMultiTokenPredictor.__init__, nemotron_h_mtp.__file__)
    predictor = nemotron_h_mtp.NemotronHMultiTokenPredictor.__new__(nemotron_h_mtp.NemotronHMultiTokenPredictor)
    (mtp_dtype.in_engines_dtype(init) if whose == "ours" else init)(predictor, vllm_config=settings)
    assert made == [torch.bfloat16] * 2


class Reached(Exception):
    """The runner has got past its generators."""


class OneRequest:
    """As much of an input batch as the runner looks at until it is done with generators: one request, whose prompt goes on."""

    num_reqs = 1

    def __init__(self, generator: torch.Generator) -> None:
        self.generators = {0: generator}

    @property
    def req_ids(self) -> Iterator[str]:
        raise Reached


@pytest.mark.parametrize("whose", ["ours", stock("seeded", RuntimeError)])
def test_a_seeded_request_may_be_prefilled_in_parts(whose: str) -> None:
    """After each part the runner sets the request's generator back by an offset, which only CUDA's generators have."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    generator = seeded.CpuGenerator() if whose == "ours" else torch.Generator()
    discarded = SimpleNamespace(np=torch.ones(1, dtype=torch.bool).numpy())
    runner = SimpleNamespace(input_batch=OneRequest(generator), discard_request_mask=discarded, use_async_scheduling=False)
    with pytest.raises(Reached):
        GPUModelRunner._bookkeeping_sync(runner, None, None, None, None, 0)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of deprecated names among those that are looked at
@pytest.mark.parametrize("whose", ["ours", stock("kernel_scan", AttributeError)])
def test_an_engine_starts_where_numba_is_loaded(whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for kernels to replace takes `vars` of every attribute of every module for a dict; one of llvmlite's is none."""
    import llvmlite.binding  # noqa: F401
    from vllm.triton_utils import dispatcher

    monkeypatch.delattr(dispatcher, "vars", raising=False)
    if whose == "ours":
        monkeypatch.setattr(dispatcher, "vars", kernel_scan.instance_dict, raising=False)
    dispatcher._rebind_kernels([])
