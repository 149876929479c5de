"""The discriminator of VQGAN, which judges patches of a picture (Isola et al. 2017, CompVis/taming-transformers).

B batch, H W pixels.
"""

from __future__ import annotations

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Pictures -> a logit per patch of about 70 pixels, with three halvings. The names of parts are the published ones.

    `width`: channels of the first layer. Norms are over the batch of one process. `init`: taming draws weights from
    N(0, 0.02); CLIP-GEN leaves torch's, `init=False`.
    """

    def __init__(self, width: int = 64, halvings: int = 3, *, init: bool = True):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        before = width
        for number in range(1, halvings + 1):
            after, stride = width * min(2**number, 8), 2 if number < halvings else 1
            conv = nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
            before = after
        self.main = nn.Sequential(*layers, nn.Conv2d(before, 1, 4, padding=1))
        if init:
            self.init_weights()

    def init_weights(self) -> None:
        """Normal of 0.02 around 0, and around 1 for the scale of norms."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) of -1..1 -> logits (B, 1, h, w), high for real ones."""
        return self.main(image)
