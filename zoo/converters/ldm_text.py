"""What published files call the tensors of the text tower that latent diffusion trained: tables of our name -> theirs,
as those of clip_names.

Layouts:
    CompVis     x-transformers: token_emb, pos_emb, attn_layers.layers, which number the two halves of a block one after
                the other; cond_stage_model.transformer. in the file of a whole model
    diffusers   LDMBertModel: model.embed_tokens and so on

Both have to_logits beside it, which no UNet reads. Sources: CompVis/latent-diffusion, ldm/modules/x_transformer.py and
encoders/modules.py, BERTEmbedder; diffusers, pipelines/latent_diffusion, LDMBertModel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from zoo.converters.clip_names import Names
from zoo.converters.modules import State

SAID = {"heads": 8}  # of both published towers; all else shapes tell
PAD = 0  # of bert-base-uncased
FIXED = {"scale_embedding": False, "activation_function": "gelu"}  # of an LDMBertModel

COMPVIS: Names = {
    "embed.weight": "token_emb.weight",
    "positions": "pos_emb.emb.weight",
    "blocks.#.norm1.*": "attn_layers.blocks.#.0.0.*",
    "blocks.#.attention.qkv.weight": tuple(f"attn_layers.blocks.#.0.1.to_{part}.weight" for part in "qkv"),
    "blocks.#.attention.out.*": "attn_layers.blocks.#.0.1.to_out.*",
    "blocks.#.norm2.*": "attn_layers.blocks.#.1.0.*",
    "blocks.#.mlp.up.*": "attn_layers.blocks.#.1.1.net.0.0.*",
    "blocks.#.mlp.down.*": "attn_layers.blocks.#.1.1.net.2.*",
    "norm_out.*": "norm.*",
}
DIFFUSERS: Names = {
    "embed.weight": "embed_tokens.weight",
    "positions": "embed_positions.weight",
    "blocks.#.norm1.*": "layers.#.self_attn_layer_norm.*",
    "blocks.#.attention.qkv.weight": tuple(f"layers.#.self_attn.{part}_proj.weight" for part in "qkv"),
    "blocks.#.attention.out.*": "layers.#.self_attn.out_proj.*",
    "blocks.#.norm2.*": "layers.#.final_layer_norm.*",
    "blocks.#.mlp.up.*": "layers.#.fc1.*",
    "blocks.#.mlp.down.*": "layers.#.fc2.*",
    "norm_out.*": "layer_norm.*",
}


def paired(state: Mapping) -> State:
    """CompVis's names with layers 2 n and 2 n + 1 as halves 0 and 1 of block n, as the table has them; others stay."""

    def block(found: re.Match) -> str:
        number, half = divmod(int(found[1]), 2)
        return f"attn_layers.blocks.{number}.{half}."

    return {re.sub(r"^attn_layers\.layers\.(\d+)\.", block, name): tensor for name, tensor in state.items()}


def unpaired(state: Mapping) -> State:
    """The other way round."""

    def layer(found: re.Match) -> str:
        return f"attn_layers.layers.{2 * int(found[1]) + int(found[2])}."

    return {re.sub(r"^attn_layers\.blocks\.(\d+)\.([01])\.", layer, name): tensor for name, tensor in state.items()}


def to_config(config: Mapping) -> dict:
    """Our config -> the config.json of an LDMBertModel."""
    return {
        "architectures": ["LDMBertModel"],
        "model_type": "ldmbert",
        "vocab_size": config["vocab"],
        "d_model": config["width"],
        "encoder_ffn_dim": round(config["width"] * config["mlp_ratio"]),
        "encoder_layers": config["depth"],
        "encoder_attention_heads": config["heads"],
        "head_dim": config["head_width"],
        "max_position_embeddings": config["context"],
        "pad_token_id": PAD,
        **FIXED,
    }
