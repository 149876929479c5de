"""Latent diffusion's text-to-image models with random weights, made by diffusers' classes and spelt as diffusers and as
CompVis spell them, are loaded by AutoLoader, draw what LDMTextToImagePipeline draws, and come back bit for bit."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from torch import Tensor, nn

from zoo import AutoLoader, catalog, weights
from zoo.converters import text_encoder
from zoo.converters.stable_diffusion import to_compvis, to_diffusers, to_ours
from zoo.errors import WeightsMismatch
from zoo.models.stable_diffusion import StableDiffusion, StableDiffusionConfig
from zoo.models.text_encoder import LdmTextConfig, build_text, text_config

SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}  # where bert-base-uncased has them
VOCABULARY = [SPECIAL.get(id, f"[unused{id}]") for id in range(104)] + ["a", "red", "apple", "on", "the", "table"]
WINDOW, GUIDANCE, STEPS = 77, 4.0, 5
NOISE = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
PROMPT = "a Red apple on the table"


def spread(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0, 0.1)
    return model.eval()


def their_tower(**sizes) -> LDMBertModel:
    config = {"vocab_size": len(VOCABULARY), "d_model": 32, "encoder_ffn_dim": 64, "encoder_layers": 2}
    config |= {"encoder_attention_heads": 2, "head_dim": 8, "max_position_embeddings": WINDOW}
    return spread(LDMBertModel(LDMBertConfig(**config | sizes)))


def pipeline(first: str, folder: Path) -> diffusers.LDMTextToImagePipeline:
    """A whole tiny one, with eight pixels to a latent, as the class expects; `first`: "kl" or "vq"."""
    four = {"block_out_channels": (32,) * 4, "layers_per_block": 1}
    four |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    if first == "kl":
        vae, channels = diffusers.AutoencoderKL(latent_channels=4, **four), 4
    else:
        vae, channels = diffusers.VQModel(latent_channels=3, num_vq_embeddings=500, scaling_factor=1.0, **four), 3
    vae = spread(vae)
    if first == "vq":
        nn.init.normal_(vae.quantize.embedding.weight)  # as far apart as latents are
    unet = diffusers.UNet2DConditionModel(
        **{"sample_size": 4, "in_channels": channels, "out_channels": channels, "layers_per_block": 1},
        **{"block_out_channels": (32, 64), "cross_attention_dim": 32, "attention_head_dim": 2},
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    )
    for name, parameter in spread(unet).named_parameters():
        if "attn2.to_" in name:
            nn.init.normal_(parameter, std=0.5)  # the prompt shows
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(VOCABULARY))
    return diffusers.LDMTextToImagePipeline(
        vqvae=vae,
        bert=their_tower(),
        tokenizer=transformers.BertTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    )


# --- CompVis's names, from diffusers' --------------------------------------------------------------------------------
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
RESNET |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET = {  # of two levels of one block, the first with attention
    **{"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"},
    **{"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"},
    **{"down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.attentions.0": "input_blocks.1.1"},
    **{"down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op", "down_blocks.1.resnets.0": "input_blocks.3.0"},
    **{"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"},
    **{"mid_block.resnets.1": "middle_block.2"},
    **{"up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.resnets.1": "output_blocks.1.0"},
    **{"up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv"},
    **{"up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.attentions.0": "output_blocks.2.1"},
    **{"up_blocks.1.resnets.1": "output_blocks.3.0", "up_blocks.1.attentions.1": "output_blocks.3.1"},
}
VAE = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
}
VAE |= {"conv_norm_out": "norm_out", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v"}
VAE |= {"to_out.0": "proj_out", "conv_shortcut": "nin_shortcut"}
LAYER = {  # of block n: layer 2 n + the first number
    **{"self_attn_layer_norm": (0, "0"), "self_attn.out_proj": (0, "1.to_out"), "final_layer_norm": (1, "0")},
    **{f"self_attn.{part}_proj": (0, f"1.to_{part}") for part in "qkv"},
    **{"fc1": (1, "1.net.0.0"), "fc2": (1, "1.net.2")},
}


def compvis_tower(theirs: LDMBertModel) -> dict[str, Tensor]:
    """As x-transformers holds it, below cond_stage_model.transformer."""
    places = {"embed_tokens": "token_emb", "embed_positions": "pos_emb.emb", "layer_norm": "norm"}
    file = {}
    for name, tensor in theirs.model.state_dict().items():
        module, leaf = name.rsplit(".", 1)
        if found := re.match(r"layers\.(\d+)\.(.+)", module):
            half, place = LAYER[found[2]]
            module = f"attn_layers.layers.{2 * int(found[1]) + half}.{place}"
        else:
            module = places[module]
        file[f"{module}.{leaf}"] = tensor
    return file | {f"to_logits.{name}": tensor for name, tensor in theirs.to_logits.state_dict().items()}


def compvis_vae(theirs: nn.Module) -> dict[str, Tensor]:
    file = {}
    for name, tensor in theirs.state_dict().items():
        tensor = tensor[:, :, None, None] if ".attentions." in name and tensor.ndim == 2 else tensor
        for old, new in VAE.items():
            name = name.replace(old, new)
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{3 - int(found[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{3 - int(found[1])}.upsample", name)
        file[name] = tensor
    return file


def compvis(theirs: diffusers.LDMTextToImagePipeline) -> dict[str, Tensor]:
    """The file of a whole model."""
    file = {}
    for name, tensor in theirs.unet.state_dict().items():
        (place,) = (place for place in UNET if name.startswith(place + "."))
        rest = name.removeprefix(place + ".").split(".")
        rest[0] = RESNET.get(rest[0], rest[0]) if ".resnets." in place else rest[0]
        file[f"model.diffusion_model.{UNET[place]}.{'.'.join(rest)}"] = tensor
    file |= {f"first_stage_model.{name}": tensor for name, tensor in compvis_vae(theirs.vqvae).items()}
    file |= {f"cond_stage_model.transformer.{name}": tensor for name, tensor in compvis_tower(theirs.bert).items()}
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    return file | {"betas": betas.float(), "alphas_cumprod": (1 - betas).cumprod(0).float()}


def write_compvis(file: dict[str, Tensor], folder: Path) -> Path:
    """With what no shapes tell of so small a model beside it."""
    folder.mkdir()
    torch.save({"state_dict": file, "epoch": 7}, folder / "model.ckpt")
    sizes = {"text": {"heads": 2}, "unet": {"heads": [2, 2], "size": 4}, "guidance": GUIDANCE, "sampler": "ddim"}
    (folder / "config.json").write_text(json.dumps(sizes | {"steps": STEPS}))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    return folder / "model.ckpt"


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], tensor) for name, tensor in b.items())


def without_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if "to_logits." not in name}


def tower_of(state: dict[str, Tensor], config: dict) -> nn.Module:
    ours, sizes = text_encoder.to_ours(state, config)
    with weights.blank():
        model = build_text(text_config(sizes))
    return weights.load(model, ours).eval()


# --- the tower -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prefix", ["", "bert."])
@torch.no_grad()
def test_the_tower_of_diffusers_gives_what_it_gave_and_comes_back(prefix, tmp_path):
    theirs = their_tower()
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    ours = tower_of({prefix + name: tensor for name, tensor in theirs.state_dict().items()}, config)
    sizes = {"vocab": len(VOCABULARY), "width": 32, "depth": 2, "heads": 2, "head_width": 8, "mlp_ratio": 2.0}
    assert ours.config == LdmTextConfig(context=WINDOW, **sizes)
    tokens = torch.tensor([[101, 105, 106, 102, 0, 0]])
    torch.testing.assert_close(ours(tokens), theirs(tokens).last_hidden_state, atol=1e-5, rtol=1e-4)
    back, said = text_encoder.to_transformers(ours.state_dict(), dataclasses.asdict(ours.config))
    assert same(back, without_head(theirs.state_dict()))
    assert all(config[name] == value for name, value in said.items())
    again = LDMBertModel(LDMBertConfig(**said))
    assert without_head(again.state_dict()).keys() == back.keys()


@pytest.mark.parametrize("prefix", ["", "transformer.", "cond_stage_model.transformer."])
@torch.no_grad()
def test_the_tower_of_compvis_gives_what_it_gave_and_comes_back(prefix):
    theirs = their_tower(encoder_layers=12)  # layers of two digits
    file = compvis_tower(theirs)
    ours = tower_of({prefix + name: tensor for name, tensor in file.items()}, {"heads": 2})
    tokens = torch.tensor([[101, 105, 106, 102, 0, 0]])
    torch.testing.assert_close(ours(tokens), theirs(tokens).last_hidden_state, atol=1e-5, rtol=1e-4)
    back = text_encoder.to_compvis(ours.state_dict(), dataclasses.asdict(ours.config))
    assert same(back, {f"transformer.{name}": tensor for name, tensor in without_head(file).items()})


def test_published_towers_have_eight_heads_which_no_shape_tells():
    with torch.device("meta"):
        published = build_text(LdmTextConfig(width=640)).state_dict()
        file = text_encoder.to_compvis(published, dataclasses.asdict(LdmTextConfig(width=640)))
    assert text_config(text_encoder.to_ours(file, {})[1]) == LdmTextConfig(width=640)


def test_a_tower_that_computes_otherwise_or_lacks_something_is_refused():
    state = their_tower().state_dict()
    with pytest.raises(WeightsMismatch, match="scale_embedding=True"):
        text_encoder.to_ours(state, {"scale_embedding": True})
    with pytest.raises(WeightsMismatch, match="left over: adapter.weight"):
        tower_of(state | {"adapter.weight": torch.zeros(1)}, {"heads": 2})
    file = compvis_tower(their_tower())
    del file["attn_layers.layers.2.1.to_k.weight"]
    with pytest.raises(WeightsMismatch, match="missing: blocks.1.attention.qkv.weight"):
        tower_of(file, {"heads": 2})


# --- whole models ----------------------------------------------------------------------------------------------------
def drawn(model: StableDiffusion, **words) -> Tensor:
    """What `generate` draws, before it is rounded to 256 levels: (3, H, W)."""
    seen = []

    def look(pictures: Tensor) -> Tensor:
        seen.append(pictures)
        return torch.zeros(len(pictures), dtype=torch.bool)

    model.generate(PROMPT, seed=5, check=look, progress=False, **words)
    return seen[0][0]


def their_drawing(theirs: diffusers.LDMTextToImagePipeline, guidance: float) -> Tensor:
    theirs.set_progress_bar_config(disable=True)
    words = {"guidance_scale": guidance, "num_inference_steps": STEPS, "eta": 0.0, "output_type": "np"}
    picture = theirs([PROMPT], generator=torch.Generator().manual_seed(5), **words).images[0]
    assert picture.shape == (32, 32, 3) and np.std(picture) > 0.02  # there is something to compare
    return torch.from_numpy(picture).permute(2, 0, 1)


@pytest.mark.parametrize("first", ["kl", "vq"])
def test_compvis_one_file_draws_what_the_pipeline_draws(first, tmp_path):
    theirs = pipeline(first, tmp_path / "theirs")
    ours = AutoLoader("text2img", "stable-diffusion", weights=write_compvis(compvis(theirs), tmp_path / "ours"))
    ours = ours.get_model().cpu()
    config = ours.config
    assert (config.start, config.end, config.pad, config.window) == (101, 102, 0, 77)
    assert ours.vae.scale == (0.18215 if first == "kl" else 1.0) and ours.image_size == 32
    words = theirs.tokenizer([PROMPT, ""], padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert words.tolist() == ours.tokenizer.tokenize_as_tensor([PROMPT, ""]).tolist()
    assert 100 not in words
    assert (drawn(ours) - their_drawing(theirs, GUIDANCE)).abs().max() < 1e-3  # what config.json says
    alone = their_drawing(theirs, 1.0)
    assert (drawn(ours, guidance=1.0) - alone).abs().max() < 1e-3
    assert (drawn(ours) - alone).abs().max() > 0.01


@pytest.mark.parametrize("first", ["kl", "vq"])
def test_compvis_file_comes_back(first, tmp_path):
    file = compvis(pipeline(first, tmp_path))
    state, config = to_ours(file, {"text": {"heads": 2}, "unet": {"heads": [2, 2], "size": 4}})
    config = dataclasses.asdict(StableDiffusionConfig.from_dict(config))
    assert same(to_compvis(state, config), without_head(file))
    assert same(to_ours(without_head(file), config)[0], state)
    with pytest.raises(WeightsMismatch, match=r"hand this model on as CompVis's single file"):
        to_diffusers(state, config)


def test_the_folder_of_the_pipeline_is_read_with_its_configs(tmp_path):
    """As `weights.read` and `read_config` call what is in folders."""
    theirs = pipeline("kl", tmp_path)
    parts = {"unet": theirs.unet, "vqvae": theirs.vqvae, "bert": theirs.bert}
    folder = {f"{part}.{name}": tensor for part, net in parts.items() for name, tensor in net.state_dict().items()}
    configs = {part: dict(net.config if part != "bert" else net.config.to_dict()) for part, net in parts.items()}
    configs["vqvae"]["scaling_factor"] = 0.25  # not that of most
    scheduler = {"_class_name": "DDIMScheduler", **theirs.scheduler.config}
    found, config = to_ours(folder, {"diffusers": configs | {"scheduler": scheduler}})
    said = {"text": {"heads": 2}, "unet": {"heads": [2, 2], "size": 4}, "vae": {"scale": 0.25}}
    expected, same_config = to_ours(compvis(theirs), said)
    assert same(found, expected)
    models = [StableDiffusionConfig.from_dict(sizes) for sizes in (config, same_config)]
    assert models[0] == dataclasses.replace(models[1], sampler="ddim")


def test_the_latents_of_a_vq_first_stage_were_not_scaled(tmp_path):
    file, said = compvis(pipeline("vq", tmp_path)), {"text": {"heads": 2}}
    plain = to_ours(file, said)
    assert to_ours(file | {"scale_factor": torch.tensor(1.0)}, said)[1] == plain[1]
    with pytest.raises(WeightsMismatch, match="multiplied with 0.5, and those of this model with 1:"):
        to_ours(file | {"scale_factor": torch.tensor(0.5)}, said)


def test_what_is_left_over_or_of_another_card_is_named(tmp_path):
    file = compvis(pipeline("vq", tmp_path / "theirs"))
    path = write_compvis(file | {"cond_stage_model.transformer.mem_k": torch.zeros(1)}, tmp_path / "ours")
    with pytest.raises(WeightsMismatch, match="1 are left over: text.mem_k"):
        AutoLoader("text2img", "stable-diffusion", weights=path).get_model()
    path = write_compvis(file, tmp_path / "again")
    with pytest.raises(WeightsMismatch, match="is not ldm-text2img-256: text.vocab is 110"):
        AutoLoader("text2img", "ldm-text2img-256", weights=path).get_model()


def test_the_folder_on_the_hub_is_read_by_its_card(tmp_path, monkeypatch):
    """unet, vqvae and bert, with files as torch.save writes them; here of a tiny model."""
    theirs = pipeline("kl", tmp_path)
    card = catalog.find("text2img", "ldm-text2im-large-256")
    state, config = to_ours(compvis(theirs), {"text": {"heads": 2}, "unet": {"heads": [2, 2], "size": 4}})
    drawing = {"guidance": GUIDANCE, "sampler": "ddim", "steps": STEPS}
    config = dataclasses.asdict(StableDiffusionConfig.from_dict(config | drawing))
    tiny = dataclasses.replace(card, name="tiny", config=config)
    monkeypatch.setattr(catalog, "CARDS", (tiny, *catalog.CARDS))
    for name, part in (("unet", theirs.unet), ("vqvae", theirs.vqvae), ("bert", theirs.bert)):
        part.save_config(tmp_path / name) if name != "bert" else part.config.save_pretrained(tmp_path / name)
        (file,) = (file for file in card.parts if file.startswith(f"{name}/"))
        torch.save(part.state_dict(), tmp_path / file)
    theirs.scheduler.save_pretrained(tmp_path / "scheduler")
    ours = AutoLoader("text2img", "tiny", weights=tmp_path, device="cpu").get_model()
    assert same(ours.state_dict(), state)
    expected = their_drawing(theirs, GUIDANCE)
    assert (drawn(ours) - expected).abs().max() < 1e-3
    theirs.tokenizer.save_pretrained(tmp_path / "tokenizer")
    theirs.save_config(tmp_path)
    ours = AutoLoader("text2img", "stable-diffusion", weights=tmp_path, device="cpu").get_model()
    assert same(ours.state_dict(), state)
    assert (drawn(ours, guidance=GUIDANCE, steps=STEPS) - expected).abs().max() < 1e-3
