"""What the README, the page on architecture, docstrings and comments name exists."""

import ast
import re
from pathlib import Path

import pytest
from test_architecture import modules

TOP = Path(__file__).parents[2]
README, PAGE = (TOP / "README.md", TOP / "server" / "ARCHITECTURE.md")
CODE = {path: ast.parse(path.read_text(encoding="utf-8")) for path in modules()}
TESTS = {path: ast.parse(path.read_text(encoding="utf-8")) for path in TOP.glob("tests/**/*.py")}
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
    for page in (README, PAGE):
        yield page.name, page.read_text(encoding="utf-8")
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
    for page in (README, PAGE):
        text = page.read_text(encoding="utf-8")
        called = {name.split(".")[-1] for name in re.findall(r"`(?:midfill\.)?([a-z_][\w.]*)\(\)`", text)}
        assert called <= known


def test_nothing_tells_to_install_a_package_that_is_not_released():
    """Somebody else could take the name."""
    told = [
        f"{path.relative_to(TOP)}: {line.strip()}"
        for path in [README, PAGE, *CODE]
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"pip install ['\"]?midfill", line)
    ]
    assert told == []
