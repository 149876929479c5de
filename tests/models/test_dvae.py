"""The dVAE against references written from the paper's formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from zoo.errors import SettingsError
from zoo.models.dvae import Dvae, DvaeConfig, kl_to_uniform, logit_laplace, map_pixels, unevenness, unmap_pixels

TINY = DvaeConfig(size=32, vocab=24, hidden=8, stem=6, blocks=2)


@pytest.fixture
def model() -> Dvae:
    torch.manual_seed(0)
    return Dvae(TINY)


def test_the_published_sizes_have_the_published_numbers_of_parameters():
    from zoo.weights import blank

    with blank():
        model = Dvae(DvaeConfig())
    count = lambda part: sum(p.numel() for p in part.parameters())  # noqa: E731
    assert (count(model.encoder), count(model.decoder)) == (53_786_240, 43_829_766)
    assert (model.image_size, model.grid, model.vocab) == (256, 32, 8192)


def slow_tower(state: dict, x: torch.Tensor, prefix: str, resize, kernels: int) -> torch.Tensor:
    """A tower as the paper words it, from a state dict, one operation at a time."""
    get = lambda name: (state[f"{prefix}.blocks.{name}.weight"], state[f"{prefix}.blocks.{name}.bias"])  # noqa: E731
    convolve = lambda x, name: F.conv2d(x, *get(name), padding=get(name)[0].shape[-1] // 2)  # noqa: E731
    x = convolve(x, "input")
    for group in range(1, 5):
        for block in range(1, 3):
            place = f"group_{group}.block_{block}"
            path = x
            for i in range(1, 5):
                path = convolve(torch.clamp(path, min=0), f"{place}.res_path.conv_{i}")
            same = f"{prefix}.blocks.{place}.id_path.weight" not in state
            x = (x if same else convolve(x, f"{place}.id_path")) + path / 64
        if group < 4:
            x = resize(x)
    return convolve(torch.clamp(x, min=0), "output.conv")


def test_encoder_and_decoder_equal_the_papers_towers(model):
    state, image = model.state_dict(), torch.rand(2, 3, 32, 32)
    pool = lambda x: x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5))  # noqa: E731
    logits = slow_tower(state, 0.8 * image + 0.1, "encoder", pool, 4)
    torch.testing.assert_close(model.logits(image), logits, atol=1e-5, rtol=1e-5)
    codes = logits.argmax(1)
    assert torch.equal(model.encode(image), codes)
    grown = lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)  # noqa: E731
    maps = slow_tower(state, F.one_hot(codes, 24).permute(0, 3, 1, 2).float(), "decoder", grown, 4)
    picture = ((torch.sigmoid(maps[:, :3]) - 0.1) / 0.8).clamp(0, 1)
    torch.testing.assert_close(model.decode(codes), picture, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.reconstruct(image), picture, atol=1e-5, rtol=1e-5)


def test_logit_laplace_is_the_papers_density():
    x, mean, log_scale = torch.rand(50).double() * 0.8 + 0.1, torch.randn(50).double(), torch.randn(50).double()
    for value, mu, b, found in zip(x, mean, log_scale.exp(), logit_laplace(x, mean, log_scale), strict=True):
        value, mu, b = float(value), float(mu), float(b)
        density = math.exp(-abs(math.log(value / (1 - value)) - mu) / b) / (2 * b * value * (1 - value))
        assert float(found) == pytest.approx(-math.log(density), abs=1e-9)


def test_logit_laplace_is_a_density_it_integrates_to_one():
    x = torch.linspace(0, 1, 400_003, dtype=torch.float64)[1:-1]
    for mean, log_scale in ((0.0, 0.0), (1.3, -1.0), (-2.0, -0.5)):
        density = (-logit_laplace(x, torch.tensor(mean), torch.tensor(log_scale))).exp()
        assert float(torch.trapezoid(density, x)) == pytest.approx(1, abs=1e-3)


def test_kl_is_summed_over_positions_and_zero_for_uniform_logits():
    logits = torch.randn(2, 5, 3, 4)
    slow = [
        sum(
            float(q * math.log(q * 5))
            for row in range(3)
            for column in range(4)
            for q in logits[i, :, row, column].softmax(0).tolist()
        )
        for i in range(2)
    ]
    assert kl_to_uniform(logits).tolist() == pytest.approx(slow, abs=1e-5)
    assert kl_to_uniform(torch.full((1, 5, 2, 2), 3.0)).item() == pytest.approx(0, abs=1e-5)


def test_both_parts_of_the_loss_are_divided_by_the_pictures_values(model):
    image = torch.rand(3, 3, 32, 32)
    torch.manual_seed(5)
    found = model(image, temperature=0.7, kl_weight=6.6)
    torch.manual_seed(5)
    mixture = F.gumbel_softmax(model.logits(image), tau=0.7, dim=1)
    mean, log_scale = model.decoder(mixture).chunk(2, 1)
    values = 3 * 32 * 32
    reconstruction = logit_laplace(0.8 * image + 0.1, mean, log_scale).flatten(1).sum(1).mean() / values
    kl = kl_to_uniform(model.logits(image)).mean() / values
    torch.testing.assert_close(found["reconstruction"], reconstruction)
    torch.testing.assert_close(found["kl"], kl)
    torch.testing.assert_close(found["loss"], reconstruction + 6.6 * kl)
    # Eight pixels a code: the weight is 6.6 / 192 of the divergence per position (paper, A.3).
    per_position = kl_to_uniform(model.logits(image)).mean() / 16
    torch.testing.assert_close(6.6 * kl, 6.6 / 192 * per_position)


def test_gradients_reach_the_encoder_relaxed_and_straight_through(model):
    for straight in (False, True):
        model.zero_grad()
        model.straight_through = straight
        model(torch.rand(1, 3, 32, 32), temperature=0.5, kl_weight=0.0)["loss"].backward()
        assert model.encoder.blocks["input"].weight.grad.abs().sum() > 0


def test_straight_through_shows_the_decoder_one_code_per_place(model):
    seen = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.straight_through = True
    model(torch.rand(1, 3, 32, 32), temperature=1.0)
    hard = seen[0].detach()
    torch.testing.assert_close(hard.amax(1), torch.ones_like(hard.amax(1)))
    torch.testing.assert_close(hard.sum(1), torch.ones_like(hard.sum(1)))


def test_recomputing_activations_changes_no_gradient(model):
    image, found = torch.rand(1, 3, 32, 32), []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        torch.manual_seed(1)
        model(image, temperature=0.5)["loss"].backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_pixels_map_into_the_open_interval_and_back():
    x = torch.linspace(0, 1, 11)
    assert map_pixels(x)[[0, -1]].tolist() == pytest.approx([0.1, 0.9])
    torch.testing.assert_close(unmap_pixels(map_pixels(x)), x)


def test_a_twin_without_decoder_encodes_and_says_why_it_cannot_decode():
    model = Dvae(DvaeConfig(size=32, vocab=8, hidden=8, decoder=False))
    codes = model.encode(torch.rand(1, 3, 32, 32))
    assert codes.shape == (1, 4, 4)
    with pytest.raises(SettingsError, match="no decoder"):
        model.decode(codes)


def test_unevenness_is_zero_for_codes_used_alike_and_log_v_for_one_alone(model):
    sure = torch.eye(8)[torch.arange(16) % 8].T.reshape(1, 8, 4, 4) * 100
    assert unevenness(sure).item() == pytest.approx(0, abs=1e-5)
    assert unevenness(sure[:, :, :1, :1].expand(1, 8, 4, 4)).item() == pytest.approx(math.log(8), abs=1e-5)
    image, losses = torch.rand(1, 3, 32, 32), []
    for weight in (0.0, 0.5):
        torch.manual_seed(0)
        losses.append(model(image, evenness=weight)["loss"])
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * unevenness(model.logits(image)))
