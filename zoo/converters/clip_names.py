"""What each published CLIP calls our tensors: tables of our name -> theirs.

`#` stands for a block's number, a last `*` for weight, bias and, of a batch norm, its statistics. A tuple names the
tensors that ours is made of, joined along the first axis. Facts: openai/CLIP, clip/model.py; transformers,
convert_clip_original_pytorch_to_hf.py, models/chinese_clip and models/altclip; OFA-Sys/Chinese-CLIP, clip/model.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

Names = dict[str, str | tuple[str, ...]]

LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# OpenAI multiplies by these from the right, so they lie as (in, out); a linear layer's weight lies as (out, in).
TRANSPOSED = {"visual.proj", "text_projection", "text.text_projection"}


@dataclass(frozen=True)
class Layout:
    """One published form. `marks` are tensors that together only it has."""

    name: str
    marks: tuple[str, ...]
    names: Names

    def pairs(self, depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(our name, their names) of every tensor that a model of at most `depth` blocks can have."""
        for ours, theirs in self.names.items():
            theirs = (theirs,) if isinstance(theirs, str) else theirs
            for number in range(depth if "#" in ours else 1):
                for leaf in LEAVES if "*" in ours else ("",):
                    yield _fill(ours, number, leaf), tuple(_fill(name, number, leaf) for name in theirs)


def _fill(name: str, number: int, leaf: str) -> str:
    return name.replace("#", str(number)).replace("*", leaf)


def _below(ours: str, theirs: str, names: Names) -> Names:
    """The table with a prefix on either side."""
    return {
        ours + a: theirs + b if isinstance(b, str) else tuple(theirs + part for part in b) for a, b in names.items()
    }


# --- OpenAI, open_clip ---
OPENAI_BLOCK: Names = {
    "norm1.*": "ln_1.*",
    "attention.qkv.weight": "attn.in_proj_weight",
    "attention.qkv.bias": "attn.in_proj_bias",
    "attention.out.*": "attn.out_proj.*",
    "norm2.*": "ln_2.*",
    "mlp.up.*": "mlp.c_fc.*",
    "mlp.down.*": "mlp.c_proj.*",
}
OPENAI_VIT: Names = {
    "image.patch.weight": "visual.conv1.weight",
    "image.class_token": "visual.class_embedding",
    "image.positions": "visual.positional_embedding",
    "image.norm_in.*": "visual.ln_pre.*",
    **_below("image.transformer.blocks.#.", "visual.transformer.resblocks.#.", OPENAI_BLOCK),
    "image.norm_out.*": "visual.ln_post.*",
    "image.project.weight": "visual.proj",
}
CONV_AND_NORM: Names = {f"{part}{n}.*": f"{part}{n}.*" for n in (1, 2, 3) for part in ("conv", "bn")}
BOTTLENECK: Names = CONV_AND_NORM | {"shortcut.conv.*": "downsample.0.*", "shortcut.bn.*": "downsample.1.*"}
OPENAI_RESNET: Names = {
    **_below("image.", "visual.", CONV_AND_NORM),
    **_below("image.layers.0.#.", "visual.layer1.#.", BOTTLENECK),
    **_below("image.layers.1.#.", "visual.layer2.#.", BOTTLENECK),
    **_below("image.layers.2.#.", "visual.layer3.#.", BOTTLENECK),
    **_below("image.layers.3.#.", "visual.layer4.#.", BOTTLENECK),
    "image.pool.positions": "visual.attnpool.positional_embedding",
    "image.pool.q.*": "visual.attnpool.q_proj.*",
    "image.pool.k.*": "visual.attnpool.k_proj.*",
    "image.pool.v.*": "visual.attnpool.v_proj.*",
    "image.pool.out.*": "visual.attnpool.c_proj.*",
}
OPENAI_TEXT: Names = {
    "text.embed.weight": "token_embedding.weight",
    "text.positions": "positional_embedding",
    **_below("text.transformer.blocks.#.", "transformer.resblocks.#.", OPENAI_BLOCK),
    "text.norm_out.*": "ln_final.*",
    "text.project.weight": "text_projection",
}

