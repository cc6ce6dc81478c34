"""Shapes from a configuration as ``transformers`` writes it, for decoders that are built as Llama is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .shapes import ModelShapes, ParamShape

# What ``model_type`` may be: (biases of q, k and v; norms of q and k). Others are built in other ways.
_LIKE_LLAMA = {"llama": (False, False), "mistral": (False, False), "qwen2": (True, False), "qwen3": (False, True)}
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


def shapes_of_config(config: Mapping[str, Any], source: str) -> ModelShapes:
    """The shapes of the model that ``config`` describes; ValueError if it is not like Llama, or lacks a number.

    The parameters have the dtype that the configuration names, else float32, as ``transformers`` makes them.
    """
    kind = config.get("model_type")
    if kind is not None and kind not in _LIKE_LLAMA:
        raise ValueError(
            f"dist_asgd: {source} has model_type {kind!r}; a plan knows the shapes of {', '.join(_LIKE_LLAMA)}. Build "
            f"the model on the meta device and pass it (with torch.device('meta'): model = "
            f"AutoModelForCausalLM.from_config(config)), or plan from its safetensors files or its number of "
            f"parameters."
        )
    missing = [key for key in _NEEDED if key not in config]
    if missing:
        raise ValueError(
            f"dist_asgd: {source} lacks {', '.join(missing)}. A plan needs {', '.join(_NEEDED)}, or a module, a "
            f"safetensors file or a number of parameters."
        )
    hidden, layers, heads, inter, vocab = (_number(config, key, source) for key in _NEEDED)
    kv_heads = _number(config, "num_key_value_heads", source, heads)
    if config.get("head_dim") is None and hidden % heads:
        raise ValueError(
            f"dist_asgd: {source}: num_attention_heads={heads} does not divide hidden_size={hidden}. Give head_dim."
        )
    head = _number(config, "head_dim", source, hidden // heads)
    qkv_bias, norms = _LIKE_LLAMA[kind or "llama"]
    every_bias = bool(config.get("attention_bias", False))
    dtype = _dtype(config, source)
    shapes: list[ParamShape] = []

    def add(name: str, *shape: int, bias: bool = False) -> None:
        shapes.append(ParamShape(f"{name}.weight", shape, dtype))
        if bias:
            shapes.append(ParamShape(f"{name}.bias", shape[:1], dtype))

    add("model.embed_tokens", vocab, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        add(f"{at}.self_attn.q_proj", heads * head, hidden, bias=qkv_bias or every_bias)
        add(f"{at}.self_attn.k_proj", kv_heads * head, hidden, bias=qkv_bias or every_bias)
        add(f"{at}.self_attn.v_proj", kv_heads * head, hidden, bias=qkv_bias or every_bias)
        add(f"{at}.self_attn.o_proj", hidden, heads * head, bias=every_bias)
        if norms:
            add(f"{at}.self_attn.q_norm", head)
            add(f"{at}.self_attn.k_norm", head)
        mlp_bias = bool(config.get("mlp_bias", False))
        add(f"{at}.mlp.gate_proj", inter, hidden, bias=mlp_bias)
        add(f"{at}.mlp.up_proj", inter, hidden, bias=mlp_bias)
        add(f"{at}.mlp.down_proj", hidden, inter, bias=mlp_bias)
        add(f"{at}.input_layernorm", hidden)
        add(f"{at}.post_attention_layernorm", hidden)
    add("model.norm", hidden)
    if not config.get("tie_word_embeddings", False):
        add("lm_head", vocab, hidden)
    assumption = () if kind else (f"{source} names no model_type: the model is taken for a decoder like Llama.",)
    return ModelShapes(f"{kind or 'Llama-like model'} of {source}", (tuple(shapes),), assumptions=assumption)


def _number(config: Mapping[str, Any], key: str, source: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"dist_asgd: {source}: {key} must be a positive whole number, got {value!r}.")
    return value


def _dtype(config: Mapping[str, Any], source: str) -> torch.dtype:
    named = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = named if isinstance(named, torch.dtype) else getattr(torch, str(named).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"dist_asgd: {source}: dtype {named!r} cannot be trained. Use float32, bfloat16 or float16.")
    return dtype
