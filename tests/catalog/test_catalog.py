from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from zoo import catalog
from zoo.errors import UnknownModel, UnknownName, UnknownTask

ROOT = Path(__file__).parents[2]


def test_names_are_unique_within_a_task_whatever_their_case():
    names = [(card.task, card.name.lower()) for card in catalog.cards()]
    assert len(names) == len(set(names))


def test_every_card_is_of_a_known_task_and_listed_under_it():
    assert sorted(catalog.list_models()) == sorted(n for task in catalog.TASKS for n in catalog.list_models(task))


@pytest.mark.parametrize("card", catalog.cards(), ids=lambda card: card.name)
def test_every_card_is_found_by_its_name_in_any_case(card):
    assert catalog.find(card.task, card.name) is card
    assert catalog.find(card.task, card.name.upper()) is card


def test_an_unknown_task_names_the_nearest():
    for ask in (lambda: catalog.find("txt_img_matchin", "clip"), lambda: catalog.list_models("txt_img_matchin")):
        with pytest.raises(UnknownTask, match="'txt_img_matchin'; nearest: txt_img_matching"):
            ask()


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(UnknownModel, match="'clip-bse-p32-224' for txt_img_matching; nearest: clip-base-p32-224"):
        catalog.find("txt_img_matching", "clip-bse-p32-224")


def test_a_model_of_another_task_says_which():
    with pytest.raises(UnknownModel, match="'CLIP-base-p32-224' is a model for txt_img_matching, not for text2img"):
        catalog.find("text2img", "CLIP-base-p32-224")


def test_a_known_task_may_be_empty(monkeypatch):
    monkeypatch.setattr(catalog, "CARDS", ())
    assert catalog.list_models("text2img") == []
    with pytest.raises(UnknownModel, match="there is none yet"):
        catalog.find("text2img", "dalle")


def test_unknown_names_are_lookup_errors():
    with pytest.raises(LookupError):
        catalog.find("txt_img_matching", "nothing")
    assert issubclass(UnknownModel, UnknownName)


def test_a_card_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        catalog.cards()[0].name = "other"


def test_listing_costs_no_torch():
    code = (
        "import sys, zoo.catalog; zoo.catalog.list_models(); print({'torch', 'transformers', 'PIL'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
