"""What an editor is told of a verdict. Training itself is in tests/lsp/test_training.py."""

import pytest

from midfill.errors import AdapterError
from midfill.lsp.train_command import Training

RESULT = {"adapter": "mine", "verdict": "enabled", "reasons": [], "commits": 24, "nll_gain": 0.123}


class Person:
    """An editor whose user gives one answer."""

    def __init__(self, answer):
        self.answer = answer
        self.heard = []

    def say(self, sentence, *, failed=False):
        self.heard.append((sentence, failed))

    async def ask(self, question, answers):
        self.heard.append((question, answers))
        return self.answer


@pytest.mark.parametrize(("answer", "used"), [("Use it", ["mine"]), ("Do not use it", []), (None, [])])
async def test_a_better_adapter_is_used_if_the_user_says_so(answer, used):
    person, names = Person(answer), []

    async def use(name):
        names.append(name)

    await Training(person, use)._tell(RESULT)
    assert names == used
    [(question, _)] = person.heard
    assert "mine is better than its base on 24 later commits (gain +0.123" in question


async def test_a_rejected_adapter_is_not_offered():
    person = Person("Use it")
    await Training(person, None)._tell(RESULT | {"verdict": "rejected", "reasons": ["It was worse."]})
    assert person.heard == [
        ("The adapter mine was judged rejected and stays off. It was worse.", False),
    ]


async def test_what_goes_wrong_with_using_it_is_said():
    async def use(_):
        raise AdapterError("It is gone.")

    person = Person("Use it")
    await Training(person, use)._tell(RESULT)
    assert person.heard[-1] == ("It is gone.", True)
