"""A text that a vocabulary cannot read is refused, and one that it can read in part is warned of, once."""

from __future__ import annotations

import pytest

from zoo.errors import DataError
from zoo.tokenizers.unknown import tell_unknown


def test_what_is_lost_is_named_once(caplog):
    told: set[str] = set()
    tell_unknown("a 猫 and 猫 🐈", "猫猫🐈", told)
    assert [record.getMessage() for record in caplog.records] == [
        "this model's tokenizer does not know '猫' '🐈': say it in other words"
    ]
    tell_unknown("a 猫", "猫", told)
    assert len(caplog.records) == 1
    tell_unknown("a 猫狗", "猫狗", told)
    assert "'狗'" in caplog.text and caplog.text.count("猫") == 1


@pytest.mark.parametrize("text, unknown", [("猫", "猫"), ("猫!?", "猫"), ("🐈 🐈", "🐈"), ("кот, пёс", "котпёс")])
def test_a_text_without_a_known_letter_is_refused(text, unknown):
    with pytest.raises(DataError, match=f"no letter of '{text[:1]}"):
        tell_unknown(text, unknown, set())


@pytest.mark.parametrize("text", ["", "!?", "a cat"])
def test_a_text_that_loses_nothing_is_fine(text, caplog):
    tell_unknown(text, "", set())
    assert not caplog.records
