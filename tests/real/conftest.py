import pytest

from midfill.client import SERVE_COMMAND, Client
from midfill.models import catalogue, fetch


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/real/" in item.nodeid:
            item.add_marker(pytest.mark.real)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def model():
    """The default model, fetched if it is not here. Without a network the error says what to do."""
    return fetch.pull(catalogue.DEFAULT, lambda _message, _share: None)


@pytest.fixture
async def server(model):
    """A server that has loaded the default model."""
    client = await Client.start([*SERVE_COMMAND])
    client.heard = []
    client.on_notification = lambda method, params: client.heard.append((method, params))
    await client.initialize()
    while not any(method == "$/progress" and p["value"]["kind"] == "end" for method, p in client.heard):
        await client.request("midfill/explain", {"textDocument": {"uri": "file:///ready"}})
    assert not [params for method, params in client.heard if method == "window/showMessage"]
    yield client
    await client.close()
