"""PatchGAN: the published sizes and names, and what one logit sees."""

from __future__ import annotations

import torch

from zoo.models.patch_discriminator import PatchDiscriminator


def test_it_is_the_published_one():
    """2,765,633 parameters (HFAiLab/clip-gen, taming); the names of loss.discriminator.*."""
    model = PatchDiscriminator()
    assert sum(p.numel() for p in model.parameters()) == 2_765_633
    convs = [name for name, p in model.named_parameters() if p.dim() == 4]
    assert convs == [f"main.{number}.weight" for number in (0, 2, 5, 8, 11)]
    assert [name for name, _ in model.named_parameters() if name.endswith("bias")] == [
        f"main.{number}.bias" for number in (0, 3, 6, 9, 11)
    ]
    assert model(torch.rand(2, 3, 256, 256)).shape == (2, 1, 30, 30)


def test_a_logit_sees_a_patch_of_70_pixels():
    model = PatchDiscriminator(8).eval()
    image = torch.rand(1, 3, 256, 256, requires_grad=True)
    model(image)[0, 0, 15, 15].backward()
    seen = image.grad[0].abs().sum(0).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


def test_weights_are_drawn_as_taming_draws_them():
    torch.manual_seed(0)
    drawn, torchs = PatchDiscriminator(), PatchDiscriminator(init=False)
    assert abs(float(drawn.main[8].weight.detach().std()) - 0.02) < 5e-4
    assert (
        abs(float(drawn.main[9].weight.detach().mean()) - 1) < 5e-3
        and float(drawn.main[9].weight.detach().std()) > 0.01
    )
    assert float(torchs.main[9].weight.detach().std()) == 0.0
