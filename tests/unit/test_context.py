"""What is collected for a cursor, and how it gets into a prompt. Real files, real indexing process."""

import random

import pytest
from planted import certain, possible

from midfill.completion.context.bundle import EMPTY_BUNDLE, ContextBundle, ContextSource, Folder, Snippet
from midfill.completion.context.chunks import parse
from midfill.completion.context.collector import ContextCollector
from midfill.completion.context.files import to_source_file
from midfill.completion.context.index import RepositoryIndex
from midfill.completion.context.indexer import Indexer
from midfill.completion.context.rendering import ContextRenderer
from midfill.completion.prompt import PromptBuilder
from midfill.engine.api import ModelInfo
from midfill.engine.scripted import CharTokenizer
from midfill.fim.templates import FAMILIES
from midfill.settings import Settings
from midfill.text.documents import Change, Document, Encoding, Point, Snapshot
from midfill.text.uris import file_of

SHAPES = '''"""Shapes."""


class Rectangle:
    def __init__(self, width, height):
        self.width = width
        self.height = height

    def area(self):
        return self.width * self.height


def largest_rectangle(rectangles):
    return max(rectangles, key=lambda rectangle: rectangle.area())
'''
ORDERS = "\n\n".join(
    f"def total_of_order_{name}(order, discount):\n    total = sum(item.price for item in order.{name})\n"
    f"    return total * (1 - discount_for_{name}(discount))\n"
    for name in ("items", "returns", "gifts", "samples")
)
USES = """from shapes import Rectangle, largest_rectangle


def draw(canvas):
    rectangle = Rectangle(1, 2)
    """


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "project"
    root.mkdir()
    (root / "shapes.py").write_text(SHAPES)
    (root / "orders.py").write_text(ORDERS)
    return root


@pytest.fixture
def make():
    made = []

    def make(*folders, **settings):
        settings = {"context": ("imports", "open", "repository"), "context_tokens": 400} | settings
        context = ContextCollector(Settings(**settings))
        context.open_folders([(folder.name, folder) for folder in folders])
        made.append(context)
        if context.indexer is not None:
            assert context.indexer.scanned.wait(60)
        return context

    yield make
    for context in made:
        context.close()


def document(path, text, version=0):
    return Document.open(path.as_uri(), "python", version, text)


def at_end(document):
    return Snapshot(document, Point(len(document.lines) - 1, len(document.lines[-1])))


def sources(collected):
    return [(snippet.source, snippet.path) for snippet in collected.snippets]


def test_definitions_of_what_is_imported_and_used_are_found(root, make):
    collected = make(root).collect(at_end(document(root / "main.py", USES)))
    assert (ContextSource.IMPORTS, "shapes.py") in sources(collected)
    text = "\n".join(snippet.text for snippet in collected.snippets)
    assert "class Rectangle:\n    def __init__(self, width, height):\n    def area(self):" in text
    assert (collected.repository, collected.path) == ("project", "main.py")


def test_code_like_that_around_the_cursor_is_found(root, make):
    text = (
        "def total_of_order_bonus(order, discount):\n    total = sum(item.price for item in order.all)\n    "
    )
    context = make(root, context=("repository",))
    collected = context.collect(at_end(document(root / "more.py", text)))
    assert set(sources(collected)) == {(ContextSource.REPOSITORY, "orders.py")}
    assert "discount_for_" in collected.snippets[-1].text


def test_nothing_that_stands_near_the_cursor_but_far_parts_of_the_document_itself(root, make):
    (root / "copy.py").write_text(ORDERS)
    context = make(root, context=("repository",))
    near = document(root / "orders.py", ORDERS)
    # The chunks of the file and of its copy are those that stand around the cursor.
    assert context.collect(at_end(near)).snippets == ()
    far = document(root / "orders.py", ORDERS + "\nx = 1\n" * 100 + "def total_of_order_items(order): ")
    # The second of two equal ones is left out.
    assert set(sources(context.collect(at_end(far)))) == {(ContextSource.OPEN, "orders.py")}


