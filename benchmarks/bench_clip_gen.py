"""CLIP-GEN's drawing against its release's way, and its training on cached codes against on the fly, in one run.

    python benchmarks/bench_clip_gen.py                  # width 512, depth 8
    python benchmarks/bench_clip_gen.py --full           # the release's gpt2_medium: width 1024, depth 24
    python benchmarks/bench_clip_gen.py --part drawing --part training --candidates 64 --places 8 --rounds 3

drawing: the codes of one picture and of the candidates of one prompt, by ClipGen.draw, which reads the prompt once and
keeps keys and values, against the release's way (HFAiLab/clip-gen, models/gpt.py, demo.py): the whole sequence again
for each code, logits at all its positions, candidates in batches of 8. The same weights, top_k=500 and top_p=0.95. Of a
batch of 8, and with --full of one picture too, only the codes at some places are drawn, spread evenly, whose mean
stands for all.
training: a step of ClipGen.forward over the packaged CLIP and a VQGAN of train_vqgan.py's own sizes, from pictures
against from their codes and embeddings.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from bench_dalle import fastest
from torch import Tensor, nn

from zoo import AutoLoader
from zoo.generation.tokens import Sampling, choose, uniforms
from zoo.models.clip import ClipConfig, TextConfig, VitConfig
from zoo.models.clip_gen import ClipGen, ClipGenConfig
from zoo.models.clip_gen_transformer import ClipGenTransformer, ClipGenTransformerConfig
from zoo.models.vqgan import Vqgan, VqganConfig

SAMPLING = Sampling(top_k=500, top_p=0.95)
THEIR_BATCH = 8


# --- drawing ---------------------------------------------------------------------------------------------------------
def painter(args: argparse.Namespace) -> ClipGen:
    """A CLIP-GEN whose CLIP and VQGAN, which drawing codes asks nothing of, are tiny."""
    torch.manual_seed(0)
    sizes = ClipGenTransformerConfig(grid=args.grid, width=args.width, depth=args.depth, heads=args.width // 64)
    tower = dict(width=64, depth=1, heads=1)
    clip = ClipConfig(embed=sizes.embed, image=VitConfig(size=32, patch=32, **tower), text=TextConfig(**tower))
    narrow = dict(widths=(32,) * 5, blocks=1, attention=(), latent=4, code_width=4)
    image = VqganConfig(size=16 * args.grid, vocab=sizes.vocab, encoder=False, **narrow)
    return ClipGen(ClipGenConfig(clip=clip, image=image, transformer=sizes)).eval()


class Release(nn.Module):
    """The release's transformer: torch's TransformerEncoderLayers, each given the causal mask; over our weights."""

    def __init__(self, ours: ClipGenTransformer):
        super().__init__()
        self.ours, sizes = ours, ours.config
        with torch.device("meta"):  # all that they hold is put in below
            words = dict(dropout=sizes.dropout, activation=F.gelu, batch_first=True, norm_first=True)
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(sizes.width, sizes.heads, 4 * sizes.width, **words)
                for _ in range(sizes.depth)
            )
        for layer, block in zip(self.blocks, ours.blocks, strict=True):
            layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias = block.qkv.weight, block.qkv.bias
            layer.self_attn.out_proj = block.out
            layer.norm1, layer.norm2, layer.linear1, layer.linear2 = (
                block.norm1,
                block.norm2,
                block.mlp.up,
                block.mlp.down,
            )
        self.mask = torch.ones(sizes.grid**2, sizes.grid**2, dtype=torch.bool).triu(1)  # True: not seen

    def forward(self, context: Tensor, codes: Tensor) -> Tensor:
        """Embeddings (B, E) and the codes so far (B, n) -> logits (B, n + 1, V) at all positions."""
        ours, length = self.ours, codes.shape[1] + 1
        x = torch.cat([ours.context(context)[:, None], ours.image(codes)], 1) + ours.positions.weight[:length]
        for layer in self.blocks:
            x = layer(x, self.mask[:length, :length])
        return ours.image_head(ours.norm(x))

    def draw(self, context: Tensor, numbers: Tensor, places: Sequence[int]) -> Tensor:
        """Embeddings (B, E) and a number for each code (B, N) -> codes (B, N), those at the places drawn, others 0."""
        codes = torch.zeros(numbers.shape, dtype=torch.int64)
        for place in places:
            logits = self(context, codes[:, :place])
            codes[:, place] = choose(logits[:, -1], numbers[:, place], SAMPLING)
        return codes


def drawing(args: argparse.Namespace) -> None:
    model = painter(args)
    release, length = Release(model.transformer).eval(), args.grid**2
    prompt = F.normalize(torch.randn(1, model.transformer.config.embed), dim=-1)
    codes = torch.randint(model.vqgan.vocab, (1, length))
    torch.testing.assert_close(
        release(prompt, codes[:, :-1]), model.transformer.logits(prompt, codes), atol=1e-4, rtol=1e-4
    )
    print("pictures     zoo    release    ratio    (seconds; the release's by)")
    for count in (1, args.candidates):
        batch = min(count, THEIR_BATCH)
        few = min(args.places, length) if count > 1 or args.full else length
        places = [(2 * i + 1) * length // (2 * few) for i in range(few)]
        ours, theirs = prompt.expand(count, -1), prompt.expand(batch, -1)
        numbers = uniforms(range(batch), length)
        calls = {
            "zoo": lambda ours=ours: model.draw(ours, range(len(ours)), SAMPLING),
            "release": lambda theirs=theirs, numbers=numbers, places=places: release.draw(theirs, numbers, places),
        }
        seconds = fastest(calls, args.rounds)
        seconds["release"] *= length / few * count / batch
        how = f"{few} of {length} codes, {batch} of {count} pictures"
        if few == length and batch == count:
            same = (calls["zoo"]().flatten(1) == calls["release"]()).float().mean()
            how += f"; {same:.1%} of codes are the same"
        ratio = seconds["release"] / seconds["zoo"]
        print(f"{count:8}  {seconds['zoo']:6.2f}  {seconds['release']:9.2f}  {ratio:7.1f}    {how}", flush=True)


# --- training --------------------------------------------------------------------------------------------------------
def training(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    clip = AutoLoader("txt_img_matching", "clip-emoji-tiny", device="cpu", dtype="float32").get_model()
    halves = dict(widths=(32, 64, 96, 128), blocks=1, attention=(3,), latent=128)
    vqgan = Vqgan(VqganConfig(size=64, vocab=1024, code_width=32, **halves))
    sizes = ClipGenTransformerConfig(embed=clip.config.embed, vocab=1024, grid=vqgan.grid, width=256, depth=6, heads=4)
    config = ClipGenConfig(clip=clip.config, image=vqgan.config, transformer=sizes)
    model = ClipGen(config, clip, vqgan, ClipGenTransformer(sizes)).train()
    optimizer = torch.optim.AdamW(model.transformer.parameters(), lr=1e-4, fused=True)
    image = torch.rand(args.batch_size, 3, 64, 64)
    with torch.no_grad():
        cached = {"codes": model.vqgan.encode(image), "embedding": model.embed(image)}

    def step(**batch: Tensor) -> None:
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.testing.assert_close(model(image=image)["loss"], model(**cached)["loss"])
    seconds = fastest({"cached": lambda: step(**cached), "on the fly": lambda: step(image=image)}, args.rounds)
    for name, taken in seconds.items():
        print(f"{name:10}  {1e3 * taken:8.1f} ms a step of {args.batch_size} pictures of 64 x 64")
    print(f"on the fly over cached: {seconds['on the fly'] / seconds['cached']:.2f}")


PARTS = {"drawing": drawing, "training": training}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the release's sizes")
    for name, value in dict(width=512, depth=8, grid=16, candidates=64, places=8, rounds=3, batch_size=64).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="(%(default)s)")
    parser.add_argument("--part", choices=PARTS, action="append")
    args = parser.parse_args()
    if args.full:
        args.width, args.depth = 1024, 24
    for part in args.part or PARTS:
        sizes = f", width {args.width}, depth {args.depth}" if part == "drawing" else ""
        print(f"\n{part}{sizes}, {torch.get_num_threads()} threads, fp32", flush=True)
        with torch.inference_mode(part != "training"):
            PARTS[part](args)


if __name__ == "__main__":
    main()
