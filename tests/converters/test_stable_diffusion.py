"""Whole Stable Diffusions with random weights, saved by diffusers and transformers themselves or spelt as CompVis
spells them, are loaded by AutoLoader and give what they gave; what is exported is what it came from, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from torch import Tensor, nn

from zoo import AutoLoader, weights
from zoo.commands.export import save_diffusers
from zoo.converters.noise import from_scheduler
from zoo.converters.stable_diffusion import to_compvis, to_diffusers, to_ours
from zoo.errors import SettingsError, UnreadableWeights, WeightsMismatch
from zoo.generation.samplers import SAMPLERS
from zoo.models.stable_diffusion import StableDiffusion, StableDiffusionConfig
from zoo.models.vq_latents import VqLatents
from zoo.models.vqgan import VqganConfig

VOCAB = 516  # 256 bytes, 256 that end a word, two merges, start and end
V1 = {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32, "attention_head_dim": 8}
UNETS = {
    "v1": V1,
    "v2": V1 | {"use_linear_projection": True, "attention_head_dim": [2, 4], "upcast_attention": True},
    "inpainting": V1 | {"in_channels": 9},
    "pruned": V1 | {"mid_block_type": None, "down_block_types": ["CrossAttnDownBlock2D"] * 2},
}
UNETS["pruned"]["up_block_types"] = ["CrossAttnUpBlock2D"] * 2
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PNDM = {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, **NOISE}


def spread(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0, 0.1)
    return model.eval()


@dataclasses.dataclass
class Original:
    unet: diffusers.UNet2DConditionModel
    vae: diffusers.AutoencoderKL
    text: transformers.CLIPTextModel
    scheduler: diffusers.SchedulerMixin
    pad: str


def original(kind: str, scheduler: diffusers.SchedulerMixin | None = None) -> Original:
    second = kind == "v2"
    down, up = ["CrossAttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"]
    unet = {"sample_size": 16, "down_block_types": down, "up_block_types": up, **UNETS[kind]}
    vae = {"block_out_channels": (32, 64), "layers_per_block": 1, "latent_channels": 4, "sample_size": 99}
    vae |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    text = transformers.CLIPTextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=12,
        hidden_act="gelu" if second else "quick_gelu",
    )
    return Original(
        spread(diffusers.UNet2DConditionModel(**unet)),
        spread(diffusers.AutoencoderKL(**vae)),
        spread(transformers.CLIPTextModel(text)),
        scheduler or diffusers.PNDMScheduler(**PNDM),
        "!" if second else "<|endoftext|>",
    )


def write_tokenizer(folder: Path, pad: str) -> None:
    """As the folders of 2022 have it; that of version 2 names another padding in tokenizer_config.json."""
    folder.mkdir(parents=True)
    (folder / "merges.txt").write_text("#version: 0.2\na b\nab c</w>\n")
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad}))
    config = {"pad_token": "<|endoftext|>", "model_max_length": 12}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def save(theirs: Original, folder: Path, **how) -> Path:
    theirs.unet.save_pretrained(folder / "unet", **how)
    theirs.vae.save_pretrained(folder / "vae", **how)
    theirs.text.save_pretrained(folder / "text_encoder", **{k: v for k, v in how.items() if k == "max_shard_size"})
    theirs.scheduler.save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer", theirs.pad)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return folder


def load(path: Path) -> StableDiffusion:
    return AutoLoader("text2img", "stable-diffusion", weights=path, device="cpu").get_model()


@torch.no_grad()
def assert_same(ours: StableDiffusion, theirs: Original) -> None:
    latents, context = torch.randn(2, theirs.unet.config.in_channels, 8, 8), torch.randn(2, 6, 32)
    timesteps, tokens = torch.tensor([7, 900]), torch.tensor([[514, 3, 9, 515, 515], [514, 4, 515, 0, 0]])
    image, small = torch.rand(1, 3, 16, 16), torch.randn(1, 4, 8, 8)
    pairs = [
        (ours.unet(latents, timesteps, context), theirs.unet(latents, timesteps, context).sample),
        (ours.text(tokens), theirs.text(tokens).last_hidden_state),
        (ours.vae.moments(image), theirs.vae.encode(image * 2 - 1).latent_dist.parameters),
        (ours.vae.draw(small), theirs.vae.decode(small).sample),
    ]
    for found, expected in pairs:
        assert expected.std() > 0.01
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], tensor) for name, tensor in b.items())


def parts(theirs: Original) -> dict[str, dict[str, Tensor]]:
    text = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in theirs.text.state_dict().items()}
    return {"unet": theirs.unet.state_dict(), "vae": theirs.vae.state_dict(), "text_encoder": text}


# --- CompVis's one file ----------------------------------------------------------------------------------------------
VAE_RULES = [
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.0\.downsamplers\.0", "down.0.downsample"),
]
VAE_RULES += [(r"up_blocks\.0\.resnets", "up.1.block"), (r"up_blocks\.1\.resnets", "up.0.block")]
VAE_RULES += [(r"up_blocks\.0\.upsamplers\.0", "up.1.upsample"), (r"conv_norm_out", "norm_out")]
VAE_RULES += [(r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2")]
VAE_RULES += [(r"mid_block\.attentions\.0", "mid.attn_1"), (r"group_norm", "norm"), (r"to_out\.0", "proj_out")]
VAE_RULES += [(r"to_([qkv])\.", r"\1."), (r"conv_shortcut", "nin_shortcut")]
RESNET = [(r"norm1", "in_layers.0"), (r"conv1", "in_layers.2"), (r"time_emb_proj", "emb_layers.1")]
RESNET += [(r"norm2", "out_layers.0"), (r"conv2", "out_layers.3"), (r"conv_shortcut", "skip_connection")]
UNET_PLACES = {  # of two levels of one block, the first with attention
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


def ruled(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def compvis(theirs: Original, ema: bool = False) -> dict[str, Tensor]:
    """The file that CompVis's script leaves; with `ema` the UNet is its averages, and the raw weights are one more."""
    file = {}
    for name, tensor in theirs.unet.state_dict().items():
        (place,) = (place for place in UNET_PLACES if name.startswith(place + "."))
        rest = name.removeprefix(place)
        name = UNET_PLACES[place] + (ruled(rest, RESNET) if ".resnets." in place else rest)
        if ema:
            file["model_ema.diffusion_model" + name.replace(".", "")] = tensor
        file[f"model.diffusion_model.{name}"] = tensor + 1 if ema else tensor
    if ema:
        file |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    for name, tensor in theirs.vae.state_dict().items():
        tensor = tensor[:, :, None, None] if ".attentions." in name and tensor.ndim == 2 else tensor
        file[f"first_stage_model.{ruled(name, VAE_RULES)}"] = tensor
    for name, tensor in parts(theirs)["text_encoder"].items():
        file[f"cond_stage_model.transformer.{name}"] = tensor
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return file | {"betas": betas.float(), "alphas_cumprod": (1 - betas).cumprod(0).float()}


