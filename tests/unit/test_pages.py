"""What the pages, docstrings and comments name exists, and every link leads somewhere."""

import ast
import re
from pathlib import Path

import pytest
from test_architecture import modules

TOP = Path(__file__).parents[2]
DOCS = TOP / "server" / "docs"
PAGE = DOCS / "architecture.md"
# Pages that say how things are; an experiment says how they were on its day.
PAGES = [TOP / "README.md", TOP / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
EXPERIMENTS = sorted(path for path in (DOCS / "experiments").glob("*.md") if path.name != "README.md")
ALL_PAGES = [
    *TOP.glob("*.md"),
    *TOP.glob("server/**/*.md"),
    *(path for path in TOP.glob("clients/**/*.md") if "node_modules" not in path.parts),
]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = {path: ast.parse(path.read_text(encoding="utf-8")) for path in modules()}
TESTS = {path: ast.parse(path.read_text(encoding="utf-8")) for path in TOP.glob("tests/**/*.py")}
SCRIPTS = list(TOP.glob("clients/vscode/scripts/*.py"))
DEFINED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# Files of the user's, and of models and tools, which are no files of ours.
FOREIGN = {"config.toml", "feedback.json", "report.html", "languages.toml", "config.json", "filetype.lua"}


def names(trees, kinds=DEFINED):
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)}


def attributes(tree):
    """All that may stand behind a dot: what is defined and what is assigned."""
    found = {node.name for node in ast.walk(tree) if isinstance(node, DEFINED)}
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
        found |= {target.attr for target in targets if isinstance(target, ast.Attribute)}
    return found


def prose():
    """(where, text): the pages, and the docstrings and comments of each module."""
    for page in PAGES:
        yield page.relative_to(TOP).as_posix(), page.read_text(encoding="utf-8")
    for path, tree in CODE.items():
        documented = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, *DEFINED))]
        comments = re.findall(r"(?m)^\s*#(.*)$", path.read_text(encoding="utf-8"))
        yield path.name, "\n".join([*(ast.get_docstring(node) or "" for node in documented), *comments])


PROSE = list(prose())
NAMED_TESTS = names(TESTS.values(), (ast.FunctionDef, ast.AsyncFunctionDef))
ATTRIBUTES = {path: attributes(tree) for path, tree in CODE.items()}
MODULES = {path.stem for path in CODE} | {path.parent.name for path in CODE}


@pytest.mark.parametrize(("where", "text"), PROSE, ids=[where for where, _ in PROSE])
def test_paths_tests_and_functions_that_are_named_exist(where, text):
    missing = [
        path
        for path in re.findall(r"(?<![\w/.])((?:tests|server|clients)/[\w./-]*\w)", text)
        if not (TOP / path).exists()
    ]
    # A file of ours that is named without its folder, or with the last of its folders.
    missing += [
        path
        for path in re.findall(r"`((?!tests/|server/|clients/)(?:\w+/)*\w+\.py)`", text)
        if not any(f"/{have.as_posix()}".endswith(f"/{path}") for have in (*CODE, *TESTS, *SCRIPTS))
    ]
    for name in re.findall(r"\b(test_\w+(?:\.py|\*)?)", text):
        if name.endswith(".py"):
            found = any(path.name == name for path in TESTS)
        else:
            begin = name.removesuffix("*")
            found = (
                any(test.startswith(begin) for test in NAMED_TESTS) if "*" in name else begin in NAMED_TESTS
            )
            found = found or any(path.stem == begin for path in TESTS)
        missing += [] if found else [name]
    for dotted in re.findall(r"`([a-z_]\w*(?:\.[A-Za-z_]\w*)+)(?:\(\))?`", text):
        module, last = dotted.split(".")[0], dotted.split(".")[-1]
        if (
            module not in MODULES
            or dotted in FOREIGN
            or last == "py"
            or dotted.startswith(("midfill.", "tokenizer.ggml."))
        ):
            continue
        homes = [path for path in CODE if module in {path.stem, path.parent.name}]
        missing += [] if any(last in ATTRIBUTES[path] for path in homes) or last in MODULES else [dotted]
    assert missing == []


def test_what_is_called_with_brackets_in_the_pages_exists():
    known = names(CODE.values())
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        called = {name.split(".")[-1] for name in re.findall(r"`(?:midfill\.)?([a-z_][\w.]*)\(\)`", text)}
        assert called <= known


def test_nothing_tells_to_install_a_package_that_is_not_released():
    """Somebody else could take the name."""
    told = [
        f"{path.relative_to(TOP)}: {line.strip()}"
        for path in [*ALL_PAGES, *CODE]
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"pip install ['\"]?midfill", line)
    ]
    assert told == []


def anchors(page):
    """The anchors of a page's headings, as hosts of repositories make them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"(?m)^#+ (.*)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_of_a_page_leads_somewhere():
    dead = []
    for page in ALL_PAGES:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in LINK.findall(text):
            # A command of VS Code's walkthrough is no file.
            if re.match(r"https?:|command:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                dead.append(f"{page.relative_to(TOP)}: {link}")
    assert dead == []


def test_every_page_of_the_documentation_is_in_its_index():
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert {page.name for page in DOCS.glob("*.md")} - {"README.md"} <= set(LINK.findall(index))


def test_every_experiment_is_numbered_and_in_the_index():
    index = (DOCS / "experiments" / "README.md").read_text(encoding="utf-8")
    assert [path.name[:4] for path in EXPERIMENTS] == [f"{n:03d}-" for n in range(1, len(EXPERIMENTS) + 1)]
    rows = re.findall(r"(?m)^\| (\d{3}) \| \[(.+)\]\((.+)\) \| (.+?) \| (.*?) ?\|$", index)
    assert [row[2] for row in rows] == [path.name for path in EXPERIMENTS]
    for (number, title, _, date, lost), path in zip(rows, EXPERIMENTS, strict=True):
        text = " ".join(path.read_text(encoding="utf-8").split("\n## Record\n")[0].split())
        assert text.startswith(f"# {number} {title} - **Date:** {date} - **Question:** ")
        assert all(f"- **{what}:** " in text for what in ("Command", "Machine", "Decision"))
        assert text.endswith(f"- **From scripts that were not kept:** {lost}") == bool(lost)
        assert bool(lost) == ("not kept" in text)


def test_lines_of_the_pages_are_no_longer_than_a_window():
    """Rows of tables cannot be broken."""
    long = [
        f"{page.relative_to(TOP)}:{number}"
        for page in [*PAGES, *EXPERIMENTS, TOP / "server" / "CHANGELOG.md"]
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 120 and not line.lstrip().startswith("|")
    ]
    assert long == []
