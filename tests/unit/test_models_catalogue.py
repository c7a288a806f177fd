import re
import subprocess
import sys

import pytest

from midfill.errors import ModelError
from midfill.models import catalogue

FAMILIES = {
    "starcoder",
    "starcoder2",
    "deepseek-coder",
    "qwen2.5-coder",
    "codegemma",
    "granite-code",
    "mellum",
    "seed-coder",
}

ENTRY = """
[[model]]
name = "a-model"
family = "starcoder"
license = "MIT"
parameters = 1
context = 1
memory_mb = 1
hub = "someone/a-model"
"""
WHEELS = """
[model.wheels]
holds = "a model"
package = "parts{n}"
version = "1"
member = "data/{n:02}.bin"
parts = 3
part_bytes = 10
total_bytes = 25
sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
"""


@pytest.mark.parametrize("entry", catalogue.entries().values(), ids=lambda entry: entry.name)
def test_every_entry_is_plausible(entry):
    assert entry.family in FAMILIES
    assert entry.license
    assert 100e6 < entry.parameters < 10e9
    assert entry.context >= 2048
    assert entry.parameters / 1e6 < entry.memory_mb < entry.parameters / 1e6 * 1.2 + 1000
    assert catalogue.is_hub_id(entry.hub)
    assert catalogue.lookup(entry.name) is entry
    assert catalogue.lookup(entry.hub.upper()) is entry


def test_the_models_that_the_issue_names_are_there():
    names = [
        "qwen2.5-coder-0.5b",
        "qwen2.5-coder-1.5b",
        "qwen2.5-coder-3b",
        "qwen2.5-coder-7b",
        "tiny-starcoder-py",
        "starcoderbase-1b",
        "starcoderbase-3b",
        "starcoderbase-7b",
        "starcoder2-3b",
        "deepseek-coder-1.3b",
        "codegemma-2b",
        "granite-3b-code",
        "mellum-4b",
        "seed-coder-8b",
    ]
    assert set(names) <= set(catalogue.entries())
    assert catalogue.DEFAULT in catalogue.entries()


def test_the_pinned_files_are_those_of_the_issue():
    pins = {entry.name: entry.wheels for entry in catalogue.entries().values() if entry.wheels}
    assert {name: pin.sha256 for name, pin in pins.items()} == {
        "qwen2.5-coder-0.5b": "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "qwen2.5-coder-1.5b": "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    }
    for pin in pins.values():
        assert sum(pin.size_of(part) for part in range(1, pin.parts + 1)) == pin.total_bytes
        assert "apache" in catalogue.lookup("qwen2.5-coder-0.5b").license.lower()


def test_a_good_catalogue_is_read():
    entry = catalogue.parse(ENTRY + WHEELS)["a-model"]
    assert not entry.gated
    assert [entry.wheels.size_of(part) for part in (1, 2, 3)] == [10, 10, 5]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("[[model]]", "[[model", "not valid TOML"),
        ('license = "MIT"\n', "", "no 'license'"),
        ('license = "MIT"', 'license = "MIT"\nlicence = "MIT"', "unknown key 'licence'"),
        ("parameters = 1", 'parameters = "1"', "not of type int"),
        ("parameters = 1", "parameters = true", "not of type int"),
        ("context = 1", "context = 0", "not positive"),
        ('name = "a-model"', 'name = "A model"', "lower case"),
        ('hub = "someone/a-model"', 'hub = "a-model"', "owner/name"),
        ('hub = "someone/a-model"', 'hub = "../a-model"', "owner/name"),
        ("total_bytes = 25", "total_bytes = 31", "add up"),
        ("total_bytes = 25", "total_bytes = 20", "add up"),
        ('sha256 = "0', 'sha256 = "g', "hexadecimal"),
        ('package = "parts{n}"', 'package = "parts"', "the number of the part"),
        ("parts = 3\n", "", "wheels, has no 'parts'"),
    ],
)
def test_a_mistake_in_the_catalogue_is_named(old, new, complaint):
    text = ENTRY + WHEELS
    assert old in text
    with pytest.raises(ModelError, match=re.escape(complaint)):
        catalogue.parse(text.replace(old, new))


def test_a_name_may_not_be_there_twice():
    with pytest.raises(ModelError, match="twice"):
        catalogue.parse(ENTRY + ENTRY)


def test_listing_the_models_imports_nothing_heavy():
    heavy = ["torch", "transformers", "tokenizers", "huggingface_hub", "gguf", "numpy"]
    code = (
        "import sys; from midfill.models import catalogue, fetch, store; catalogue.entries();"
        f"store.installed(); print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
