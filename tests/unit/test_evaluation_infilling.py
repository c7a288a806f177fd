import gzip
import json
import os
import shutil
import socket

import pytest

from midfill.engine.scripted import Rule, Script, ScriptedEngine
from midfill.errors import MidfillError
from midfill.evaluation import sandbox
from midfill.evaluation.fillers import Filled, PipelineFiller, RawFiller
from midfill.evaluation.infilling import Result, compare, describe, evaluate, repeats_next_line, summarise
from midfill.evaluation.infilling_tasks import Task, read_tasks, runnable, sample
from midfill.evaluation.records import Records, read
from midfill.settings import Settings

pytestmark = pytest.mark.programs

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


def result(id_, passed, **more):
    values = {"sentinel": False, "repeats_next_line": False, "reason": None, "latency_ms": 1.0} | more
    values = {"exact": False, "line_0": False, "language": "python", "text": "x", "similarity": 0.5} | values
    return Result(id_, passed=passed, **values)


async def scripted(*rules):
    engine = ScriptedEngine(Script(list(rules)))
    await engine.start(lambda _message, _share: None)
    return engine


async def passes(task, text):
    return await task.passes(text)


async def test_the_truth_passes_and_nothing_fails(tasks):
    for task in tasks:
        if (why := sandbox.missing(task.language)) is not None:
            pytest.skip(why)
        assert await passes(task, task.truth)
        assert not await passes(task, "")


async def test_a_program_that_does_not_end_is_ended(tasks, monkeypatch):
    monkeypatch.setattr(sandbox, "_WALL_S", 0.5)
    assert not await passes(tasks[0], "    while True: pass")


async def test_what_a_program_starts_ends_with_it(tasks, tmp_path):
    if not sandbox.isolation():
        pytest.skip("`unshare` cannot make namespaces here")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # Opened for both, so that neither open waits; the child holds the writing end as long as it lives.
    end = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    child = f"file = open({str(fifo)!r}, 'w'); print('open', flush=True); import time; time.sleep(60)"
    start = f"    import subprocess, sys\n    child = subprocess.Popen([sys.executable, '-c', {child!r}], "
    start += "start_new_session=True, stdout=subprocess.PIPE)\n    child.stdout.readline()\n"
    assert await passes(tasks[0], start + "    return a + b")
    # No writer is left: reading gives the end of the file, not "try again".
    assert os.read(end, 1) == b""
    os.close(end)


async def test_a_program_cannot_take_all_memory(tasks):
    assert not await passes(tasks[0], "    bytearray(4 << 30)\n    return a + b")
    assert await passes(tasks[0], "    bytearray(1 << 20)\n    return a + b")


async def test_a_program_cannot_write_large_files_but_print_what_nobody_reads(tasks):
    assert await passes(tasks[0], "    print('x' * (4 << 20))\n    return a + b")
    for size, passed in ((1 << 19, True), (2 << 20, False)):
        write = f"    with open('out', 'wb') as out:\n        out.write(bytes({size}))\n    return a + b"
        assert await passes(tasks[0], write) is passed


