import gzip
import json

import pytest

from midfill.engine.scripted import Rule, Script, ScriptedEngine
from midfill.errors import MidfillError
from midfill.evaluation import (
    Filler,
    Result,
    append_result,
    compare,
    evaluate,
    read_results,
    read_tasks,
    run_tests,
    sample,
    summarise,
)
from midfill.settings import Settings

ROW = {
    "task_id": "Single/1",
    "entry_point": "add",
    "prompt": "def add(a, b):\n",
    "suffix": "",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}
JS = {
    "task_id": "Js/1",
    "language": "js",
    "prompt": "function add(a, b) {\n",
    "suffix": "\n}\n",
    "canonical_solution": "  return a + b;",
    "test": "if (add(1, 2) !== 3) throw new Error();",
}


@pytest.fixture
def tasks(tmp_path):
    path = tmp_path / "tasks.jsonl.gz"
    with gzip.open(path, "wt") as out:
        out.writelines(json.dumps(row) + "\n" for row in (ROW, JS))
    return read_tasks(path)


def result(id_, passed):
    return Result(id_, "x", passed, exact=False, similarity=0.5, reason=None, latency_ms=1.0)


async def test_the_truth_passes_and_nothing_fails(tasks):
    for task in tasks:
        assert await run_tests(task, task.truth)
        assert not await run_tests(task, "")


async def test_a_program_that_does_not_end_is_ended(tasks, monkeypatch):
    monkeypatch.setattr("midfill.evaluation._TEST_S", 0.5)
    assert not await run_tests(tasks[0], "    while True: pass")


async def test_a_program_sees_neither_our_environment_nor_a_network(tasks, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    assert await run_tests(tasks[0], "    import os\n    assert 'SECRET' not in os.environ\n    return a + b")
    connect = "    import socket\n    socket.create_connection(('127.0.0.1', 9), 1)\n    return a + b"
    assert not await run_tests(tasks[0], connect)


async def test_tasks_go_through_the_pipeline_and_resume(tasks, tmp_path):
    engine = ScriptedEngine(Script([Rule("    return a + b\n\n\n\n\nx = 1")]))
    await engine.start(lambda _message, _share: None)
    filler = Filler(engine, Settings(), raw=False)
    path = tmp_path / "results.jsonl"
    first = await evaluate(tasks, filler, {}, lambda new: append_result(path, new))
    assert [(one.passed, one.exact) for one in first] == [(True, True), (True, False)]
    again = []
    done = {one.id: one for one in read_results(path)}
    assert await evaluate(tasks, filler, done, again.append) == first
    assert again == []


def test_a_file_that_holds_no_tasks_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"task_id": 1}\n')
    with pytest.raises(MidfillError, match=r"x\.jsonl, line 1"):
        read_tasks(path)
    with pytest.raises(MidfillError, match="Cannot read"):
        read_tasks(tmp_path / "none.jsonl")


def test_shares_are_by_kind():
    summary = summarise([result("A/1", True), result("A/2", False), result("B/1", True)])
    assert summary["pass@1"] == {"A": 0.5, "all": 0.6667, "B": 1.0}
    assert summary["tasks"] == 3


def test_runs_are_compared_in_pairs():
    ours = [result(f"A/{n}", n < 9) for n in range(10)]
    theirs = {f"A/{n}": result(f"A/{n}", n in (0, 9)) for n in range(10)}
    # 8 better, 1 worse: the exact two-sided binomial of 1 in 9 is 20 / 512.
    assert compare(ours, theirs) == {"tasks": 10, "better": 8, "worse": 1, "p": 0.0391}


def test_a_sample_is_even_and_always_the_same(tasks):
    assert sample(tasks * 5, 4) == sample(tasks * 5, 4)
    assert {task.kind for task in sample(tasks * 5, 4)} == {"Single", "Js"}
