"""The words of a text, in any script: the same where answers are scored, passages are cited, and records are compared.

Where a script puts no spaces between words, each character counts as one, as in MLQA (Lewis et al. 2020).
"""

import re
import string
import unicodedata

UNSPACED = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan, Burmese; Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"  # Chinese characters
)
"""Characters of scripts that put no spaces between words."""


def words(text: str) -> list[str]:
    """Lower case words in NFC, without punctuation (ASCII's signs, as in SQuAD, and Unicode's category P) and English articles. In
    scripts without spaces a character, with the marks that belong to it, is a word."""
    signs = seen(text).lower()
    bare = "".join(c for c in signs if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    return [piece for word in bare.split() if word not in ("a", "an", "the") for piece in pieces(word)]


def terms(text: str) -> list[str]:
    """All words in NFC, as they are written, articles too; what is no letter, digit or underscore parts them."""
    whole = seen(text)
    marks = "".join(sorted(c for c in set(whole) if unicodedata.category(c)[0] == "M"))  # vowel signs: \w has none
    return [piece for word in re.findall(rf"\w[\w{marks}]*", whole) for piece in pieces(word)]


def inside_word(text: str, at: int) -> bool:
    """Whether place `at` of a text parts a word, or a letter from its mark; in scripts without spaces each is between two."""
    if not 0 < at < len(text):
        return False
    before, behind = text[at - 1], text[at]
    return before_mark(text, at) or (
        not (UNSPACED.match(before) or UNSPACED.match(behind)) and all(map(of_word, (before, behind)))
    )


def before_mark(text: str, at: int) -> bool:
    """Whether a mark stands at place `at`, which belongs to the letter before."""
    return at < len(text) and unicodedata.category(text[at])[0] == "M"


def of_word(sign: str) -> bool:
    """A letter, digit, mark or soft hyphen. No underscore: that may be Markdown's emphasis."""
    return sign.isalpha() or sign.isdecimal() or sign == "\u00ad" or unicodedata.category(sign)[0] == "M"


def seen(text: str) -> str:
    """The text in NFC without what nobody sees in it: soft hyphens, zero-width spaces, marks of direction (Unicode's Cf)."""
    hidden = {ord(c): None for c in set(text) if unicodedata.category(c) == "Cf"}
    return unicodedata.normalize("NFC", text.translate(hidden) if hidden else text)


def pieces(word: str) -> list[str]:
    """The word, or the characters of its unspaced scripts each and what stands between them."""
    if not UNSPACED.search(word):
        return [word]
    found: list[str] = []
    for character in word:
        mark = unicodedata.category(character)[0] == "M"
        if not found or (not mark and (UNSPACED.match(character) or UNSPACED.match(found[-1]))):
            found.append(character)
        else:
            found[-1] += character
    return found
