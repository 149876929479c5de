"""Drawing equals diffusers' pipelines from the same seeds, and what is asked of it holds."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.errors import SettingsError
from zoo.generation.noise_schedule import NoiseConfig
from zoo.generation.samplers import SamplerConfig
from zoo.models.clip import TextConfig
from zoo.models.kl_vae import KlVaeConfig
from zoo.models.latent_drawing import Drawing, decode, sketch_of
from zoo.models.prompt_contexts import PromptReader
from zoo.models.stable_diffusion import StableDiffusion, StableDiffusionConfig
from zoo.models.unet import UNetConfig

WINDOW = 12
CONFIG = StableDiffusionConfig(
    text=TextConfig(context=WINDOW, vocab=60, width=32, depth=2, heads=4),
    unet=UNetConfig(widths=(16, 24), blocks=1, attention=(0,), heads=(4, 3), context=32, groups=4, size=8),
    vae=KlVaeConfig(size=32, widths=(8, 8, 16), blocks=1, groups=4, scale=0.4),
    start=57,
    end=58,
    pad=59,
    window=WINDOW,
)
SCHEDULERS = {
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpm++2m": (diffusers.DPMSolverMultistepScheduler, {}),
}
PROMPTS, NEGATIVE = ["abc", "dogs,"], "no"
TOLERANCE = 1e-3  # of a pixel's 0..1


class Letters:
    """A tokenizer of letters."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 50 for letter in text]