OTHERS = {
    "sqrt_alphas_cumprod": torch.ones(1000),
    "posterior_mean_coef1": torch.ones(1000),
    "logvar": torch.zeros(1000),
}
OTHERS["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(12)[None]


def write_compvis(file: dict[str, Tensor], path: Path) -> Path:
    lightning = {"epoch": 7, "global_step": 875000, "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}]}
    torch.save({"state_dict": file | OTHERS, **lightning}, path)
    (path.parent / "merges.txt").write_text("#version: 0.2\na b\nab c</w>\n")
    (path.parent / "config.json").write_text(json.dumps({"text": {"heads": 4}}))  # published ones have heads of 64
    return path


# --- folders of diffusers --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", UNETS)
def test_a_folder_of_diffusers_gives_what_it_gave_and_comes_back(kind, tmp_path):
    theirs = original(kind)
    ours = load(save(theirs, tmp_path))
    assert_same(ours, theirs)
    assert ours.inpaints == (kind == "inpainting")
    assert ours.image_size == 32 and ours.vae.image_size == 32  # not the autoencoder's own 99
    assert ours.vae.scale == 0.18215
    back = to_diffusers(ours.state_dict(), dataclasses.asdict(ours.config))
    for name, state in parts(theirs).items():
        assert same(back[name][0], state)
    for name, value in theirs.scheduler.config.items():
        assert name[0] == "_" or name not in back["scheduler"] or back["scheduler"][name] == value


@pytest.mark.parametrize(
    "how",
    [{"safe_serialization": False}, {"max_shard_size": "100KB"}, {"variant": "fp16"}]
    + [{"variant": "fp16", "safe_serialization": False}, {"variant": "fp16", "max_shard_size": "100KB"}],
    ids=["bin", "shards", "fp16", "fp16 bin", "fp16 shards"],
)
def test_folders_of_every_kind_of_file_load(how, tmp_path):
    theirs = original("v1")
    folder = save(theirs, tmp_path, **how)
    assert not (folder / "unet" / "diffusion_pytorch_model.safetensors").exists()
    assert_same(load(folder), theirs)


def test_a_text_tower_of_either_version_of_transformers_loads(tmp_path):
    theirs = original("v1")
    for prefix in ("", "text_model."):
        folder = save(theirs, tmp_path / (prefix or "bare"))
        (folder / "text_encoder" / "model.safetensors").unlink()
        state = {n.replace("text_model.", prefix): t for n, t in parts(theirs)["text_encoder"].items()}
        state[f"{prefix}embeddings.position_ids"] = torch.arange(12)[None]
        torch.save(state, folder / "text_encoder" / "pytorch_model.bin")
        assert_same(load(folder), theirs)


def test_weights_beside_the_networks_are_read_where_nothing_says_that_it_is_a_folder_of_networks(tmp_path):
    theirs, other = original("v1"), original("v2")
    folder = save(theirs, tmp_path)
    trained = load(folder)
    weights.write(load(save(other, tmp_path / "other")).state_dict(), folder / "model.safetensors")
    assert_same(load(folder), theirs)
    (folder / "model_index.json").unlink()
    assert weights.read(folder).keys() == trained.state_dict().keys()


SCHEDULERS = {
    "v": (diffusers.DDIMScheduler(**NOISE, prediction_type="v_prediction", set_alpha_to_one=False, steps_offset=1)),
    "euler": diffusers.EulerDiscreteScheduler(**NOISE, steps_offset=1),
    "ddim": diffusers.DDIMScheduler(),
    "zero snr": diffusers.DDIMScheduler(**NOISE, prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "cosine": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=100),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_noise_is_that_of_the_scheduler(name, tmp_path):
    scheduler = SCHEDULERS[name]
    ours = load(save(original("v1", scheduler), tmp_path))
    torch.testing.assert_close(ours.schedule.alphas[:-1], scheduler.alphas_cumprod[:-1], atol=1e-7, rtol=1e-5)
    assert ours.config.noise.prediction == ("v" if "v_" in scheduler.config.prediction_type else "epsilon")
    assert ours.config.noise.offset == scheduler.config.get("steps_offset", 0)
    assert ours.config.noise.last_alpha_one == scheduler.config.get("set_alpha_to_one", False)
    assert ours.config.sampler in SAMPLERS and ours.config.sampler in type(scheduler).__name__.lower()


def test_what_old_schedulers_leave_out_is_as_their_classes_have_it():
    for scheduler in (diffusers.DDIMScheduler(), diffusers.PNDMScheduler()):
        name, full = type(scheduler).__name__, dict(scheduler.config)
        assert from_scheduler({"_class_name": name}) == from_scheduler({"_class_name": name, **full})


def test_the_size_of_pictures_is_not_the_one_that_the_autoencoder_was_trained_on():
    file = compvis(original("v1"))
    told = {"vae": {"size": 64}, "diffusers": {"vae": {"sample_size": 99}, "unet": {"sample_size": 16}}}
    assert to_ours(file, told)[1]["vae"]["size"] == 64
    assert to_ours(file, {**told, "vae": {}})[1]["vae"]["size"] == 32


def test_a_scheduler_of_other_noise_is_refused(tmp_path):
    folder = save(original("v1"), tmp_path)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_schedule": "sigmoid"}))
    with pytest.raises(WeightsMismatch, match="beta_schedule='sigmoid'"):
        load(folder)


END = "<|endoftext|>"


@pytest.mark.parametrize(
    ("kind", "said", "pad"),
    [("v1", END, 515), ("v2", "!", 0), ("v1", "!", 0), ("v2", {"content": END}, 515)]
    + [("v1", None, 515), ("v2", None, 0)],
)
def test_prompts_are_padded_as_the_tokenizer_says_and_else_as_the_tower_was_trained(kind, said, pad, tmp_path):
    """That of version 2 says two things; tokenizer_config.json is the one that is wrong."""
    folder = save(original(kind), tmp_path)
    (folder / "tokenizer" / "special_tokens_map.json").write_text(json.dumps({"pad_token": said}))
    ours = load(folder)
    tokens = ours.tokenizer.tokenize_as_tensor(["abc"])
    assert tokens.tolist() == [[514, 513, 515] + [pad] * 9]
    assert (ours.config.start, ours.config.end, ours.config.pad, ours.config.window) == (514, 515, pad, 12)
    assert ours.tokenizer.tokenize_as_tensor([""]).tolist() == ours.empty(12).tolist()


# --- CompVis ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ema", [False, True])
def test_compvis_one_file_gives_what_the_folder_gave(ema, tmp_path):
    theirs = original("v1")
    ours = load(write_compvis(compvis(theirs, ema), tmp_path / "sd.ckpt"))
    assert_same(ours, theirs)
    assert ours.config.noise == StableDiffusionConfig().noise and ours.config.pad == 515


def test_compvis_file_comes_back_with_and_without_averages():
    theirs = original("v1")
    for ema in (False, True):
        file = compvis(theirs, ema)
        raw, config = to_ours(file | OTHERS, {}, ema=False)
        kept, _ = to_ours(file | OTHERS, {})
        config = dataclasses.asdict(StableDiffusionConfig.from_dict(config))
        assert same(raw, kept) is not ema
        written = to_compvis(raw, config, kept if ema else None)
        expected = {
            name: tensor for name, tensor in file.items() if name not in ("model_ema.decay", "model_ema.num_updates")
        }
        assert same(written, expected)
        assert same(to_ours(written, config)[0], kept)


def test_a_vq_first_stage_is_read_too_and_goes_to_compvis_one_file_alone():
    """As in CompVis/latent-diffusion's text2img256, whose latents have three numbers and no scale factor."""
    torch.manual_seed(0)
    vq = VqLatents(VqganConfig(size=32, widths=(32, 64), blocks=1, attention=(), latent=4, vocab=9, code_width=4))
    file = {name: tensor for name, tensor in compvis(original("v1")).items() if not name.startswith("first_stage_")}
    file |= {f"first_stage_model.{name}": tensor for name, tensor in vq.state_dict().items()}
    state, config = to_ours(file, {"text": {"heads": 4}, "unet": {"size": 16}})
    config = StableDiffusionConfig.from_dict(config)
    ours = weights.load(StableDiffusion(config), state)
    assert isinstance(ours.vae, VqLatents) and ours.vae.image_size == 32
    assert same(ours.vae.state_dict(), vq.state_dict())
    assert same(to_compvis(state, dataclasses.asdict(config)), file)
    with pytest.raises(WeightsMismatch, match="no place for a VQ first stage"):
        to_diffusers(state, dataclasses.asdict(config))


def test_half_an_average_is_refused():
    file = compvis(original("v1"), ema=True)
    del file["model_ema.diffusion_modelout2bias"]
    with pytest.raises(WeightsMismatch, match="not of 1 tensors: out.2.bias.*ema=False"):
        to_ours(file, {})
    assert to_ours(file, {}, ema=False)


def test_betas_of_the_file_say_what_the_noise_was():
    file = compvis(original("v1"))
    file["betas"] = (torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2).half()
    noise = to_ours(file, {})[1]["noise"]
    assert (noise["beta_start"], noise["beta_end"], noise["shape"]) == (0.0015, 0.0195, "scaled_linear")
    file["betas"] = torch.linspace(0.0015, 0.0195, 1000)
    assert to_ours(file, {})[1]["noise"]["shape"] == "linear"
    file["betas"] = torch.linspace(0.0015, 0.0195, 1000).sin() ** 3
    with pytest.raises(WeightsMismatch, match="the betas in these weights"):
        to_ours(file, {})


def test_a_scale_factor_of_the_file_is_taken_and_compared():
    file = compvis(original("v1")) | {"scale_factor": torch.tensor(0.22765929)}
    assert to_ours(file, {})[1]["vae"]["scale"] == pytest.approx(0.22766)
    assert to_ours(file, {"vae": {"scale": 0.22765929}})[1]["vae"]["scale"] == 0.22765929
    with pytest.raises(WeightsMismatch, match="multiplied with 0.22766, and those of this model with 0.18215"):
        to_ours(file, {"vae": {"scale": 0.18215}})


def wide(text: int) -> dict[str, Tensor]:
    """A file of contexts that wide, on meta but for what is compared."""
    file = compvis(original("v2"))
    return {
        name: torch.empty(len(tensor), text, device="meta") if re.search(r"attn2\.to_[kv]", name) else tensor
        for name, tensor in file.items()
    }


def test_what_version_2_predicts_is_asked_for_where_nothing_says_it(caplog):
    with caplog.at_level(logging.WARNING):
        assert to_ours(wide(1024), {})[1]["noise"]["prediction"] == "epsilon"
        assert "stable-diffusion-2-1" in caplog.text
        caplog.clear()
        assert to_ours(wide(1024), {"noise": {"prediction": "v"}})[1]["noise"]["prediction"] == "v"
        to_ours(wide(768), {})
    assert not caplog.text


# --- ours, and others ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", UNETS)
def test_what_the_trainer_leaves_is_loaded_as_it_is(kind, tmp_path):
    trained = load(save(original(kind), tmp_path / "theirs"))
    folder = tmp_path / "run"
    folder.mkdir()
    weights.write(trained.state_dict(), folder / "model.safetensors")
    config = dataclasses.replace(trained.config, guidance=3.0, caption_dropout=0.2, min_snr=5.0)
    config = dataclasses.replace(config, vae=dataclasses.replace(config.vae, size=64))
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    (folder / "merges.txt").write_text("#version: 0.2\na b\nab c</w>\n")
    found = load(folder)
    assert found.config == config
    assert same(found.state_dict(), trained.state_dict())


def test_what_is_missing_or_left_over_is_named(tmp_path):
    folder = save(original("v1"), tmp_path)
    file = write_compvis(compvis(original("v1")) | {"embedding_manager.x": torch.zeros(1)}, tmp_path / "x.ckpt")
    with pytest.raises(WeightsMismatch, match="1 are left over: embedding_manager.x"):
        load(file)
    for part, name in (("vae", "vae"), ("text_encoder", "text"), ("unet", "unet")):
        (folder / part).rename(tmp_path / "away")
        with pytest.raises(WeightsMismatch, match=f"lack a part of a Stable Diffusion, the {name}"):
            load(folder)
        (tmp_path / "away").rename(folder / part)
    with pytest.raises((WeightsMismatch, UnreadableWeights)):
        load(folder / "unet")


def test_parts_that_were_not_trained_together_are_refused_at_the_door(tmp_path):
    folder = save(original("v1"), tmp_path)
    kinds = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
    kinds["up_block_types"] = ["UpBlock2D", "CrossAttnUpBlock2D"]
    diffusers.UNet2DConditionModel(**V1 | kinds | {"cross_attention_dim": 24}).save_pretrained(folder / "unet")
    with pytest.raises(SettingsError, match="contexts 32 wide and the UNet reads 24"):
        load(folder)
    diffusers.UNet2DConditionModel(**V1 | kinds | {"in_channels": 5, "out_channels": 5}).save_pretrained(
        folder / "unet"
    )
    with pytest.raises(SettingsError, match="this VAE's latents have 4 channels and the UNet takes 5"):
        load(folder)


def test_the_autoencoder_of_a_whole_model_is_loaded_alone(tmp_path):
    theirs = original("v1")
    folder = save(theirs, tmp_path)
    file = write_compvis(compvis(theirs), tmp_path / "sd.ckpt")
    expected = load(folder).vae.state_dict()
    for path in (folder, folder / "vae", file):
        found = AutoLoader("img_tokenizing", "kl-vae", weights=path, device="cpu").get_model()
        assert same(found.state_dict(), expected)


# --- exports ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", UNETS)
def test_what_is_exported_is_loaded_by_diffusers(kind, tmp_path):
    ours = load(save(original(kind), tmp_path / "theirs"))
    save_diffusers(ours, tmp_path / "ours")
    classes = {"inpainting": diffusers.StableDiffusionInpaintPipeline}
    kinds = classes.get(kind, diffusers.StableDiffusionPipeline)
    pipeline = kinds.from_pretrained(tmp_path / "ours", local_files_only=True)
    assert_same(ours, Original(pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.scheduler, ""))
    words = pipeline.tokenizer(["abc a", ""], padding="max_length", max_length=12, return_tensors="pt").input_ids
    assert words.tolist() == ours.tokenizer.tokenize_as_tensor(["abc a", ""]).tolist()
    assert pipeline.scheduler.config.prediction_type == "epsilon" and pipeline.vae.config.scaling_factor == 0.18215
    again = load(tmp_path / "ours")
    assert again.config == ours.config and same(again.state_dict(), ours.state_dict())
