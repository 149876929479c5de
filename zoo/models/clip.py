"""CLIP: two towers, one space (Radford et al. 2021, openai/CLIP). B batch, T tokens, D width, E embedding, P patches"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import distributed
from zoo.blocks.recompute import recompute
from zoo.blocks.transformer import Transformer
from zoo.errors import BatchTooSmall
from zoo.models.clip_bert import BertConfig, BertTransformer
from zoo.models.clip_resnet import ModifiedResNet, ResNetConfig

MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True, kw_only=True)
class VitConfig:
    """Sizes of the image transformer. `size` and `patch` are in pixels."""

    size: int = 224
    patch: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    activation: str = "quick_gelu"
    patch_dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes of the text transformer. The end token is the one with the largest id."""

    context: int = 77
    vocab: int = 49408
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    activation: str = "quick_gelu"


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """A whole CLIP, with the preprocessing that its weights expect. `loss`: softmax (CLIP) or sigmoid (SigLIP)."""

    embed: int = 512
    image: VitConfig | ResNetConfig = field(default_factory=VitConfig)
    text: TextConfig | BertConfig = field(default_factory=TextConfig)
    loss: str = "softmax"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resize: str = "shortest"
    interpolation: str = "bicubic"

    @classmethod
    def from_dict(cls, sizes: Mapping) -> ClipConfig:
        """The config that `dataclasses.asdict`, and so a config.json, says. Unknown names raise TypeError."""
        image = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.get("image", {}).items()}
        text = sizes.get("text", {})
        rest = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items() if k not in ("image", "text")}
        image_tower = ResNetConfig if "layers" in image else VitConfig
        text_tower = BertConfig if "pad" in text else TextConfig
        return cls(image=image_tower(**image), text=text_tower(**text), **rest)


class VisionTransformer(nn.Module):
    """Patches and a class token through a transformer; the class token is the picture's embedding."""

    def __init__(self, config: VitConfig, embed: int):
        super().__init__()
        width, scale = config.width, config.width**-0.5
        self.patch = nn.Conv2d(3, width, config.patch, stride=config.patch, bias=False)
        self.class_token = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty((config.size // config.patch) ** 2 + 1, width))
        self.norm_in = nn.LayerNorm(width)
        self.transformer = Transformer(
            width=width,
            depth=config.depth,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            activation=config.activation,
        )
        self.norm_out = nn.LayerNorm(width)
        self.project = nn.Linear(width, embed, bias=False)
        self.patch_dropout = config.patch_dropout
        for parameter in (self.class_token, self.positions, self.project.weight):
            nn.init.normal_(parameter, std=scale)

    @property
    def groups(self) -> list[nn.Module]:
        """The parts in the order in which they are unlocked from the end."""
        return [self.patch, *self.transformer.blocks, nn.ModuleList([self.norm_out, self.project])]

    def forward(self, image: Tensor) -> Tensor:
        """Pictures (B, 3, size, size) -> embeddings (B, E)."""
        x = self.patch(image).flatten(2).transpose(1, 2)  # (B, P, D)
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], 1) + self.positions
        if self.training and self.patch_dropout:
            x = self.drop_patches(x)
        x = self.transformer(self.norm_in(x))
        return self.project(self.norm_out(x[:, 0]))

    def drop_patches(self, x: Tensor) -> Tensor:
        """(B, 1 + P, D) -> (B, 1 + kept, D): each picture keeps its own random patches (FLIP, Li et al. 2022)."""
        batch, patches = len(x), x.shape[1] - 1
        kept = max(1, round(patches * (1 - self.patch_dropout)))
        chosen = torch.rand(batch, patches, device=x.device).topk(kept).indices + 1
        chosen = torch.cat([chosen.new_zeros(batch, 1), chosen], 1)
        return x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))


