"""What exists: cards by task and name. Importing this costs no torch.

A new checkpoint of a known family is one more row in the family's file; a new family is one more file here.
"""

from __future__ import annotations

from zoo.catalog import (
    alt_diffusion,
    clip,
    clip_bert,
    clip_emoji,
    clip_gen,
    dalle,
    dalle_mini,
    dvae,
    kl_vae,
    latent_diffusion,
    lpips,
    safety_checker,
    stable_diffusion,
    stable_diffusion_emoji,
    vqgan,
)
from zoo.catalog.card import Card
from zoo.errors import UnknownModel, UnknownTask, nearest

__all__ = ["TASKS", "Card", "cards", "find", "list_models"]

TASKS = ("txt_img_matching", "text2img", "img_tokenizing", "img_comparing", "img_checking")
CARDS: tuple[Card, ...] = (
    *(clip_emoji.CARDS + clip.CARDS + clip_bert.CARDS),
    *(
        dalle.CARDS
        + dalle_mini.CARDS
        + clip_gen.CARDS
        + stable_diffusion_emoji.CARDS
        + stable_diffusion.CARDS
        + latent_diffusion.CARDS
        + alt_diffusion.CARDS
    ),
    *(dvae.CARDS + vqgan.CARDS + kl_vae.CARDS + lpips.CARDS + safety_checker.CARDS),
)


def cards(task: str | None = None) -> list[Card]:
    """All cards, or those of one task. Raises UnknownTask."""
    if task is None:
        return list(CARDS)
    if task not in TASKS:
        raise UnknownTask(f"no task {task!r}; {nearest(task, TASKS)}")
    return [card for card in CARDS if card.task == task]


def find(task: str, name: str) -> Card:
    """The card of a model; case does not matter. Raises UnknownTask or UnknownModel with the nearest names."""
    of_task = {card.name.lower(): card for card in cards(task)}
    if card := of_task.get(name.lower()):
        return card
    if others := [card.task for card in CARDS if card.name.lower() == name.lower()]:
        raise UnknownModel(f"{name!r} is a model for {' and '.join(others)}, not for {task}")
    choice = nearest(name, of_task) if of_task else "there is none yet"
    raise UnknownModel(f"no model {name!r} for {task}; {choice}")


def list_models(task: str | None = None) -> list[str]:
    """The names of all models, or of those for one task. Raises UnknownTask."""
    return [card.name for card in cards(task)]
