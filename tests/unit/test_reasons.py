"""Each filter of the clean-up that leaves nothing says so by a reason of its own, which is true."""

import pytest
from planted_places import place_of, suggested

from midfill.completion.reasons import REASONS, Reason

# A language, a text with a cursor, what the model writes, whether the user asked, and why nothing is left.
EMPTIED = [
    ("python", "x = ▮\n", " \n", False, Reason.MODEL_SILENT),
    ("python", "x = ▮\n", "<|sentinel|>1\n", False, Reason.SPECIAL_TOKEN),
    ("python", "x = ▮\n", "  \n<|sentinel|>", True, Reason.SPECIAL_TOKEN),
    ("python", "a = 1\n▮\nc = 3\n", "c = 3\n", False, Reason.REPEATS_TEXT),
    ("python", "a = 1\n▮\nc = g(3)\nd = 4\n", "  c = g(3)\n", False, Reason.REPEATS_TEXT),
    ("python", "f(▮)\n", ")\n", False, Reason.REPEATS_TEXT),
    ("python", "f(▮ + 1)\n", " + 1)\n", True, Reason.REPEATS_TEXT),
    ("markdown", "a\n▮\n- b c\n", "- b c\n", False, Reason.REPEATS_TEXT),
    ("python", "a = 1\n▮\n", "\n\n\nb = 2\n", False, Reason.BLANK_LINES),
    ("python", "f(▮)\n", "\nb = 2\n", False, Reason.BLANK_LINES),
    ("python", "a = 1\n▮\n", "```\nb = 2\n", False, Reason.CODE_FENCE),
    ("javascript", "if (a) {\n    ▮\n    });\n", "}\n", False, Reason.CLOSES_BLOCK),
    ("python", "for a in b:\n    c()▮\n", "\nd()\n", False, Reason.OUTSIDE_BLOCK),
    ("python", "for a in b:▮\n", "\nd()\n", False, Reason.OUTSIDE_BLOCK),
    ("python", "def f():\n▮\n", "import a\n", False, Reason.TOP_LEVEL),
    ("python", "def f(a):\n    b()▮\n    c()\n", "\n    return a\n", False, Reason.UNREACHABLE),
    ("python", "a = 1\n▮\n", "# b\n", False, Reason.COMMENT_ONLY),
    ("sql", "select 1;\n▮\n", "-- b\n", False, Reason.COMMENT_ONLY),
]


@pytest.mark.parametrize(("language", "marked", "model", "invoked", "reason"), EMPTIED)
def test_what_left_nothing_is_said(language, marked, model, invoked, reason):
    place = place_of(language, marked, invoked=invoked)
    assert suggested(place, model, forbidden=("<|sentinel|>",)) == ("", reason)


def test_a_text_that_the_token_limit_cut_is_said():
    place = place_of("python", "x = (▮\n")
    assert suggested(place, "  \n  1000", complete=False) == ("", Reason.TOKEN_LIMIT)
    comment = suggested(place_of("python", "a = 1▮\n"), "\n# b\n# c", complete=False)
    assert comment == ("", Reason.COMMENT_ONLY)


def test_a_text_that_does_not_lead_to_the_rest_of_the_line_is_said():
    place = place_of("python", "x = ▮+ 1\n", invoked=True)
    assert suggested(place, "\n  foo\n  bar", complete=False) == ("", Reason.OTHER_LINE)


def test_every_reason_has_a_sentence_of_its_own():
    assert set(REASONS) == set(Reason)
    assert len(set(REASONS.values())) == len(REASONS)
    assert all(sentence.endswith(".") for sentence in REASONS.values())
