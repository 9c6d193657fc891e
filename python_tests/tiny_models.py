"""Tiny models of many architectures, with random weights that are large enough to matter."""

import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)

from pysparse import data

VOCABULARY = 64
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BASE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2, **_IDS,
}  # fmt: skip
_GQA = {**_BASE, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, **_IDS}
_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4, **_IDS}
_LOCAL = ["sliding_attention", "full_attention", "sliding_attention"]
_EXPERTS = {
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "decoder_sparse_step": 1,
}

# name -> (config class, model class, settings, prunable matrices in a block)
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM, _GQA, 7),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, _GQA, 7),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {**_GQA, "head_dim": 8}, 7),
    "phi3": (Phi3Config, Phi3ForCausalLM, _GQA, 4),
    "mistral": (MistralConfig, MistralForCausalLM, {**_GQA, "sliding_window": 4}, 7),
    "gemma": (GemmaConfig, GemmaForCausalLM, {**_GQA, "head_dim": 8}, 7),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {**_GQA, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
        7,
    ),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {**_GQA, "head_dim": 8, "sliding_window": 4, "layer_types": _LOCAL},
        7,
    ),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {**_GPT2, "initializer_range": 0.2}, 4),
    "opt": (
        OPTConfig,
        OPTForCausalLM,
        {**_BASE, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},
        6,
    ),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, _BASE, 4),
    "bloom": (BloomConfig, BloomForCausalLM, {**_BLOOM, "initializer_range": 0.2}, 4),
    "bert": (BertConfig, BertModel, _BASE, 6),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {**_GQA, "num_local_experts": 4}, 12),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM, {**_GQA, **_EXPERTS}, 15),
}


# name -> (config class, model class, settings, prunable matrices in each block)
VISION = {
    "vit": (
        ViTConfig,
        ViTModel,
        {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": 16, "patch_size": 4, "initializer_range": 0.2,
        },
        [6, 6, 6],
    ),
    "resnet": (
        ResNetConfig,
        ResNetModel,
        {
            "embedding_size": 8, "hidden_sizes": [16, 24, 32], "depths": [2, 2, 1], "layer_type": "bottleneck",
        },
        [7, 7, 4],
    ),
}  # fmt: skip


def tiny(name="llama", dtype=torch.float32, **settings):
    """Return a model of that architecture in eval mode, the same one at each call."""
    torch.manual_seed(1)
    config_class, model_class, base, _ = {**ARCHITECTURES, **VISION}[name]
    return model_class(config_class(**{**base, **settings})).to(dtype).eval()


def tiny_albert():
    """Return a model whose three layers are one and the same module."""
    torch.manual_seed(1)
    return AlbertModel(AlbertConfig(**_BASE, embedding_size=16)).eval()


def tokens(sequences=6, length=12, seed=0):
    """Return random ids [sequences, length] without the special ones."""
    return torch.randint(3, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


def images(count=6, size=16, seed=0):
    """Return random images [count, 3, size, size]."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def save_llama(folder):
    """Save a Llama of two small blocks with the bundled tokenizer beside it, and return ``folder``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(data.demo_model_path()).save_pretrained(folder)
    return folder