class TextTransformer(nn.Module):
    """A causal transformer; what stands at the end token is the caption's embedding."""

    def __init__(self, config: TextConfig, embed: int):
        super().__init__()
        width = config.width
        self.embed = nn.Embedding(config.vocab, width)
        self.positions = nn.Parameter(torch.empty(config.context, width))
        self.transformer = Transformer(
            width=width,
            depth=config.depth,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            activation=config.activation,
            causal=True,
        )
        self.norm_out = nn.LayerNorm(width)
        self.project = nn.Linear(width, embed, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """As published (openai/CLIP, initialize_parameters)."""
        width, depth = self.embed.embedding_dim, len(self.transformer.blocks)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        nn.init.normal_(self.project.weight, std=width**-0.5)
        for block in self.transformer.blocks:
            nn.init.normal_(block.attention.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attention.out.weight, std=(2 * depth * width) ** -0.5)
            nn.init.normal_(block.mlp.up.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.down.weight, std=(2 * depth * width) ** -0.5)

    @property
    def groups(self) -> list[nn.Module]:
        """The parts in the order in which they are unlocked from the end."""
        return [self.embed, *self.transformer.blocks, nn.ModuleList([self.norm_out, self.project])]

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) -> embeddings (B, E). Nothing after the batch's last end token is computed: attention is
        causal, so it could change nothing."""
        end = tokens.argmax(-1)  # the end token has the largest id
        tokens = tokens[:, : int(end.max()) + 1]
        x = self.embed(tokens) + self.positions[: tokens.shape[1]]  # (B, T, D)
        x = self.transformer(x)[torch.arange(len(x), device=x.device), end]  # (B, D)
        return self.project(self.norm_out(x))


class _Bounded(torch.autograd.Function):
    """x within bounds, with no gradient that would push it further out: projected descent without writing into x, of
    which a rank may hold nothing under ZeRO."""

    @staticmethod
    def forward(ctx, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward((x <= low).float() - (x >= high).float())  # which way leads back: 1 up, -1 down
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (inward,) = ctx.saved_tensors
        return torch.where(grad * inward > 0, 0.0, grad), None, None


class Clip(nn.Module):
    """An image tower and a text tower that put a picture and its caption at the same place.

    `chunk`: embed this many samples at a time and compute the activations again in the backward pass: the loss and its
    gradients stay those of the whole batch while memory is that of one chunk (GradCache, Gao et al. 2021).
    """

    def __init__(self, config: ClipConfig, image: nn.Module | None = None, text: nn.Module | None = None):
        super().__init__()
        self.config = config
        image_tower = ModifiedResNet if isinstance(config.image, ResNetConfig) else VisionTransformer
        text_tower = BertTransformer if isinstance(config.text, BertConfig) else TextTransformer
        self.image = image or image_tower(config.image, config.embed)
        self.text = text or text_tower(config.text, config.embed)
        sigmoid = config.loss == "sigmoid"
        # SigLIP (Zhai et al. 2023) starts at a temperature of 10 and a bias of -10, CLIP at 1 / 0.07.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10 if sigmoid else 1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if sigmoid else None
        self.chunk: int | None = None
        self.locked: dict[str, list[nn.Module]] = {}

    @property
    def image_size(self) -> int:
        """The side in pixels of the pictures it takes."""
        return self.config.image.size

    def encode_image(self, image: Tensor) -> Tensor:
        """Pictures (B, 3, size, size) -> embeddings (B, E), not normalised."""
        return self.image(image.to(self.logit_scale.dtype))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) -> embeddings (B, E), not normalised."""
        return self.text(tokens)

    def similarity(self, image: Tensor, tokens: Tensor) -> Tensor:
        """Pictures (N, 3, size, size) and tokens (M, T) -> logits (N, M): the scaled cosine of each pair."""
        return self.logits(F.normalize(self.encode_image(image), dim=-1), F.normalize(self.encode_text(tokens), dim=-1))

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """Normalised embeddings (N, E) and (M, E) -> logits (N, M)."""
        # The released repository forgets this; the paper clips the temperature at 100 so that training is stable.
        scale = _Bounded.apply(self.logit_scale, 0.0, MAX_LOGIT_SCALE) if self.training else self.logit_scale
        logits = scale.exp() * image @ text.T
        return logits if self.logit_bias is None else logits + self.logit_bias

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """Pictures (B, 3, size, size) and the tokens (B, T) of their captions -> loss, and logits (B, W * B) of this
        rank's pictures against the captions of all W ranks.

        Raises BatchTooSmall when all ranks together hold one pair.
        """
        if len(image) * distributed.world_size() < 2:
            raise BatchTooSmall("a contrastive loss needs two pairs or more in a batch; raise batch_size")
        image = F.normalize(self.embed(self.image, self.encode_image, image), dim=-1)
        text = F.normalize(self.embed(self.text, self.encode_text, text), dim=-1)
        all_images, all_texts = distributed.gather(image), distributed.gather(text)
        own = torch.arange(len(image), device=image.device) + distributed.rank() * len(image)
        logits = self.logits(image, all_texts)
        if self.config.loss == "sigmoid":
            loss = sigmoid_loss(logits, own)
        else:
            loss = (F.cross_entropy(logits, own) + F.cross_entropy(self.logits(text, all_images), own)) / 2
        return {"loss": loss, "logits": logits}

    def embed(self, tower: nn.Module, encode, x: Tensor) -> Tensor:
        """(B, ...) -> (B, E), in chunks when they are asked for."""
        if not (self.chunk and self.training) or len(x) <= self.chunk:
            return encode(x)
        return torch.cat([recompute(tower, part, call=encode) for part in x.split(self.chunk)])

    def lock(self, tower: str, unlocked: int = 0) -> None:
        """Freeze the "image" or "text" tower but for its last `unlocked` groups (LiT, Zhai et al. 2022). What is
        frozen stays in evaluation mode, so batch-norm statistics and patch dropout stand still as well."""
        module = getattr(self, tower)
        module.requires_grad_(False)
        still_open = module.groups[max(0, len(module.groups) - unlocked) :]
        for group in still_open:
            group.requires_grad_(True)
        self.locked[tower] = still_open
        self.train(self.training)

    def train(self, mode: bool = True) -> Clip:
        """Training mode for all that is not locked."""
        super().train(mode)
        for tower, still_open in self.locked.items():
            getattr(self, tower).eval()
            for group in still_open:
                group.train(mode)
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the activations of each block again in the backward pass instead of keeping them."""
        for module in self.modules():
            if hasattr(module, "checkpointing"):
                module.checkpointing = enable


def sigmoid_loss(logits: Tensor, own: Tensor) -> Tensor:
    """Each pair is a yes or a no by itself (SigLIP). Logits (B, N), column of each row's own caption (B,) -> scalar."""
    signs = torch.full_like(logits, -1.0)
    signs[torch.arange(len(logits), device=logits.device), own] = 1.0
    return -F.logsigmoid(signs * logits).sum() / len(logits)