def beside(name: str) -> ModuleType:
    """Another file of tests, for the original networks that it makes."""
    spec = importlib.util.spec_from_file_location(f"beside_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pair() -> dict[str, tuple[nn.Module, nn.Module, StableDiffusion]]:
    """diffusers' UNet and VAE, and the whole of ours with their weights, that draws and that inpaints."""
    unets, vaes, found = beside("test_unet"), beside("test_kl_vae"), {}
    for kind, channels in (("draws", 4), ("inpaints", 9)):
        config = replace(CONFIG, unet=replace(CONFIG.unet, channels=channels))
        unet, vae = unets.original(config.unet), vaes.original(config.vae)
        vae.register_to_config(scaling_factor=config.vae.scale)
        nn.init.normal_(unet.conv_out.weight, std=0.05)  # outputs of about unit size, as a trained one's
        torch.manual_seed(3)
        model = StableDiffusion(
            config, unet=unets.ours(config.unet, unet), vae=vaes.ours(config.vae, vae), tokenizer=Letters()
        ).eval()
        found[kind] = unet, vae, model
    return found


def picture() -> Image.Image:
    torch.manual_seed(5)
    smooth = nn.functional.interpolate(torch.rand(1, 3, 4, 5), (32, 40), mode="bicubic").clamp(0, 1)
    return Image.fromarray((smooth[0].permute(1, 2, 0) * 255).byte().numpy())


def area() -> Image.Image:
    mask = np.zeros((32, 40), np.uint8)
    mask[8:24, 4:30] = 255
    return Image.fromarray(mask)


def contexts(model: StableDiffusion, texts: list[str]) -> Tensor:
    """What the text tower says of start, letters, end and padding, written out."""
    rows = [[57, *(ord(letter) % 50 for letter in text), 58] for text in texts]
    return model.text(torch.tensor([row + [59] * (WINDOW - len(row)) for row in rows]))


@torch.no_grad()
def theirs(pair, kind: str, sampler: str, words: dict, steps: int = 6, guidance: float = 4.0, **schedule) -> Tensor:
    """What diffusers' pipeline draws of PROMPTS by seeds 7 and 8, (2, 3, H, W) of 0..1."""
    unet, vae, model = pair[kind]
    scheduler, settings = SCHEDULERS[sampler]
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    name = {(): "", ("image",): "Img2Img", ("image", "mask_image"): "Inpaint"}
    pipeline = getattr(diffusers, f"StableDiffusion{name[tuple(k for k in words if 'image' in k)]}Pipeline")(
        vae=vae,
        unet=unet,
        text_encoder=None,
        tokenizer=None,
        scheduler=scheduler(**betas | settings | schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    drawn = []
    for prompt, seed in zip(PROMPTS, (7, 8), strict=True):  # one by one: to inpaint it asks the first seed for all
        images = pipeline(
            prompt_embeds=contexts(model, [prompt]),
            negative_prompt_embeds=contexts(model, [NEGATIVE]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            **words,
        )
        drawn.append(images.images)
    return torch.cat(drawn)


@torch.inference_mode()
def ours(model: StableDiffusion, sampler: str = "ddim", steps: int = 6, **words) -> Tensor:
    """The same by ours."""
    drawing = {name: words.pop(name) for name in ("guidance", "rescale") if name in words}
    drawing = Drawing(
        sampler=SamplerConfig(sampler=sampler, steps=steps), progress=False, **{"guidance": 4.0} | drawing
    )
    sketch = sketch_of(
        model, words.get("size"), words.get("image"), words.get("mask"), words.get("strength", 0.8)
    )  # fmt: skip
    reader = PromptReader(model)
    return model.draw(words.get("texts", PROMPTS), words.get("seeds", [7, 8]), NEGATIVE, drawing, sketch, reader)


# --- against diffusers -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_text_to_image_is_that_of_diffusers(pair, sampler: str):
    expected = theirs(pair, "draws", sampler, {"height": 32, "width": 40})
    found = ours(pair["draws"][2], sampler, size=(40, 32))
    assert expected.std() > 0.02  # there is a picture to compare
    assert (found - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_without_guidance_and_with_much(pair, guidance: float):
    expected = theirs(pair, "draws", "ddim", {"height": 32, "width": 32}, guidance=guidance)
    assert (ours(pair["draws"][2], guidance=guidance) - expected).abs().max() < TOLERANCE


def test_guidance_rescaled(pair):
    expected = theirs(pair, "draws", "ddim", {"height": 32, "width": 32, "guidance_rescale": 0.7}, guidance=90)
    found = ours(pair["draws"][2], rescale=0.7, guidance=90)
    assert (found - expected).abs().max() < TOLERANCE
    assert (found - ours(pair["draws"][2], guidance=90)).abs().max() > 5 * TOLERANCE


def test_a_model_of_v_and_zero_snr(pair):
    unet, vae, model = pair["draws"]
    noise = NoiseConfig(prediction="v", zero_snr=True)
    twin = StableDiffusion(replace(model.config, noise=noise), model.text, model.unet, model.vae, Letters())
    words = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    expected = theirs(pair, "draws", "ddim", {"height": 32, "width": 32}, **words)
    assert (ours(twin.eval()) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_image_to_image_is_that_of_diffusers(pair, sampler: str, strength: float):
    expected = theirs(pair, "draws", sampler, {"image": picture(), "strength": strength})
    found = ours(pair["draws"][2], sampler, image=picture(), strength=strength)
    assert (found - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("kind", ["draws", "inpaints"])
@pytest.mark.parametrize("sampler", ["pndm", "ddim", "euler_a", "dpm++2m"])
def test_inpainting_is_that_of_diffusers(pair, kind: str, sampler: str, strength: float):
    words = {"image": picture(), "mask_image": area(), "strength": strength, "height": 32, "width": 40}
    expected = theirs(pair, kind, sampler, words)
    found = ours(pair[kind][2], sampler, image=picture(), mask=area(), strength=strength)
    assert (found - expected).abs().max() < TOLERANCE


def test_tiles_are_blended_as_diffusers_blends_them(pair):
    _, vae, model = pair["draws"]
    latents = torch.randn(2, 4, 20, 13)
    vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 8
    vae.enable_tiling()
    model.tile = 32
    try:
        with torch.no_grad():
            expected = (vae.decode(latents / 0.4).sample / 2 + 0.5).clamp(0, 1)
            found = decode(model, latents)
    finally:
        vae.disable_tiling()
        model.tile = None
    assert (found - expected).abs().max() < TOLERANCE
    with torch.no_grad():
        assert (found - decode(model, latents)).abs().max() > TOLERANCE  # tiles do not see one another


# --- what holds ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_a_picture_does_not_depend_on_those_drawn_with_it(pair, sampler: str):
    model = pair["draws"][2]
    long = "a very long prompt, " * 3  # of several windows
    together = ours(model, sampler, texts=["abc", long, "dogs,", "abc"], seeds=[7, 7, 8, 9])
    for row, (text, seed) in enumerate([("abc", 7), (long, 7), ("dogs,", 8), ("abc", 9)]):
        alone = ours(model, sampler, texts=[text], seeds=[seed])
        assert (together[row] - alone[0]).abs().max() < 1e-4
    assert (together[0] - together[3]).abs().max() > 0.01


def test_all_of_a_long_prompt_counts_and_weights_do(pair):
    model = pair["draws"][2]
    long = "abcdefghij" * 3
    first = ours(model, texts=[long], seeds=[0])
    for other in (long[:-1] + "z", long[:-3] + "(" + long[-3:] + ":1.5)"):
        assert (ours(model, texts=[other], seeds=[0]) - first).abs().max() > 1e-4


def test_strength_0_gives_the_picture_back_and_outside_a_mask_it_stays(pair):
    model = pair["draws"][2]
    given = torch.from_numpy(np.array(picture())).permute(2, 0, 1) / 255
    assert torch.equal(ours(model, image=picture(), strength=0.0)[1], given)
    for inside, same in ((0.0, True), (1.0, False)):
        words = {"image": given, "mask": torch.full((32, 40), inside), "seeds": [7], "strength": 1.0, "guidance": 90}
        first, second = (ours(model, texts=[text], **words) for text in ("abc", "zzzzzz"))
        assert ((first - second).abs().max() < 1e-6) == same


def test_a_preview_is_told_every_step_and_ends_with_the_picture(pair):
    model, seen = pair["draws"][2], []
    found = model.generate(
        "abc", seed=7, sampler="euler", steps=4, preview=lambda n, x: seen.append((n, x)), progress=False
    )
    assert [number for number, _ in seen] == [1, 2, 3, 4]
    last = torch.from_numpy(np.array(found[0][0])).permute(2, 0, 1) / 255
    assert (seen[-1][1][0] - last).abs().max() < 0.01


def test_generate_gives_pictures_of_the_size_and_the_best_of_candidates(pair):
    model = pair["draws"][2]
    words = {"steps": 2, "size": (40, 32), "progress": False}
    drawn = model.generate(["abc", ""], 3, 5, **words)
    assert [len(row) for row in drawn] == [3, 3] and drawn[0][0].size == (40, 32)
    bright = lambda prompt, pictures: [float(np.array(p).mean()) for p in pictures]  # noqa: E731
    best = model.generate(["abc"], 1, 5, candidates=3, rerank=bright, **words)[0][0]
    assert np.array(best).mean() == max(np.array(p).mean() for p in drawn[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"size": (36, 30)}, "multiples of 4; 36 x 32 is nearest|multiples of 4; 36 x 28 is nearest"),
        ({"image": Image.new("RGB", (30, 32))}, "multiples of 4"),
        ({"image": Image.new("RGB", (32, 32)), "mask": Image.new("L", (40, 32))}, "mask has 40 x 32"),
        ({"image": Image.new("RGB", (32, 32)), "size": (40, 32)}, "image has 32 x 32"),
        ({"image": torch.zeros(2, 32, 32)}, r"\(3, H, W\)"),
        ({"mask": Image.new("L", (32, 32))}, "give image="),
        ({"image": Image.new("RGB", (32, 32)), "strength": 1.5}, "strength=1.5"),
        ({"sampler": "eulr"}, "nearest: .*euler"),
        ({"steps": 0}, "steps=0"),
        ({"skip": 2}, "skip=2"),
    ],
)
def test_what_does_not_fit_is_said_before_it_draws(pair, words: dict, message: str):
    with pytest.raises(SettingsError, match=message):
        pair["draws"][2].generate("abc", progress=False, **words)


def test_a_model_that_inpaints_asks_for_a_mask_and_one_without_a_tokenizer_for_it(pair):
    with pytest.raises(SettingsError, match="inpaints"):
        pair["inpaints"][2].generate("abc", image=picture(), progress=False)
    model = pair["draws"][2]
    bare = StableDiffusion(model.config, model.text, model.unet, model.vae)
    with pytest.raises(SettingsError, match="tokenizer"):
        bare.generate("abc", progress=False)


def test_values_that_are_no_numbers_are_named_with_the_remedy(pair):
    model = pair["draws"][2]
    for part, name in ((model.unet.conv_out, "the UNet"), (model.vae.decoder.conv_out, "the VAE")):
        kept = part.bias.detach().clone()
        with torch.no_grad():
            part.bias.fill_(float("nan"))
        try:
            with pytest.raises(SettingsError, match=f"{name} gave .*float32.*bf16"):
                model.generate("abc", steps=2, progress=False)
        finally:
            with torch.no_grad():
                part.bias.copy_(kept)
