"""Every promise of SECURITY.md names tests that there are."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (\d+) \| (.+) \| (.+) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/\S+\.py)::(\w+)`")


def test_every_promise_is_held_by_tests_that_there_are():
    rows = ROW.findall((ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert [int(number) for number, _, _ in rows] == list(range(1, len(rows) + 1))
    missing = []
    for number, _, held_by in rows:
        tests = TEST.findall(held_by)
        assert tests, f"promise {number} is held by nothing"
        assert TEST.sub("", held_by).strip(" ,") == "", f"promise {number} names something else"
        for file, name in tests:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            functions = {
                node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            }
            if name not in functions:
                missing.append(f"{number}: {file}::{name}")
    assert not missing
