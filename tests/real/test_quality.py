"""Small fixed samples of both evaluations with the default model: they fail when quality has dropped.

The bounds come from server/docs/experiments/019-evaluations-in-ci.md.
"""

from pathlib import Path

import pytest
import pytest_asyncio

from midfill.cli.engine_choice import engine_factory
from midfill.completion.confidence import Eagerness
from midfill.evaluation import holes, infilling, infilling_tasks, repository, sandbox
from midfill.evaluation.fillers import PipelineFiller
from midfill.evaluation.records import Records
from midfill.settings import Settings

TASKS = Path(__file__).parents[3] / "shared" / "data" / "infilling" / "dev-tasks.jsonl.gz"
REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Whether they passed on the day that the bound was set.
PASSED = {
    "SingleLineInfilling/HumanEval/0/L7": True,
    "SingleLineInfilling/HumanEval/66/L1": True,
    "SingleLineInfilling/HumanEval/72/L9": True,
    "SingleLineInfilling/HumanEval/47/L0": True,
    "SingleLineInfilling/HumanEval/81/L17": True,
    "MultiLineInfilling/HumanEval/142/L5_L5": True,
    "MultiLineInfilling/HumanEval/22/L0_L0": True,
    "MultiLineInfilling/HumanEval/103/L2_L4": True,
    "MultiLineInfilling/HumanEval/84/L0_L0": False,
    "RandomSpanInfilling/HumanEval/125/2": False,
    "RandomSpanInfilling/HumanEval/48/7": False,
    "RandomSpanInfilling/HumanEval/33/5": False,
    "SantaCoderJs/HumanEval/154/L21": True,
    "SantaCoderJs/HumanEval/102/L14": False,
    "SantaCoderJava/HumanEval/48/L27": True,
    "SantaCoderJava/HumanEval/66/L27": True,
}
# Two runs gave the same texts, letter for letter; another way of cutting prompts into chunks changed 1 task
# of 98. At that rate three of these sixteen get worse in fewer than one of a thousand harmless changes.
NOISE = 2

# The holes change with our source, so the bound is on their mean similarity: 0.35 in 41 of them, and of 15
# drawn from these below 0.20 in one of two hundred samples. Answers to other holes would have 0.16.
NUM_HOLES = 18
LEAST_SIMILARITY = 0.20


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(model):
    it = engine_factory(None)(Settings(model=model.name))
    await it.start(lambda _message, _share: None)
    yield it
    await it.close()


def filler(engine, **settings):
    return PipelineFiller(engine, Settings(model=engine.model.name, deadline_s=120.0, **settings))


async def test_infilling_has_not_dropped(engine):
    if not TASKS.exists():
        pytest.skip(f"the infilling tasks of ../shared are not here: {TASKS}")
    tasks = [
        task
        for task in infilling_tasks.read_tasks(TASKS)
        if task.id in PASSED and sandbox.missing(task.language) is None
    ]
    records = Records(None, {})
    await infilling.evaluate(tasks, filler(engine), records, lambda _share: None)
    results = [infilling.Result(**row) for row in records.rows.values()]
    worse = [result.id for result in results if PASSED[result.id] and not result.passed]
    better = [result.id for result in results if result.passed and not PASSED[result.id]]
    assert len(worse) - len(better) <= NOISE, (worse, better)
    summary = infilling.summarise(results)
    assert summary["sentinels"] == 0
    assert summary["repeat_next_line"] == 0


async def test_our_own_source_is_filled(engine):
    samples = holes.choose(REPOSITORY, Settings(), count=NUM_HOLES, seed=0, places="line-ends")
    records = Records(None, {})
    await repository.evaluate(samples, filler(engine, eagerness="always"), records, lambda _share: None)
    results = [repository.read_result(row) for row in records.rows.values()]
    summary = repository.summarise(results, Eagerness.ALWAYS)
    assert summary["similarity"]["all"] >= LEAST_SIMILARITY, summary
    # The gate neither shows nor hides everything.
    assert 0 < summary["by_eagerness"]["normal"]["shown"] < 1, summary