def test_without_a_folder_open_documents_are_context_and_no_file_is_read(root, make):
    context = make()
    context.opened(document(root / "shapes.py", SHAPES + "\n\ndef perimeter(rectangle):\n    return 4\n"))
    assert context.indexer.wait(60)
    text = "rectangle = largest_rectangle(rectangles)\nprint(rectangle.area(), perimeter(rectangle"
    collected = context.collect(at_end(document(root / "main.py", text)))
    assert set(sources(collected)) == {(ContextSource.OPEN, "shapes.py")}
    assert context.indexer._process is None


def test_an_open_document_counts_as_it_is_in_the_editor(root, make):
    context = make(root)
    shapes = document(root / "shapes.py", SHAPES)
    context.opened(shapes)
    edited = shapes.edit([Change(SHAPES.replace("largest", "smallest"))], 1, Encoding.UTF16)
    context.edited(shapes, edited)
    main = document(root / "main.py", "from shapes import smallest_rectangle\nbest = smallest_rectangle(")
    context.collect(at_end(main))
    assert context.indexer.wait(60)
    assert any("def smallest_rectangle" in one.text for one in context.collect(at_end(main)).snippets)
    # Closed without saving: the file's text counts again.
    context.closed(edited.uri)
    assert context.indexer.wait(60)
    assert context.indexer.index.define({"shapes", "smallest_rectangle"}) == []
    assert context.indexer.index.define({"shapes", "largest_rectangle"})


def test_files_that_change_are_read_again(root, make):
    context = make(root)
    index = context.indexer.index
    (root / "shapes.py").write_text("def triangle(a, b, c):\n    return a, b, c\n")
    (root / "orders.py").unlink()
    (root / "new.py").write_text("def new_function(a):\n    return a * 2 + 1\n")
    context.files_changed([(root / name).as_uri() for name in ("shapes.py", "orders.py", "new.py")])
    context.files_changed(["untitled:1", "file:///elsewhere/x.py", "file://host/x.py", ":"])
    assert context.indexer.wait(60)
    assert sorted(index.paths()) == ["new.py", "shapes.py"]
    assert index.define({"shapes", "largest_rectangle"}) == []
    assert [found.text for _, found in index.define({"shapes", "triangle"})] == ["def triangle(a, b, c):"]
    (root / ".gitignore").write_text("new.py\n")
    context.files_changed([(root / ".gitignore").as_uri()])
    assert context.indexer.wait(60)
    assert index.paths() == ["shapes.py"]


