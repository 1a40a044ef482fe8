"""A random hybrid model with an MTP layer in a folder: Mamba-2, attention, LatentMoE; half a million parameters."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import NemotronHConfig, NemotronHForCausalLM


def make_tiny_hybrid(out: Path, *, vocab_size: int = 128, seed: int = 0, scale: float = 1.0, n_group: int = 1) -> Path:
    """`scale` multiplies the matrices: the larger, the sharper the random distributions.

    Freshly initialised recurrent states fade within a token or two and hardly reach the output, so that an engine with wrong states
    passes for right. Here they last for tens of tokens and weigh as much as the present one.
    """
    torch.manual_seed(seed)
    d = 128
    config = NemotronHConfig(
        vocab_size=vocab_size, hidden_size=d, layers_block_type=["linear_attention", "moe", "linear_attention", "full_attention", "moe"],
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=32768, intermediate_size=256,
        ssm_state_size=16, mamba_num_heads=8, mamba_head_dim=32, n_groups=2, chunk_size=64, n_routed_experts=8, n_group=n_group,
        topk_group=max(1, n_group // 2), num_experts_per_tok=2, moe_intermediate_size=64, moe_shared_expert_intermediate_size=64,
        moe_latent_size=64,
    )  # fmt: skip
    NemotronHForCausalLM(config).float().save_pretrained(out)
    weights = {k: v * scale if v.dim() > 1 else v for k, v in load_file(out / "model.safetensors").items()}
    for name, w in weights.items():
        if name.endswith(".A_log"):
            weights[name] = torch.linspace(0.02, 0.3, len(w)).log()  # decay of a state per unit of time
        elif name.endswith(".dt_bias"):
            weights[name] = torch.zeros_like(w)  # a token takes softplus(0) = 0.7 units of time
        elif name.endswith("mixer.D"):
            weights[name] = 0.1 * torch.ones_like(w)  # the short cut past the state
        elif name.endswith("conv1d.weight"):
            weights[name] = 4 * w  # states grow with the square of it

    # Transformers neither builds nor saves the MTP layer.
    def random(*shape: int) -> torch.Tensor:
        return 0.02 * scale * torch.randn(*shape)

    first, second, expert = "mtp.layers.0.", "mtp.layers.1.", "backbone.layers.1.mixer."
    weights |= {first + n + ".weight": torch.ones(d) for n in ("enorm", "hnorm", "norm")}
    weights |= {second + n + ".weight": torch.ones(d) for n in ("norm", "final_layernorm")}
    shapes = {"eh_proj": (d, 2 * d), "mixer.q_proj": (128, d), "mixer.k_proj": (64, d), "mixer.v_proj": (64, d), "mixer.o_proj": (d, 128)}
    weights |= {f"{first}{n}.weight": random(*s) for n, s in shapes.items()}
    weights |= {second + "mixer." + k[len(expert) :]: v.clone() for k, v in list(weights.items()) if k.startswith(expert)}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    path = out / "config.json"
    settings = json.loads(path.read_text())
    settings |= {"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["full_attention", "moe"]}
    path.write_text(json.dumps(settings, indent=1))
    return out
