"""What an editor is told of a verdict. Training itself is in tests/lsp/test_train_command.py."""

import pytest

from midfill.errors import AdapterError
from midfill.lsp.train_command import AdapterTraining

RESULT = {"adapter": "mine", "verdict": "enabled", "reasons": [], "commits": 24, "nll_gain": 0.123}


class Person:
    """An editor whose user gives one answer."""

    def __init__(self, answer):
        self.answer = answer
        self.heard = []

    def show_info(self, sentence):
        self.heard.append(("info", sentence))

    def show_error(self, sentence):
        self.heard.append(("error", sentence))

    async def ask(self, question, answers):
        self.heard.append((question, answers))
        return self.answer


@pytest.mark.parametrize(("answer", "used"), [("Use it", ["mine"]), ("Do not use it", []), (None, [])])
async def test_a_better_adapter_is_used_if_the_user_says_so(answer, used):
    person, names = Person(answer), []

    async def use(name):
        names.append(name)

    await AdapterTraining(person, use)._show_verdict(RESULT)
    assert names == used
    [(question, _)] = person.heard
    assert "mine is better than its base model on 24 later commits (log-loss lower by 0.123" in question


async def test_a_rejected_adapter_is_not_offered():
    person = Person("Use it")
    await AdapterTraining(person, None)._show_verdict(
        RESULT | {"verdict": "rejected", "reasons": ["It was worse."]}
    )
    assert person.heard == [
        ("info", "The adapter mine has the verdict 'rejected' and is not used. It was worse."),
    ]


async def test_what_goes_wrong_with_using_it_is_said():
    async def use(_):
        raise AdapterError("It is gone.")

    person = Person("Use it")
    await AdapterTraining(person, use)._show_verdict(RESULT)
    assert person.heard[-1] == ("error", "It is gone.")
