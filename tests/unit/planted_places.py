"""A cursor in a text, and what is left there of what a model writes."""

from midfill.completion.postprocess.clean import clean
from midfill.completion.postprocess.cursor_context import CursorContext
from midfill.completion.postprocess.stop import Stopper
from midfill.text.documents import Document, Point, Snapshot


def place_of(language, marked, *, invoked=False):
    """The place of the cursor `▮` in a text."""
    before, after = marked.split("▮")
    document = Document.open("file:///x", language, 1, before + after)
    here = Point(before.count("\n"), len(before) - before.rfind("\n") - 1)
    return CursorContext.of(Snapshot(document, here), invoked=invoked)


def suggested(cursor, model, *, complete=True, forbidden=()):
    """What is left of a text that comes character by character, and why nothing is."""
    stopper = Stopper(cursor)
    for size in range(1, len(model) + 1):
        if stopper.end(model[:size]) is not None:
            return clean(model[:size], cursor, complete=True, forbidden=forbidden)
    return clean(model, cursor, complete=complete, forbidden=forbidden)