async def test_a_program_does_not_see_our_environment(tasks, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    assert await passes(tasks[0], "    import os\n    assert 'SECRET' not in os.environ\n    return a + b")


async def test_a_program_has_no_network(tasks):
    if not sandbox.isolation():
        pytest.skip("`unshare` cannot make namespaces here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 1).close()
        connect = (
            f"    import socket\n    socket.create_connection(('127.0.0.1', {port}), 1)\n    return a + b"
        )
        assert not await passes(tasks[0], connect)


def test_languages_that_cannot_be_run_are_left_out_and_said(tasks, monkeypatch):
    monkeypatch.setenv("PATH", "")
    left, skipped = runnable(tasks)
    assert [task.language for task in left] == ["python"]
    assert skipped == {"javascript": "`node` is not on the PATH."}
    with pytest.raises(MidfillError, match="node"):
        runnable(tasks[1:])
    assert shutil.which("java") is None
    assert "JDK" in sandbox.missing("java")


async def test_tasks_go_through_the_pipeline_and_resume(tasks, tmp_path):
    filler = PipelineFiller(await scripted(Rule("    return a + b\n\n\n\n\nx = 1")), Settings())
    path = tmp_path / "results.jsonl"
    header = {"eval": "infilling", "model": "scripted"}
    first = Records(path, header)
    await evaluate(tasks, filler, first, lambda _share: None)
    assert [(row["passed"], row["exact"]) for row in first.rows.values()] == [(True, True), (True, False)]
    # A run that was killed leaves half a line.
    path.write_text(path.read_text() + '{"id": "Si')
    again = Records(path, header)
    assert again.rows == first.rows

    class Never:
        async def fill(self, hole, _trigger):
            raise AssertionError(hole)

    shares = []
    await evaluate(tasks, Never(), again, shares.append)
    assert shares == [0.5, 1.0]
    again.keep({"id": "late"})
    assert list(read(path)[1]) == [*first.rows, "late"]
    with pytest.raises(MidfillError, match=r"model = 'scripted', but this run has 'other'"):
        Records(path, header | {"model": "other"})


async def test_the_raw_model_is_not_stopped(tasks):
    rule = Rule("    return a + b\n\n\n\nx = 1", logprob=-0.1)
    filler = RawFiller(await scripted(rule), Settings(max_new_tokens=64))
    filled = await filler.fill(tasks[0].hole, None)
    assert filled.text == "    return a + b\n\n\n\nx = 1"
    assert len(filled.tokens) == len(filled.text)
    assert filled.finished


async def test_what_perfect_stop_rules_would_make_of_a_text_is_tested(tasks):
    class Rambling:
        async def fill(self, hole, _trigger):
            return Filled("    return a + b\n    nonsense(" if hole.language == "python" else "  wrong();")

    records = Records(None, {})
    await evaluate(tasks, Rambling(), records, lambda _share: None, cut=True)
    summary = summarise([Result(**row) for row in records.rows.values()])
    assert summary["pass@1"] == {"Single": 0.0, "Js": 0.0, "all": 0.0}
    assert summary["pass@1_when_cut"] == {"Single": 1.0, "Js": 0.0, "all": 0.5}


async def test_sentinels_and_repeated_lines_are_counted(tasks):
    class Fixed:
        async def fill(self, _hole, _trigger):
            return Filled("<|fim_middle|>\n}", None)

    records = Records(None, {})
    await evaluate(tasks, Fixed(), records, lambda _share: None)
    summary = summarise([Result(**row) for row in records.rows.values()])
    assert (summary["sentinels"], summary["repeat_next_line"]) == (2, 1)


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("    a = 1\n    return a", True),
        ("    return a", True),
        ("    return a + 1", False),
        ("return a", False),
    ],
)
def test_the_next_line_is_repeated(text, repeats):
    task = Task("A/1", "python", "def f(a):\n", "\n\n    return a\n", "    a += 1")
    assert repeats_next_line(task, text) is repeats


def test_a_line_that_stands_twice_by_right_is_no_repetition():
    task = Task("A/1", "python", "def f(a):\n", "\n    a += 1\n", "    a += 1")
    assert not repeats_next_line(task, "    a += 1")


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
    assert list(summary["pass@1"])[-1] == "all"
    text = describe(summary | {"model": "m", "skipped": {"java": "No JDK."}, "network": True})
    assert "66.7%" in text
    assert "skipped, java: No JDK." in text


