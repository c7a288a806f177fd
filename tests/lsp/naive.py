"""A document as a plain string, edited by walking it unit by unit: slow, and plainly right."""

from hypothesis import strategies as st

from midfill.text.documents import Change

ALPHABET = [
    "a",
    "b ",
    "\n",
    "\r",
    "\r\n",
    "é",
    "😀",
    "\u2028",
    "\x0c",
    "\x85",
    "漢",
    "👩\u200d💻",
    "\ud83d",
    "\ude00",
    "\0",
    "\ufeff",
]
texts = st.lists(st.sampled_from(ALPHABET), max_size=14).map("".join)
positions = st.tuples(st.integers(0, 6), st.integers(0, 10))
changes = st.one_of(st.builds(Change, texts), st.builds(Change, texts, positions, positions))


def joined(text):
    """Surrogate halves side by side are one character to every client."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def width(char, encoding):
    if encoding == "utf-32":
        return 1
    data = char.encode(encoding if encoding == "utf-8" else "utf-16-le", "surrogatepass")
    return len(data) if encoding == "utf-8" else len(data) // 2


def naive_offset(text, position, encoding):
    line, character = position
    index = 0
    while line:
        if index >= len(text):
            return len(text)
        line -= text[index] in "\r\n"
        index += 2 if text[index : index + 2] == "\r\n" else 1
    while index < len(text) and text[index] not in "\r\n" and character >= width(text[index], encoding):
        character -= width(text[index], encoding)
        index += 1
    return index


def naive_edit(text, change, encoding):
    if change.start is None:
        return joined(change.text)
    start, end = sorted(naive_offset(text, place, encoding) for place in (change.start, change.end))
    return joined(text[:start] + change.text + text[end:])
