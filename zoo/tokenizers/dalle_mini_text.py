"""How DALL-E mini reads a caption before its tokenizer does: English in ASCII, lower case, hardly any punctuation.

Facts from borisdayma/dalle-mini, `model/text.py`, which all captions of its training went through. Two things are not
done here, for want of the tables they need: emoji are not spelt out, and a hashtag of several words is left as one.
Other scripts, which there are spelt in Latin letters, are unknown here: the model knows no words of theirs.
"""

from __future__ import annotations

import html
import re
import unicodedata

import ftfy

# What losing its accents does not bring to ASCII, as the packages `emoji` and, for the rest, `unidecode` spell it.
SPELT = {
    **{"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ħ": "h", "ı": "i"},
    **{"–": "-", "—": "--", "‐": "-", "−": "-", "•": "*", "·": "*", "⁄": "/", "¡": "!", "¿": "?"},
    **{"«": "<<", "»": ">>", "‹": "<", "›": ">", "′": "'", "´": "'", "€": "eur", "£": "ps", "¥": "y="},
    **{"°": "deg", "×": "x", "÷": "/", "±": "+-", "№": "no. ", "§": "ss"},
    **{"©": ":copyright:", "®": ":registered:", "™": ":trade_mark:"},
    **{"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "\u200b": " "},
}
# They hold the place of a mark inside a word while others go; being letters, they do not end the word.
DOT, QUOTE, SLASH = "ḋ", "ǫ", "ṡ"
RULES = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\s+", " "),
        (r"<person>([, ]*(and)*[, ]*<person>)+", " people "),  # how CC12M hides names
        (r"<person>", " a person "),  # there at random, "someone" at times
        (r"\A\s*\[\d+\]|\[\d+\]\s*\Z", ""),  # a reference of Wikipedia's
        (r"<[^<]+?>", " "),  # a tag
        (r"http\S+", ""),
        (r"(\d),(\d{3})", r"\1\2"),
        (r"(\d),(\d{3})", r"\1\2"),  # again, for millions
        (r"(\w)\.(\w)", rf"\1{DOT}\2"),
        (r"'(?=([stdm]|ll|re|ve)\b)", QUOTE),
        (r"(\d)/(\d)", rf"\1{SLASH}\2"),
        (r"(\w)-(\w)", r"\1 \2"),
        (r"([%&/$*])", r" \1 "),
        (r"#(\w+)", r"\1"),
        (r"[_#\\]", " "),
        (r"""['"`]""", ' " '),
        (r"[()\[\].,|:;?!=+~\-/{}]", ","),
        (DOT, "."),
        (QUOTE, "'"),
        (SLASH, "/"),
        (r"(\D)\1{3,}", r"\1"),  # from four on: "VIII" is a number
        (r'(\s*"+\s*)+', ' " '),
        (r"(\s*,+\s*)+", ", "),
        (r"\s+", " "),
        (r"\A\s*,|,\s*\Z", ""),
    )
]


def normalise(text: str) -> tuple[str, list[str]]:
    """A caption -> what the tokenizer reads, without a blank at its ends, and the characters that were left out."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    spelt, unknown = [], []
    for character in text.lower():
        letters = character if character.isascii() else _spelt(character)
        if not letters.isascii():
            unknown.append(character)
            letters = ""
        spelt.append(letters)
    text = "".join(spelt)
    for pattern, by in RULES:
        text = pattern.sub(by, text)
    return text.strip(), unknown


def _spelt(character: str) -> str:
    """A letter, sign or mark -> what stands for it, in ASCII if there is such a thing."""
    if character in SPELT:
        return SPELT[character]
    parts = unicodedata.normalize("NFKD", character)
    parts = "".join(part for part in parts if unicodedata.category(part) not in ("Mn", "Cf"))
    return "".join(SPELT.get(part, part) for part in parts)
