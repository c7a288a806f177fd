import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """An engine sets the number of torch's threads for the whole process, also for the tests after it.

    Two processes run tests, on two cores: threads that wait for each other would take ten times as long.
    """
    torch.set_num_threads(1)
