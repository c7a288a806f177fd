"""How many examples hypothesis draws: quick 50, default 300, nightly 2,000.

`HYPOTHESIS_PROFILE` names one; without it `pytest -m quick` draws the fewest, any other run the default.
"""

import os

from hypothesis import settings

NUM_EXAMPLES = {"quick": 50, "default": 300, "nightly": 2000}

for _name, _number in NUM_EXAMPLES.items():
    # How long one example takes is the machine's affair.
    settings.register_profile(_name, deadline=None, max_examples=_number)


def load(name):
    """Use the profile that the environment names, or else this one, for all tests imported from now on."""
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", name))


def examples(cost=1):
    """Return the number of examples of a test each of which takes `cost` times as long as a usual one."""
    return max(2, settings().max_examples // cost)