def test_several_folders_and_those_that_nobody_chose(root, make, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    (other / "shapes.py").write_text("def circle(radius):\n    return 3 * radius * radius\n")
    context = make(root, other)
    assert sorted(context.indexer.index.paths()) == ["orders.py", "other/shapes.py", "shapes.py"]
    (other / "shapes.py").unlink()
    context.files_changed([(other / "shapes.py").as_uri()])
    assert context.indexer.wait(60)
    assert sorted(context.indexer.index.paths()) == ["orders.py", "shapes.py"]
    monkeypatch.setenv("HOME", str(root))
    context.open_folders([("home", root), ("/", root.parents[-1])])
    assert context.indexer.folders == ()


def test_the_context_stays_while_the_user_works_at_one_place(root, make):
    context = make(root)
    text = USES + "\n".join(f"    canvas.line({number})" for number in range(200))
    main = document(root / "main.py", text)
    context.opened(main)
    first = context.collect(Snapshot(main, Point(6, 0)))
    assert first.snippets
    # If it were chosen again it would not be the same: the file that it comes from is gone.
    (root / "shapes.py").unlink()
    context.files_changed([(root / "shapes.py").as_uri()])
    assert context.indexer.wait(60)
    for line in range(6, 40):
        edited = main.edit([Change("x", (line, 0), (line, 0))], line, Encoding.UTF16)
        context.edited(main, edited)
        main = edited
        assert context.collect(Snapshot(main, Point(line, 1))) is first
    context.opened(document(root / "other.py", "x = 1\n"))
    assert context.indexer.wait(60)
    assert context.collect(Snapshot(main, Point(40, 0))) is not first


def test_the_context_is_renewed_early_where_nobody_waits(root, make):
    context = make(root)
    text = USES + "\n".join(f"    canvas.line({number})" for number in range(200))
    main = document(root / "main.py", text)
    first = context.collect(Snapshot(main, Point(6, 0)))
    assert not context.renew(Snapshot(main, Point(8, 0)))
    (root / "shapes.py").unlink()
    context.files_changed([(root / "shapes.py").as_uri()])
    assert context.indexer.wait(60)
    assert context.collect(Snapshot(main, Point(30, 0))) is first
    assert context.renew(Snapshot(main, Point(30, 0)))
    assert context.collect(Snapshot(main, Point(30, 0))) is not first
    assert not context.renew(Snapshot(main, Point(30, 0)))


def test_pieces_that_stay_keep_their_order(root, make):
    context = make(root, context=("repository",))
    main = document(root / "main.py", "total = total_of_order_items(order, discount)\nrectangle = Rectangle(")
    before = context.collect(at_end(main)).snippets
    context.opened(document(root / "x.py", "x = 1\n"))
    more = "rectangles = [largest_rectangle(rectangles)]\n" * 3 + "discount_for_gifts(discount, order.gifts"
    after = context.collect(at_end(document(root / "main.py", more))).snippets
    stayed = [snippet for snippet in before if snippet in after]
    assert list(after[: len(stayed)]) == stayed


def test_recent_edits_are_context_as_diffs(root, make):
    context = make(root, context=("edits",))
    shapes = document(root / "shapes.py", SHAPES)
    context.opened(shapes)
    line = SHAPES.split("\n").index("        return self.width * self.height")
    for version, char in enumerate(" + 0"):
        column = len("        return self.width * self.height") + version
        edited = shapes.edit([Change(char, (line, column), (line, column))], version + 1, Encoding.UTF16)
        context.edited(shapes, edited)
        shapes = edited
    (snippet,) = context.collect(at_end(document(root / "main.py", "x = "))).snippets
    assert snippet == Snippet(
        ContextSource.EDITS,
        "shapes.py.diff",
        "-        return self.width * self.height\n+        return self.width * self.height + 0",
    )
    # In its own document an edit can be seen as it is.
    assert context.collect(at_end(shapes)).snippets == ()


def test_switched_off_nothing_is_read_or_given(root, make):
    for settings in ({"context": ()}, {}):
        context = make(root, **settings)
        if not settings:
            context.configure(context.settings.model_copy(update={"context": ()}))
        context.opened(document(root / "shapes.py", SHAPES))
        assert context.indexer is None
        assert context.collect(at_end(document(root / "main.py", USES))) is EMPTY_BUNDLE


def test_an_index_that_was_changed_in_pieces_equals_a_new_one():
    rng = random.Random(4)
    texts = [f"def f{n}(a):\n    return a.b{n % 7} + c{n % 5}\n\n\n" for n in range(30)]
    index, files = RepositoryIndex(), {}
    for _ in range(120):
        path = f"p{rng.randrange(12)}.py"
        if rng.random() < 0.3:
            files.pop(path, None)
            index.remove(path)
        else:
            files[path] = "".join(rng.sample(texts, 5))
            index.add(path, parse(to_source_file(path, files[path])))
    index.commit()
    fresh = RepositoryIndex()
    for path, text in files.items():
        fresh.add(path, parse(to_source_file(path, text)))
    fresh.commit()
    assert (index.num_files, index.num_chunks) == (fresh.num_files, fresh.num_chunks)
    for number in range(30):
        query = [f"a.b{number % 7} + c{number % 5} f{number}"]
        found, expected = (
            {(piece.path, piece.line, piece.text) for piece in one.search(query, 1_000)}
            for one in (index, fresh)
        )
        assert found == expected
        assert index.define({f"f{number}", "p3"}) == fresh.define({f"f{number}", "p3"})


def test_a_word_that_is_rare_counts_for_more_than_many_that_stand_everywhere():
    everywhere = " + ".join(f"common{number}" for number in range(40))
    index = RepositoryIndex()
    for number in range(300):
        index.add(f"p{number}.py", parse(to_source_file(f"p{number}.py", f"value = {everywhere}\n")))
    index.add("rare.py", parse(to_source_file("rare.py", f"value = {everywhere} + wanted\n")))
    index.commit()
    # The common words stand nearer to the cursor, the last line.
    found = index.search(["wanted\n", f"other = {everywhere}\n"], 1)
    assert [piece.path for piece in found] == ["rare.py"]


def test_a_scan_that_is_interrupted_leaves_the_server_alone(root):
    for _ in range(3):
        indexer = Indexer([Folder("", root)], ())
        indexer.close()
        indexer.close()


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:///a/b%20c.py", "/a/b c.py"),
        ("file://localhost/a.py", "/a.py"),
        ("file://host/a.py", None),
        ("untitled:a.py", None),
        ("file:a.py", None),
        ("file:///a%00.py", None),
        ("file://[/a.py", None),
        ("", None),
    ],
)
def test_paths_of_uris(uri, path):
    found = file_of(uri)
    assert (found.as_posix() if found else None) == path