def test_shares_are_also_by_language_and_untested_tasks_do_not_count_as_failures():
    results = [
        result("A/1", True, line_0=True),
        result("A/2", None, language="cpp", line_0=True, text="", reason="model-silent"),
        result("B/1", None, language="cpp"),
    ]
    summary = summarise(results)
    assert summary["pass@1"] == {"A": 1.0, "A, python": 1.0, "A, cpp": None, "B": None, "all": 1.0}
    assert summary["line_0"] == {"A": 1.0, "A, python": 1.0, "A, cpp": 1.0, "B": 0.0, "all": 0.6667}
    assert summary["empty_reasons"] == {name: {"model-silent": 1} for name in ("A", "A, cpp", "all")}
    text = describe(summary | {"model": "m", "skipped": {}, "network": False})
    assert "empty, A, cpp: model-silent 1" in text
    [row] = [line for line in text.splitlines() if line.startswith("B ")]
    assert row.split() == ["B", "-", "0.0%", "0.0%", "50.0%", "0.0%"]


SUMS = "import sys\nfor line in sys.stdin:\n    "
CPP = "#include <iostream>\r\nint main() {\r\n  int a, b;\r\n  std::cin >> a >> b;\r\n"


@pytest.mark.parametrize(
    ("language", "prompt", "solution", "wrong"),
    [
        ("python", SUMS, "print(sum(map(int, line.split())))", "print(3)"),
        ("cpp", CPP, "  std::cout << a + b << std::endl;\r\n", "  std::cout << 3;"),
        ("cpp", CPP, "  std::cout << a + b;\r\n", "  does not compile"),
    ],
)
async def test_programs_are_tested_by_what_they_print(tmp_path, language, prompt, solution, wrong):
    if (why := sandbox.missing(language)) is not None:
        pytest.skip(why)
    io_tests = [
        {"input": "1 2\n", "output": ["4", "3  \n\n"]},
        {"input": "2 3\n", "output": ["5"]},
    ]
    row = {"task_id": "Io/1", "language": language, "prompt": prompt, "canonical_solution": solution}
    row |= {"suffix": "}\n" if language == "cpp" else "\n", "io_tests": io_tests}
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(row))
    [task] = read_tasks(path)
    assert await task.passes(task.truth) is True
    assert await task.passes(wrong) is False
    assert "\r" not in task.truth
    assert task.hole.cursor.column == (0 if language == "cpp" else 4)


async def test_tasks_without_tests_are_filled_and_compared_with_the_original(tmp_path, monkeypatch):
    rows = [
        {"task_id": f"Dev/{n}", "language": "c_sharp", "prompt": "var a = ", "suffix": ";\n"}
        | {"canonical_solution": truth}
        for n, truth in enumerate(("new List<int>()", "new List<int>().ToArray()", "null"))
    ]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("PATH", "")
    left, skipped = runnable(read_tasks(path))
    assert (len(left), skipped) == (3, {})

    class Fixed:
        async def fill(self, hole, _trigger):
            assert hole.language == "csharp"
            return Filled("new List<int>()\n// more")

    records = Records(None, {})
    await evaluate(left, Fixed(), records, lambda _share: None, cut=True)
    found = list(records.rows.values())
    assert [(one["passed"], one["passed_when_cut"]) for one in found] == [(None, None)] * 3
    assert [(one["exact"], one["line_0"], one["exact_when_cut"]) for one in found] == [
        (False, True, True),
        (False, False, False),
        (False, False, False),
    ]


def test_runs_are_compared_in_pairs():
    ours = [result(f"A/{n}", n < 9) for n in range(10)]
    theirs = {f"A/{n}": {"passed": n in (0, 9)} for n in range(10)}
    compared = compare([*ours, result("A/10", None)], theirs | {"A/10": {"passed": True, "line_0": True}})
    # 8 better, 1 worse: the exact two-sided binomial of 1 in 9 is 20 / 512.
    assert compared.pop("line_0") == {"tasks": 1, "better": 0, "worse": 1, "p": 1.0}
    assert compared == {"tasks": 10, "better": 8, "worse": 1, "p": 0.0391}


def test_a_sample_is_even_and_always_the_same(tasks):
    assert sample(tasks * 5, 4) == sample(tasks * 5, 4)
    assert {task.kind for task in sample(tasks * 5, 4)} == {"Single", "Js"}
