"""CLIP-GEN: trained on pictures alone, it draws from text (Wang et al. 2022, arXiv 2203.00386; HFAiLab/clip-gen).

CLIP puts a picture and its caption at nearly the same place. So a transformer that learns to write a picture's codes
after the picture's own CLIP embedding needs no captions, and draws, where a text's embedding is put in its place.

B samples, E width of CLIP's embeddings, h w the grid of codes, N = h * w, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from zoo.errors import SettingsError
from zoo.generation.rerank import clip_score
from zoo.models.clip import Clip, ClipConfig
from zoo.models.clip_gen_transformer import ClipGenTransformer, ClipGenTransformerConfig
from zoo.models.dalle_decoding import Decoding
from zoo.models.painter import Painter, partly_others
from zoo.models.vqgan import Vqgan, VqganConfig


@dataclass(frozen=True, kw_only=True)
class ClipGenConfig:
    """A whole CLIP-GEN. What the release trains with is all 0; what else there is:

    `condition_dropout`: the part of embeddings that training replaces by nothing, without which guidance has nothing to
    go away from. `noise`: embeddings of pictures are moved so far, as a part of their length, in a random direction,
    since those of texts lie that far away (Zhou et al. 2021, LAFITE, arXiv 2111.13792). `code_dropout`: up
    to which part of a picture's codes training reads as others, see `zoo.models.dalle`. `embedding_weight`: of the
    paper's second loss, by which a picture of the likeliest codes has the embedding it was drawn from. `guidance`: what
    `generate` takes where none is asked for.
    """

    clip: ClipConfig = field(default_factory=ClipConfig)
    image: VqganConfig = field(default_factory=VqganConfig)
    transformer: ClipGenTransformerConfig = field(default_factory=ClipGenTransformerConfig)
    condition_dropout: float = 0.0
    noise: float = 0.0
    code_dropout: float = 0.0
    embedding_weight: float = 0.0
    guidance: float = 1.0

    @classmethod
    def from_dict(cls, sizes: Mapping) -> ClipGenConfig:
        """The config that `dataclasses.asdict`, and so a config.json, says. Unknown names raise TypeError."""
        kinds = {"clip": ClipConfig, "image": VqganConfig, "transformer": ClipGenTransformerConfig}
        return cls(**{name: kinds[name].from_dict(v) if name in kinds else v for name, v in sizes.items()})


class ClipGen(Painter):
    """Draws pictures of captions. `clip` and `vqgan` are trained before and stay as they are; `tokenizer`, CLIP's, is
    needed to generate only.

    The release draws 64 candidates of each prompt with top_k=500 and top_p=0.95, and shows CLIP's best 8:

        model.generate(prompt, n=8, candidates=64, rerank=model.score, top_k=500, top_p=0.95)

    Raises SettingsError when the parts do not fit each other.
    """

    def __init__(
        self,
        config: ClipGenConfig,
        clip: Clip | None = None,
        vqgan: Vqgan | None = None,
        transformer: ClipGenTransformer | None = None,
        tokenizer: Any = None,
    ):
        super().__init__()
        self.config = config
        self.clip = clip or Clip(config.clip)
        self.vqgan = vqgan or Vqgan(config.image)
        self.transformer = transformer or ClipGenTransformer(config.transformer)
        self.tokenizer = tokenizer
        self.decoding = Decoding
        self.clip.requires_grad_(False)
        self.vqgan.requires_grad_(False)
        self.check_parts()
        embed, expected = self.clip.config.embed, self.transformer.config.embed
        if embed != expected:
            raise SettingsError(
                f"this CLIP's embeddings are {embed} wide and the transformer reads {expected}: it was trained with "
                "another; give that CLIP, or train a transformer for this one"
            )
        if config.embedding_weight and self.vqgan.config.haar:
            raise SettingsError("embedding_weight is for VQGANs that draw pixels, and this one draws a wavelet's bands")

    @property
    def image_tokenizer(self) -> nn.Module:
        """The VQGAN."""
        return self.vqgan

    @property
    def context_dropout(self) -> float:
        """The part of embeddings that training leaves out."""
        return self.config.condition_dropout

    def train(self, mode: bool = True) -> ClipGen:
        """CLIP and the VQGAN stay in evaluation mode."""
        super().train(mode)
        self.clip.eval()
        self.vqgan.eval()
        return self

    # --- training ----------------------------------------------------------------------------------------------------
    def forward(
        self, image: Tensor | None = None, codes: Tensor | None = None, embedding: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Pictures (B, 3, H, W) of 0..1 -> "loss", in nats per code. What was computed before may be given: `codes`
        (B, h, w), and `embedding` (B, E) of CLIP, of any length; with both, pictures are not needed.

        With `embedding_weight`, "loss" is "codes", which are nats, and so many times "embedding", which is 1 - cosine.
        Raises SettingsError where something is missing or of another size.
        """
        if image is None and (codes is None or embedding is None):
            raise SettingsError("without pictures, forward needs both their codes and their CLIP embeddings")
        with torch.no_grad():
            codes = self.vqgan.encode(image) if codes is None else codes.long()
            embedding = F.normalize(self.embed(image) if embedding is None else embedding, dim=-1)
        grid = self.transformer.config.grid
        if tuple(codes.shape[1:]) != (grid, grid):
            raise SettingsError(
                f"the transformer writes {grid} x {grid} codes, and these are {tuple(codes.shape[1:])}: give pictures "
                f"(B, 3, {self.image_size}, {self.image_size})"
            )
        codes, seen = codes.flatten(1), None
        if self.training and self.config.code_dropout:
            seen = partly_others(codes, self.vqgan.vocab, self.config.code_dropout)
        shown = self.blurred(embedding) if self.training else embedding
        found = self.transformer(shown, codes, seen)
        loss, weight = found["loss"], self.config.embedding_weight
        if not weight:
            return {"loss": loss}
        away = self.embedding_loss(found["logits"], torch.where(shown.any(1, keepdim=True), embedding, 0))
        return {"loss": loss + weight * away, "codes": loss, "embedding": away}

    def blurred(self, embedding: Tensor) -> Tensor:
        """Embeddings (B, E) of length 1 -> what training shows of them: with noise, and here and there nothing."""
        if self.config.noise:
            direction = F.normalize(torch.randn_like(embedding), dim=-1)
            embedding = F.normalize(embedding + self.config.noise * direction, dim=-1)
        if self.config.condition_dropout:
            dropped = torch.rand(len(embedding), 1, device=embedding.device) < self.config.condition_dropout
            embedding = torch.where(dropped, self.no_caption(embedding), embedding)
        return embedding

    def embedding_loss(self, logits: Tensor, embedding: Tensor) -> Tensor:
        """Logits (B, N, V) and the embeddings (B, E) -> 1 - their cosine with those of the pictures of the likeliest
        codes, the mean, where an embedding of 0 counts as met. The gradient goes through the mixture of codes that the
        logits say (straight-through).

        The release takes the mean square of the difference, which is 2 / E times this, with pictures of -1..1, which
        CLIP was not made for, and after a division in place, of which torch gives no gradient.
        """
        vocab, grid = logits.shape[-1], self.vqgan.grid
        rows = self.vqgan.quantize.decode(torch.arange(vocab, device=logits.device)[None])[0]  # (C, V)
        mixed = torch.einsum("bnv,cv->bcn", logits.float().softmax(-1).to(rows.dtype), rows)
        likeliest = rows.T[logits.argmax(-1)].movedim(-1, 1)  # (B, C, N)
        rows = likeliest + (mixed - mixed.detach())
        found = self.embed(self.vqgan.draw(rows.unflatten(2, (grid, grid))))
        return ((1 - F.cosine_similarity(found, embedding)) * embedding.any(1)).mean()

    def embed(self, image: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of 0..1 -> their CLIP embeddings (B, E), not normalised."""
        return embed_pictures(self.clip, image)

    # --- drawing -----------------------------------------------------------------------------------------------------
    def contexts(self, texts: list[str]) -> Tensor:
        """Texts -> their CLIP embeddings (B, E), of length 1; "" is nothing, if the model learnt what that is.

        Raises SettingsError without a tokenizer, and CaptionTooLong: the release cuts off the end token, where CLIP
        looks.
        """
        different = list(dict.fromkeys(texts))
        tokens = self.tokenize(different, self.clip.config.text.context)
        embeddings = F.normalize(self.clip.encode_text(tokens).to(tokens.device), dim=-1)
        if self.context_dropout:
            blank = torch.tensor([not text.strip() for text in different], device=tokens.device)
            embeddings = torch.where(blank[:, None], self.no_caption(embeddings), embeddings)
        return embeddings[[different.index(text) for text in texts]]

    def no_caption(self, like: Tensor) -> Tensor:
        """What stands for no caption beside such embeddings (B, E): all 0, (1, E), at the same distance from all. What
        it means is learnt with the projection; published weights know nothing of it."""
        return torch.zeros_like(like[:1])

    def score(self, prompt: str, pictures: list[Image.Image]) -> list[float]:
        """The `rerank=` by the model's own CLIP: the cosine of each picture with the prompt."""
        return clip_score(self.clip, self.tokenizer, self._prepared)(prompt, pictures)

    def _prepared(self, picture: Image.Image) -> Tensor:
        """A picture as `generate` gives it -> (3, size, size) as CLIP sees it."""
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 255
        return as_clip_sees(self.clip, pixels[None])[0]


def embed_pictures(clip: Clip, image: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) of 0..1 -> their CLIP embeddings (B, E), not normalised."""
    return clip.encode_image(as_clip_sees(clip, image))


def as_clip_sees(clip: Clip, image: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) of 0..1 -> (B, 3, size, size) of CLIP's size, mean and spread. Resized as Pillow's bicubic
    does it, which CLIP was trained with; the release shows CLIP pixels of -1..1."""
    size, sizes = clip.image_size, clip.config
    if image.shape[-2:] != (size, size):
        image = F.interpolate(image.float(), (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (image.new_tensor(color)[:, None, None] for color in (sizes.mean, sizes.std))
    return (image - mean) / std