# In the prompt

COLLECTED = ContextBundle(
    (
        Snippet(ContextSource.IMPORTS, "a/b.py", "def f(x):"),
        Snippet(ContextSource.OPEN, "c.py", "y = 1\nz = 2"),
    ),
    "main.py",
    "project",
)


class WithMarks(CharTokenizer):
    """Knows the marks of every family as single tokens beyond Unicode."""

    marks = sorted({name for family in FAMILIES.values() for name in (*family.file_marks, *family.sentinels)})

    def token_id(self, name):
        return 0x200000 + self.marks.index(name) if name in self.marks else None

    def decode(self, ids):
        return "".join(self.marks[id_ - 0x200000] if id_ >= 0x200000 else chr(id_) for id_ in ids)


def written(family, budget=10_000, language="python"):
    renderer = ContextRenderer(FAMILIES[family], WithMarks())
    parts = renderer.render(Document.open("file:///main.py", language, 0, ""), COLLECTED, budget)
    return [
        WithMarks().decode([id_ for _, ids in part for id_ in ids])
        for part in (parts.at_start, parts.in_prefix)
    ]


def test_context_takes_the_form_that_the_family_was_trained_with():
    assert written("qwen2.5-coder") == [
        "<|repo_name|>project\n<|file_sep|>a/b.py\ndef f(x):\n<|file_sep|>c.py\ny = 1\nz = 2\n"
        "<|file_sep|>main.py\n",
        "",
    ]
    assert written("deepseek-coder") == ["#a/b.py\ndef f(x):\n#c.py\ny = 1\nz = 2\n#main.py\n", ""]
    comments = ["# a/b.py:\n# def f(x):\n# c.py:\n# y = 1\n# z = 2\n", "// c.py:\n// y = 1\n// z = 2\n"]
    assert written("santacoder") == ["", comments[0]]
    assert written("santacoder", budget=40, language="go") == ["", comments[1]]


