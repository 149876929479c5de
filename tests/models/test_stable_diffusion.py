"""Stable Diffusion's training: its loss is the papers', and what it leaves out is left out."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor, nn

from zoo.errors import SettingsError
from zoo.generation.noise_schedule import NoiseConfig
from zoo.models.clip import TextConfig
from zoo.models.kl_vae import KlVae, KlVaeConfig
from zoo.models.stable_diffusion import StableDiffusion, StableDiffusionConfig
from zoo.models.text_encoder import BertTextConfig
from zoo.models.unet import UNet, UNetConfig

TINY = StableDiffusionConfig(
    text=TextConfig(context=9, vocab=50, width=12, depth=1, heads=2),
    unet=UNetConfig(widths=(8, 12), blocks=1, attention=(1,), heads=(2, 2), context=12, groups=4, size=8),
    vae=KlVaeConfig(size=16, widths=(8, 8), blocks=1, groups=4, scale=0.5),
    start=47,
    end=48,
    pad=49,
    window=9,
    caption_dropout=0.0,
)


def make(**changes) -> StableDiffusion:
    """A model whose UNet says something."""
    torch.manual_seed(0)
    model = StableDiffusion(replace(TINY, **changes))
    for parameter in model.unet.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


class Seen:
    """What the UNet was given in training, and what it said."""

    def __init__(self, model: StableDiffusion):
        model.unet.register_forward_hook(self.look)

    def look(self, module: nn.Module, given: tuple, out: Tensor) -> None:
        self.noised, self.timesteps, self.context, self.out = *(part.detach().double() for part in given), out.detach()
        self.timesteps = given[1]


def moments(rows: int, logvar: float = -30.0) -> Tensor:
    mean = torch.randn(rows, 4, 8, 8)
    return torch.cat([mean, torch.full_like(mean, logvar)], 1)


def captions(rows: int, length: int = 9) -> Tensor:
    return torch.randint(40, (rows, length))


def roots(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of signal and noise: sqrt(alpha), sqrt(1 - alpha), by latent diffusion's schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)[timesteps].view(-1, 1, 1, 1)
    return alphas.sqrt(), (1 - alphas).sqrt()


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_the_loss_is_the_error_of_what_is_predicted(prediction: str, gamma: float):
    model = make(noise=NoiseConfig(prediction=prediction), min_snr=gamma)
    seen, given = Seen(model), moments(32)
    loss = model(moments=given, text=captions(32))["loss"].detach()
    x0 = 0.5 * given[:, :4].double()
    signal, sigma = roots(seen.timesteps)
    noise = (seen.noised - signal * x0) / sigma  # what was added, by what the UNet saw
    assert abs(float(noise.mean())) < 0.05 and float(noise.std()) == pytest.approx(1, abs=0.05)
    target = {"epsilon": noise, "v": signal * noise - sigma * x0, "sample": x0}[prediction]
    errors = (seen.out.double() - target).square().mean((1, 2, 3))
    snr = (signal / sigma).square().flatten()
    weight = {"epsilon": 1 / snr, "v": 1 / (snr + 1), "sample": 1}[prediction]
    expected = (errors * snr.clamp(max=5) * weight).mean() if gamma else errors.mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_timesteps_are_drawn_evenly_of_all_and_for_each_sample():
    model = make()
    seen, drawn = Seen(model), []
    for _ in range(8):
        model(moments=moments(128), text=captions(128))
        drawn += seen.timesteps.tolist()
    assert min(drawn) < 10 and max(drawn) > 989 and max(drawn) < 1000
    counts = torch.tensor(drawn).div(250, rounding_mode="floor").bincount()
    assert counts.tolist() == pytest.approx([256] * 4, abs=60)


def test_latents_are_drawn_anew_each_time_with_the_spread_that_the_moments_say():
    model = make()
    seen, spread = Seen(model), 200.0
    given = torch.cat([torch.zeros(64, 4, 8, 8), torch.full((64, 4, 8, 8), 2 * torch.tensor(spread).log())], 1)
    drawn = []
    for _ in range(2):
        model(moments=given, text=captions(64))
        drawn.append(seen.noised / roots(seen.timesteps)[0] / 0.5)
    near = [d[seen.timesteps < 500] for d in drawn]  # where noise hides nothing of it
    assert not torch.equal(*drawn)
    assert float(near[1].std()) == pytest.approx(spread, rel=0.03)


def test_pictures_and_tokens_teach_what_moments_and_contexts_of_them_do():
    model, image, text = make(caption_dropout=0.5).train(), torch.rand(16, 3, 16, 16), captions(16)
    known = {"moments": model.vae.moments(image), "context": model.text(text)}
    losses = []
    for given in ({"image": image, "text": text}, known, {"image": image, "context": known["context"]}):
        torch.manual_seed(1)
        losses.append(model(**given)["loss"].item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_moments_and_contexts_may_be_in_half_precision():
    model = make()
    losses = []
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(1)
        given = {"moments": moments(16).to(dtype), "context": torch.randn(16, 9, 12).to(dtype)}
        torch.manual_seed(2)
        losses.append(model(**given)["loss"])
    assert losses[1].dtype == torch.float32 and losses[1] > 0.5
    seen = Seen(model)
    torch.manual_seed(2)
    model(**given)
    torch.testing.assert_close(seen.context.float(), given["context"].float())


def test_weights_of_samples_count_in_the_mean():
    model = make()
    given, losses = {"moments": moments(4), "text": captions(4)}, []
    for weight in (None, [1, 1, 1, 1], [4, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0], [0, 0, 0, 4], [2, 2, 1, 1]):
        torch.manual_seed(1)
        words = {} if weight is None else {"weight": torch.tensor(weight).float()}
        losses.append(float(model(**given, **words)["loss"].detach()))
    plain, ones, *each, mixed = losses
    assert ones == plain == pytest.approx(sum(each) / 4, rel=1e-5)
    assert mixed == pytest.approx((2 * each[0] + 2 * each[1] + each[2] + each[3]) / 4, rel=1e-5)


def test_the_noise_offset_moves_whole_channels():
    model = make(noise_offset=3.0)
    seen, given = Seen(model), moments(256)
    model(moments=given, text=captions(256))
    signal, sigma = roots(seen.timesteps)
    noise = (seen.noised - signal * 0.5 * given[:, :4]) / sigma
    means = noise.mean((2, 3))
    assert float(means.std()) == pytest.approx(3, rel=0.1)
    assert float(torch.corrcoef(means.T).fill_diagonal_(0).abs().max()) < 0.25  # each channel on its own
    assert float((noise - means[..., None, None]).std()) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("kind", ["text", "context"])
def test_captions_left_out_are_the_empty_caption_and_as_many_as_asked(kind: str):
    model = make(caption_dropout=0.3)
    seen, text = Seen(model), captions(400)
    with torch.no_grad():
        full = model.text(text)
        empty = model.text(torch.tensor([[47, 48] + [49] * 7]))[0]
    given = {"text": text} if kind == "text" else {"context": full}
    for training, share in ((True, 0.3), (False, 0.0)):
        model.train(training)(moments=moments(400), **given)
        context = seen.context.float()
        is_full = torch.isclose(context, full, atol=1e-5).all(2).all(1)
        is_empty = torch.isclose(context, empty, atol=1e-5).all(2).all(1)
        assert (is_full ^ is_empty).all()
        assert float(is_empty.float().mean()) == pytest.approx(share, abs=0.07 if training else 0)


def test_only_the_unet_learns_unless_another_part_is_asked_to():
    model = make().train()
    assert model.unet.training and not model.text.training and not model.vae.training
    model(image=torch.rand(4, 3, 16, 16), text=captions(4))["loss"].backward()
    assert all(p.grad is not None for p in model.unet.parameters())
    assert all(p.grad is None for part in (model.text, model.vae) for p in part.parameters())
    model.text.requires_grad_(True)
    model.train()
    assert model.text.training
    model(image=torch.rand(4, 3, 16, 16), text=captions(4))["loss"].backward()
    assert all(p.grad is not None for p in model.text.parameters())


def test_one_that_inpaints_reads_the_mask_and_the_latents_of_what_it_leaves():
    model = make(unet=replace(TINY.unet, channels=9))
    seen, image = Seen(model), torch.rand(2, 3, 16, 16)
    mask = torch.zeros(2, 1, 16, 16)
    mask[0, :, :8] = 1
    with torch.no_grad():  # no spread: a sample is the mean
        model.vae.quant_conv.weight[4:], model.vae.quant_conv.bias[4:] = 0, -30
        grey = image.clone()
        grey[0, :, :8] = 0.5
        hidden = 0.5 * model.vae.moments(grey)[:, :4]
    model(image=image, text=captions(2), mask=mask)
    small = torch.zeros(2, 1, 8, 8)
    small[0, :, :4] = 1
    assert seen.noised.shape == (2, 9, 8, 8)
    torch.testing.assert_close(seen.noised[:, 4:5].float(), small)
    torch.testing.assert_close(seen.noised[:, 5:].float(), hidden, rtol=1e-4, atol=1e-4)
    with pytest.raises(SettingsError, match="this UNet inpaints"):
        model(image=image, text=captions(2))


@pytest.mark.parametrize("given", [{"text": captions(2)}, {"moments": moments(2)}, {"image": moments(2)}], ids=str)
def test_what_is_missing_is_said(given: dict):
    with pytest.raises(SettingsError, match="forward needs pictures or the VAE's moments, and tokens"):
        make()(**given)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(SettingsError, match="contexts 16 wide and the UNet reads 12"):
        StableDiffusion(replace(TINY, text=replace(TINY.text, width=16)))
    with pytest.raises(SettingsError, match="latents have 3 channels and the UNet takes 4"):
        StableDiffusion(TINY, vae=KlVae(replace(TINY.vae, latent=3)))
    with pytest.raises(SettingsError, match="latents have 4 channels and the UNet takes 5"):
        StableDiffusion(TINY, unet=UNet(replace(TINY.unet, channels=5)))


def test_the_config_is_what_json_says():
    for text in (TINY.text, BertTextConfig(width=12, heads=2, depth=1, vocab=50)):
        config = replace(TINY, text=text, noise=NoiseConfig(prediction="v", zero_snr=True))
        assert StableDiffusionConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


def test_sides_follow_from_the_parts():
    model = make()
    assert (model.image_size, model.inpaints, model.context_dropout) == (16, False, 0.0)
    assert make(unet=replace(TINY.unet, channels=9)).inpaints
