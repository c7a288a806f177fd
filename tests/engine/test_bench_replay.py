"""A typist's replay in a time of its own: what is counted, however busy the machine is."""

from clock import in_its_own_time

from midfill.bench.backends import PipelineBackend
from midfill.bench.replay import Pace, replay
from midfill.bench.replay_report import summarise
from midfill.bench.trace import Key, TypingSession
from midfill.engine.scripted import Rule, Script, ScriptedEngine
from midfill.fim.templates import FAMILIES
from midfill.settings import Settings
from midfill.text.documents import Change

TYPED, SUGGESTED = "total = sum(values)", " sum(values)"
RULES = (Rule(after="total =", text=SUGGESTED), Rule(text="zzz"))
EACH_S = 0.3


def recorded():
    """TYPED, a key every `EACH_S`, and a request 50 ms after each."""
    keys = [
        Key(EACH_S, (Change(char, (1, column), (1, column)),), (1, column + 1), 0.05)
        for column, char in enumerate(TYPED)
    ]
    return TypingSession("file:///replay/main.py", "python", "values = [1, 2]\n\n", tuple(keys), 0.5)


async def played(*rules, pace=None):
    """The figures of one session."""
    engine = ScriptedEngine(Script(list(rules)))
    await engine.start(lambda _message, _share: None)
    # A token is a character here.
    settings = Settings(prefetch=False, max_new_tokens=64)
    typist = PipelineBackend(engine, ("qwen2.5-coder", FAMILIES["qwen2.5-coder"]), settings)
    (session,) = await replay([recorded()], [typist], lambda _message, _share: None, pace)
    await engine.close()
    return summarise(session)


@in_its_own_time
async def test_a_right_suggestion_is_accepted_and_its_keys_are_saved():
    found = await played(*RULES)
    assert found["outcomes"]["accepted"] == 1
    assert found["keys"] == len(TYPED)
    assert found["keystrokes_saved"] == len(SUGGESTED) - 1
    assert found["requests"] == len("total =") + 1
    assert found["outcomes"]["shown"] == len("total =")
    assert found["cancelled_share"] == 0
    # Those of what was accepted are neither wasted nor unaccepted.
    used = found["generated_tokens"] - found["wasted_tokens"] - found["unaccepted_tokens"]
    assert used >= len(SUGGESTED)


@in_its_own_time
async def test_a_suggestion_that_is_typed_through_asks_the_model_nothing():
    found = await played(*RULES, pace=Pace(accepts=False))
    assert found["outcomes"]["accepted"] == found["keystrokes_saved"] == 0
    assert found["requests"] == found["outcomes"]["shown"] == len(TYPED)
    inside = found["inside_right_suggestion"]
    assert inside["requests"] == len(SUGGESTED) - 1
    assert found["sources"]["typed-through"] == inside["requests"]
    assert inside["share_without_model"] == 1.0
