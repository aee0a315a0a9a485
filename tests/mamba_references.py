"""Independent implementations of Mamba to compare ours with: transformers' mixers, and the pure parts of mamba-ssm.

`mamba_ssm` imports its CUDA extension; an empty module in its place is enough for the parts that are plain PyTorch.
transformers looks for `mamba_ssm` when its mixers are imported, so they come first: on a CPU they must not find it.
"""

import importlib
import sys
import types

import pytest

pytest.importorskip("transformers", reason="the extra encoders is not installed")

import transformers.models.mamba.modeling_mamba as hf_mamba
import transformers.models.mamba2.modeling_mamba2 as hf_mamba2
from transformers import DynamicCache, Mamba2Config, MambaConfig

sys.modules.setdefault("selective_scan_cuda", types.ModuleType("selective_scan_cuda"))

interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
mamba_simple = importlib.import_module("mamba_ssm.modules.mamba_simple")
mamba2_module = importlib.import_module("mamba_ssm.modules.mamba2")
ssd_combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
ssd_minimal = importlib.import_module("mamba_ssm.modules.ssd_minimal")


def hf_mamba_mixer(d_model: int, d_state: int, d_conv: int = 4, expand: int = 2):
    """transformers' Mamba-1 mixer; its state dict is that of `mamba_ssm.Mamba`."""
    config = MambaConfig(
        hidden_size=d_model, state_size=d_state, conv_kernel=d_conv, expand=expand, num_hidden_layers=1, use_cache=True
    )
    return hf_mamba.MambaMixer(config, 0).eval()


def hf_mamba2_mixer(d_model: int, d_state: int, headdim: int, d_conv: int = 4, expand: int = 2):
    """transformers' Mamba-2 mixer; its state dict is that of `mamba_ssm.Mamba2`."""
    config = Mamba2Config(
        hidden_size=d_model,
        state_size=d_state,
        conv_kernel=d_conv,
        expand=expand,
        num_heads=expand * d_model // headdim,
        head_dim=headdim,
        n_groups=1,
        num_hidden_layers=1,
        chunk_size=16,
        layer_norm_epsilon=1e-5,
        use_bias=False,
    )
    return hf_mamba2.Mamba2Mixer(config, 0).eval()


def cache_of(mixer):
    """The cache with which a mixer of transformers goes on step by step."""
    return DynamicCache(config=mixer.config)
