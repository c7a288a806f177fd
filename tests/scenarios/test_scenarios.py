"""Each .txt file beside this one is a scenario: why, a document with a cursor ▮, the model, the answer.

Sections: `-- NAME --` is the document; `-- model --` what the model writes at the cursor;
`-- expect --` what is inserted, or `-- nothing --` with the reason code. `-- invoked --` (empty) means
that the user asked explicitly; `-- language --` is the editor's name of the language, where the document's
name does not tell; `-- settings --` holds settings in TOML. `-- then --` is what the document
has become after a first answer: it is the answer there that is expected, from `-- source --`. What
the answer takes the place of, behind the cursor, is in `-- replaces --`.
"""

import re
import tomllib
from pathlib import Path

import pytest

from midfill.completion.answer import Trigger
from midfill.completion.completer import Completer
from midfill.engine.scripted import Rule, Script, ScriptedEngine
from midfill.settings import parse
from midfill.text.documents import Document, Point, Snapshot
from midfill.text.languages import language_id

SCENARIOS = sorted(Path(__file__).parent.glob("*.txt"))
SECTION = re.compile(r"^-- (.+) --\n", re.MULTILINE)


def read(path):
    why, *rest = SECTION.split(path.read_text(encoding="utf-8"))
    assert why.strip(), f"{path.name} does not say why"
    sections = {name: text.removesuffix("\n") for name, text in zip(rest[::2], rest[1::2], strict=True)}
    known = {"model", "expect", "nothing", "invoked", "settings", "then", "source", "replaces", "language"}
    (name,) = set(sections) - known
    return name, sections


def snapshot(name, marked, language=None):
    before, after = marked.split("▮")
    document = Document.open(f"file:///w/{name}", language or language_id(name), 1, before + after)
    return Snapshot(document, Point(before.count("\n"), len(before) - before.rfind("\n") - 1))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
async def test_scenario(path):
    name, sections = read(path)
    engine = ScriptedEngine(Script([Rule(text=sections.get("model", ""))]))
    await engine.start(lambda _message, _share: None)
    given = {"max_new_tokens": 500, "prefetch": False} | tomllib.loads(sections.get("settings", ""))
    completer = Completer(parse(given))
    completer.use(engine)

    trigger = Trigger.INVOKED if "invoked" in sections else Trigger.AUTOMATIC
    language = sections.get("language")
    here = snapshot(name, sections[name], language)
    answer = await completer.complete(here, trigger)
    if "then" in sections:
        here = snapshot(name, sections["then"], language)
        answer = await completer.complete(here, trigger)
        assert answer.source == sections["source"]

    if "nothing" in sections:
        assert (answer.text, answer.reason) == ("", sections["nothing"])
    else:
        assert (answer.text, answer.reason) == (sections["expect"], None)
        assert here.line_after[: answer.num_replaced] == sections.get("replaces", "")


def test_there_are_scenarios():
    assert len(SCENARIOS) >= 20