# --- Hugging Face ---
HF_BLOCK: Names = {
    "norm1.*": "layer_norm1.*",
    "attention.qkv.*": ("self_attn.q_proj.*", "self_attn.k_proj.*", "self_attn.v_proj.*"),
    "attention.out.*": "self_attn.out_proj.*",
    "norm2.*": "layer_norm2.*",
    "mlp.up.*": "mlp.fc1.*",
    "mlp.down.*": "mlp.fc2.*",
}
HF_VIT: Names = {
    "image.patch.weight": "vision_model.embeddings.patch_embedding.weight",
    "image.class_token": "vision_model.embeddings.class_embedding",
    "image.positions": "vision_model.embeddings.position_embedding.weight",
    "image.norm_in.*": "vision_model.pre_layrnorm.*",
    **_below("image.transformer.blocks.#.", "vision_model.encoder.layers.#.", HF_BLOCK),
    "image.norm_out.*": "vision_model.post_layernorm.*",
    "image.project.weight": "visual_projection.weight",
}
HF_TEXT: Names = {
    "text.embed.weight": "text_model.embeddings.token_embedding.weight",
    "text.positions": "text_model.embeddings.position_embedding.weight",
    **_below("text.transformer.blocks.#.", "text_model.encoder.layers.#.", HF_BLOCK),
    "text.norm_out.*": "text_model.final_layer_norm.*",
    "text.project.weight": "text_projection.weight",
}

# --- BERT and XLM-RoBERTa, whose blocks are `layer` in published files, `layers` in some versions of transformers ---
BERT_BLOCK: Names = {
    "attention.qkv.*": ("attention.self.query.*", "attention.self.key.*", "attention.self.value.*"),
    "attention.out.*": "attention.output.dense.*",
    "norm1.*": "attention.output.LayerNorm.*",
    "mlp.up.*": "intermediate.dense.*",
    "mlp.down.*": "output.dense.*",
    "norm2.*": "output.LayerNorm.*",
}
BERT: Names = {
    "embed.weight": "embeddings.word_embeddings.weight",
    "positions.weight": "embeddings.position_embeddings.weight",
    "types.weight": "embeddings.token_type_embeddings.weight",
    "norm_in.*": "embeddings.LayerNorm.*",
    **_below("blocks.#.", "encoder.layer.#.", BERT_BLOCK),
}
CHINESE_TEXT: Names = {**_below("text.", "bert.", BERT), "text.project.weight": "text_projection"}
HF_CHINESE_TEXT: Names = {**_below("text.", "text_model.", BERT), "text.project.weight": "text_projection.weight"}
ALT_TEXT: Names = {
    **_below("text.", "text_model.roberta.", BERT),
    "text.bridge.norm.*": "text_model.pre_LN.*",
    "text.bridge.linear.*": "text_model.transformation.*",
    "text.project.weight": "text_projection.weight",
}

# --- the layouts: each text tower with each image tower that it was published with ---
SCALE: Names = {"logit_scale": "logit_scale"}
BIAS: Names = {"logit_bias": "logit_bias"}  # SigLIP's, which open_clip has too
OPENAI_IMAGES = {"visual.proj": OPENAI_VIT | BIAS, "visual.attnpool.positional_embedding": OPENAI_RESNET | BIAS}
HF_IMAGES = {"visual_projection.weight": HF_VIT}


def _layouts(name: str, mark: str, text: Names, images: dict[str, Names]) -> tuple[Layout, ...]:
    return tuple(Layout(name, (mark, other), SCALE | image | text) for other, image in images.items())


OPENAI = _layouts("OpenAI", "token_embedding.weight", OPENAI_TEXT, OPENAI_IMAGES)
OPEN_CLIP = _layouts("open_clip", "text.token_embedding.weight", _below("", "text.", OPENAI_TEXT), OPENAI_IMAGES)
CHINESE = _layouts("Chinese-CLIP", "bert.embeddings.word_embeddings.weight", CHINESE_TEXT, OPENAI_IMAGES)
HUGGING_FACE = (
    *_layouts("Hugging Face", "text_model.embeddings.token_embedding.weight", HF_TEXT, HF_IMAGES),
    *_layouts("Hugging Face", "text_model.embeddings.word_embeddings.weight", HF_CHINESE_TEXT, HF_IMAGES),
    *_layouts("Hugging Face", "text_model.roberta.embeddings.word_embeddings.weight", ALT_TEXT, HF_IMAGES),
)
PUBLISHED = OPENAI + OPEN_CLIP + CHINESE + HUGGING_FACE