def test_the_budget_keeps_the_best_and_counts_everything():
    whole = len(written("qwen2.5-coder")[0])
    for budget in range(0, whole + 60, 3):
        renderer = ContextRenderer(FAMILIES["qwen2.5-coder"], WithMarks())
        parts = renderer.render(Document.open("file:///main.py", "python", 0, ""), COLLECTED, budget)
        assert parts.num_tokens <= budget
        names = [name for name, _ in parts.at_start if name.startswith("context")]
        assert not names or names[-1] == "context: open" or "y = 1" in written("qwen2.5-coder", budget)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_with_the_hole_is_the_same_with_context_and_without(family):
    model = ModelInfo("m", family, "qwen2", 10_000, WithMarks(), "cpu", "script")
    builder = PromptBuilder(model, Settings(), (family, FAMILIES[family]))
    snapshot = at_end(Document.open("file:///main.py", "python", 0, "a = 1\nb = 2\nprint("))
    plain, more = builder.build(snapshot), builder.build(snapshot, COLLECTED)
    without = [
        segment for segment in more.segments if not segment[0].startswith(("context", "repository", "path"))
    ]
    assert without == list(plain.segments)
    assert sum(size for _, size in more.segments) == len(more.tokens)
    assert more.forced_prefix == plain.forced_prefix
    text = WithMarks().decode(more.tokens)
    assert text.count("y = 1") == text.count("def f(x):") == 1
    assert text.index("y = 1") < text.index("b = 2")
    bos = FAMILIES[family].bos
    assert not bos or (text.startswith(bos) and text.count(bos) == 1)


def test_while_the_context_stays_its_tokens_do():
    model = ModelInfo("m", "qwen2.5-coder", "qwen2", 10_000, WithMarks(), "cpu", "script")
    builder = PromptBuilder(model, Settings(), ("qwen2.5-coder", FAMILIES["qwen2.5-coder"]))
    main = Document.open("file:///main.py", "python", 0, "a = 1\nb = 2\nprint(")
    before = builder.build(at_end(main), COLLECTED).tokens
    for version, char in enumerate("value + "):
        end = (2, len(main.lines[2]))
        main = main.edit([Change(char, end, end)], version, Encoding.UTF16)
        after = builder.build(at_end(main), COLLECTED).tokens
        same = next((n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
        assert same >= len(before) - 12
        before = after


# Secrets


def test_a_planted_secret_is_in_none_of_a_thousand_prompts(root, make):
    """In files of the workspace, in open documents, in recent edits; certain ones and possible ones."""
    rng = random.Random()
    kinds = certain(rng) | possible(rng)
    secrets = {secret: kind for kind, (_, secret) in kinds.items()}
    code = "def connect_{n}(client, retries):\n    session = client.open_session(retries, {n})\n"
    code += "    return session\n"
    for number, (line, _) in enumerate(kinds.values()):
        text = f"{code.format(n=number)}\n\nclass Client_{number}:\n    def login(self):\n"
        text += f"    {line}\n        pass\n"
        (root / f"service_{number}.py").write_text(text)
        (root / f"clean_{number}.py").write_text(code.format(n=f"clean_{number}"))
    (root / ".env").write_text("\n".join(line for line, _ in kinds.values()))
    context = make(root, context=("imports", "open", "repository", "edits"))
    model = ModelInfo("m", "qwen2.5-coder", "qwen2", 100_000, CharTokenizer(), "cpu", "script")
    builder = PromptBuilder(model, Settings(context_tokens=2_000))
    main = document(root / "main.py", "")
    num_with_context = 0
    for count in range(1_000):
        number = rng.randrange(len(kinds))
        line, _ = list(kinds.values())[number]
        if count % 10 == 0:
            # Another document is opened, or a secret is typed into one.
            other = document(root / f"other_{count % 70}.py", f"x = 1\n{code.format(n=count)}\n")
            context.opened(other)
            for text in (line, f"\nretries = {count}\n"):
                edited = other.edit([Change(text, (1, 0), (1, 0))], count, Encoding.UTF16)
                context.edited(other, edited)
                other = edited
            if count % 100 == 0:
                assert context.indexer.wait(60)
        text = (
            f"from service_{number} import Client_{number}, connect_{number}\n\n\ndef run(client, retries):\n"
        )
        text += f"    c = Client_{number}()\n    session = client.open_session(retries, {rng.randrange(99)}"
        main = document(root / "main.py", text, count)
        context._frozen.clear()
        collected = context.collect(at_end(main))
        prompt = CharTokenizer().decode(builder.build(at_end(main), collected).tokens)
        num_with_context += bool(collected.snippets)
        assert not [kind for secret, kind in secrets.items() if secret in prompt]
    # The test would show nothing if there were nothing to be seen.
    assert num_with_context > 900
