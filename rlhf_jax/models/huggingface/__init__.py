"""Models in Hugging Face's formats, read and written without torch.

A model folder of transformers (`config.json` and safetensors files) is read by `load` and written
by `save`; `fetch` downloads one from the hub. An adapter folder of peft is read by `load_adapter`
and written by `save_adapter`.
"""

from rlhf_jax.models.huggingface.folders import check_finite, load, save, shape
from rlhf_jax.models.huggingface.hub import fetch
from rlhf_jax.models.huggingface.peft import load_adapter, save_adapter

__all__ = ["check_finite", "fetch", "load", "load_adapter", "save", "save_adapter", "shape"]
