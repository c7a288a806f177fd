"""Which characters may be shown, and which end a suggestion."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midfill.text.characters import escaped, safe_length

BIDIRECTIONAL = [0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
CONTROLS = [*range(9), 0x0B, 0x0C, *range(0x0D, 0x20), 0x7F, *range(0x80, 0xA0)]
TAGS = [*range(0xE0000, 0xE0080)]
INVISIBLE = [
    0xAD,
    0x200B,
    0x200C,
    0x200D,
    0x2028,
    0x2029,
    0x2060,
    0x2800,
    0x3164,
    0xFE0F,
    0xFEFF,
    0x1BCA0,
    0xE000,
    0xE0100,
]


@pytest.mark.parametrize("code", [*CONTROLS, *BIDIRECTIONAL, *TAGS, *INVISIBLE], ids=hex)
def test_a_text_ends_before_a_character_that_hides_or_commands(code):
    assert safe_length(f"ab{chr(code)}cd", "near") == 2


def test_no_character_of_a_kind_that_cannot_be_seen_passes():
    # Marks of numbers and verses: of Unicode's format characters, those that are seen.
    seen = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD, *map(ord, "\t\n")}
    hidden = [
        code
        for code in range(0x110000)
        if unicodedata.category(chr(code)) in {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"} and code not in seen
    ]
    assert not [hex(code) for code in hidden if safe_length(f"ab{chr(code)}cd", "near") != 2]


@pytest.mark.parametrize("code", [*BIDIRECTIONAL, *INVISIBLE], ids=hex)
def test_what_the_file_has_nearby_may_come_again(code):
    assert safe_length(f"ab{chr(code)}cd", f"x{chr(code)}y") == 5


@pytest.mark.parametrize("code", [*CONTROLS, *TAGS], ids=hex)
def test_controls_and_tags_never_come(code):
    assert safe_length(f"ab{chr(code)}cd", f"x{chr(code)}y") == 2


@pytest.mark.parametrize(
    "text",
    ["tab\tand\n", "é", "e\u0301", "ひら\u3000がな", "⚠\ufe0f", "1\ufe0f\u20e3", "©\ufe0e", "🙂", "a\xa0b"],
)
def test_text_of_all_languages_is_safe(text):
    assert safe_length(text, "") == len(text)


def test_what_stands_before_decides_about_a_presentation():
    assert safe_length("\ufe0f", "", "⚠") == 1
    assert safe_length("\ufe0f", "", "a") == 0


@given(st.text())
def test_what_is_escaped_has_no_control_nor_format_left(text):
    shown = escaped(text)
    assert not [char for char in shown if unicodedata.category(char) == "Cc" and char not in "\t\n"]
    assert not {chr(code) for code in BIDIRECTIONAL} & set(shown)


def test_an_escape_says_what_it_was():
    assert escaped("a\x1b[31m\u202e\tb\n") == "a\\x1b[31m\\u202e\tb\n"
