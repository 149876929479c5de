"""The options that say how pictures are drawn, and what they are to the model that draws."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

TOKENS = ("temperature", "top_k", "top_p")
NOISE = ("negative", "sampler", "steps", "rescale")


def add_draw_options(parser: argparse.ArgumentParser) -> None:
    """--guidance, and what models that draw token by token, or noise away, have beside it."""
    parser.add_argument("--guidance", type=float, help="above 1 keeps nearer to the prompt (default: the model's)")
    tokens = parser.add_argument_group("of models that draw token by token: DALL-E, CLIP-GEN")
    tokens.add_argument("--temperature", type=float, help="lower is tidier and less varied (default: 1)")
    tokens.add_argument("--top-k", type=int, metavar="K", help="among the K likeliest only")
    tokens.add_argument("--top-p", type=float, metavar="P", help="among the likeliest that together have P")
    noise = parser.add_argument_group("of models that take noise away: Stable Diffusion")
    noise.add_argument("--negative", metavar="TEXT", help="what to keep away from")
    noise.add_argument("--sampler", help="ddim, ddpm, pndm, euler, euler_a, dpm++2m (default: the model's)")
    noise.add_argument("--steps", type=int, help="of the sampler (default: the model's)")
    noise.add_argument("--rescale", type=float, help="0 to 1: takes back the contrast that guidance adds (default: 0)")


def draw_words(args: argparse.Namespace, model: Any, *names: str) -> dict[str, Any]:
    """Those of `names` and of the options above that were given, as keywords of the model's `generate`.

    Raises SettingsError for one that this kind of model does not have.
    """
    from zoo.errors import SettingsError

    words = {name: getattr(args, name) for name in ("guidance", *TOKENS, *NOISE, *names)}
    words = {name: value for name, value in words.items() if value is not None}
    known = inspect.signature(model.generate).parameters
    for name in words:
        if name not in known:
            raise SettingsError(f"--{name.replace('_', '-')} is of another kind of model than {type(model).__name__}")
    return words
