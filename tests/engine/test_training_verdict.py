"""Honesty: an adapter that is not better where the repository went next is never enabled; a better one is."""

import json
import random
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from planted_history import Planted, grow
from safetensors.torch import load_file, save_file

from midfill.adapters.format import fingerprint_of, layers_of
from midfill.adapters.registry import Registry
from midfill.models.store import LocalModel
from midfill.settings import Settings
from midfill.training import data, verdict
from midfill.training import pipeline as learn
from midfill.training.history import Repository
from midfill.training.job import Job, Limits
from midfill.training.model import Adapted, Recipe
from midfill.training.selection import select
from midfill.training.trainer import Trainer

SETTINGS = Settings(
    family="stable-code",
    prefix_tokens=64,
    suffix_tokens=32,
    max_new_tokens=8,
    dtype="float32",
    runner="torch",
)
RECIPE = Recipe(learning_rate=5e-3, rank=8, alpha=16, batch=8)
# The time of an answer of three tiny layers is that of Python, and differs from run to run.
LIMITS = Limits(latency=20.0)


def nothing(*_):
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A base that has read some Python: an adapter cannot win by learning what text is."""
    folder = tmp_path_factory.mktemp("base")
    tiny.write_model("gpt_bigcode", folder, initializer_range=0.1)
    made = tiny.reference(folder).train()
    local = LocalModel("tiny", folder, None, "made here")
    examples = data.build_general_examples(local, SETTINGS, seed=5, count=160)
    torch.set_num_threads(1)
    optimiser = torch.optim.AdamW(made.parameters(), lr=4e-3)
    chooser = random.Random(0)
    torch.manual_seed(0)
    for _ in range(40):
        batch = chooser.sample(examples, 8)
        loss = 0
        for example in batch:
            ids = torch.tensor([example.prompt + example.target])
            loss = loss + made(input_ids=ids, labels=ids).loss / len(batch)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    made.save_pretrained(folder)
    return local


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    planted = Planted.new(tmp_path_factory.mktemp("history") / "project")
    grow(planted, 60, per_commit=1)
    return Repository(planted.root)


@pytest.fixture(scope="module")
def examples(repository, model):
    return data.build_examples(repository, select(repository, SETTINGS), model, SETTINGS, num_train=300)


def learnt(model, examples, folder, *, steps=60, recipe=RECIPE):
    made = Adapted(model, recipe, num_threads=1, yields=False)
    Trainer(made, recipe, examples, folder / "checkpoint", {}, lambda: False, nothing).run(
        600, max_steps=steps
    )
    made.save(folder / "adapter")
    return folder / "adapter"


@pytest.fixture(scope="module")
def good(model, examples, tmp_path_factory):
    """Learnt from the repository, and from other code as well, which a model this small else forgets."""
    other = data.build_general_examples(model, SETTINGS, seed=5, count=300)
    return learnt(model, [*examples.train, *other], tmp_path_factory.mktemp("good"), steps=75)


@pytest.fixture
def job(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("MIDFILL_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(verdict, "NUM_HOLES", 4)
    monkeypatch.setattr(data, "NUM_TRAIN", 300)
    return Job(repository.root, "tiny", 60.0, num_threads=1, limits=LIMITS)


def evaluated(job, adapter, model, fingerprint=None):
    result = learn.evaluate(job, adapter, fingerprint, model, SETTINGS, nothing)
    return result["verdict"], " ".join(result["reasons"]), result


def copied(adapter, folder, change=lambda tensors: tensors):
    """An adapter with other values."""
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = change(load_file(adapter / "adapter_model.safetensors"))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_that_is_really_better_is_enabled(job, good, model):
    found, reasons, result = evaluated(job, good, model)
    assert found == "enabled", reasons
    low, high = result["interval"]
    assert 0 < low < result["nll_gain"] < high
    assert result["nll_adapter"] < result["nll_base"]
    # It knows better where to end, and also what to write.
    assert 0 < result["nll_gain_at_ends"] < result["nll_gain"]
    assert result["commits"] >= 20
    assert result["examples"] >= 150
    page = Path(result["report"]).read_text()
    assert "enabled. The adapter is used." in page
    assert "data:image/png;base64," in page
    assert "http" not in page
    if sys.platform != "win32":
        assert Path(result["report"]).stat().st_mode & 0o777 == 0o600


def test_an_adapter_that_spoils_other_code_is_not_enabled(job, model, examples, tmp_path):
    few = examples.train[:40]
    found, reasons, result = evaluated(job, learnt(model, few, tmp_path, steps=120), model)
    assert (found, "other code" in reasons) == ("rejected", True), reasons
    assert result["interval"][0] > 0


def test_an_adapter_that_does_nothing_is_not_enabled(job, good, model, tmp_path):
    adapter = copied(
        good,
        tmp_path / "aa",
        lambda tensors: {
            name: torch.zeros_like(one) if "lora_B" in name else one for name, one in tensors.items()
        },
    )
    found, reasons, result = evaluated(job, adapter, model)
    assert found == "rejected", reasons
    assert result["nll_gain"] == 0.0


@pytest.mark.parametrize("seed", range(2))
def test_an_adapter_of_noise_is_not_enabled(job, good, model, tmp_path, seed):
    torch.manual_seed(seed)
    adapter = copied(
        good,
        tmp_path / "noise",
        lambda tensors: {
            name: torch.randn_like(one) * 1e-3 if "lora_B" in name else one for name, one in tensors.items()
        },
    )
    assert evaluated(job, adapter, model)[0] != "enabled"


def test_an_adapter_of_another_repository_is_not_enabled(job, model, tmp_path):
    planted = Planted.new(tmp_path / "foreign")
    planted.commit({"a.js": "let x = 1;\n"})
    for number in range(30):
        text = f"\\STRUCT<{number}>|$$|{{Z9: '{number}%'}};\n" * 4
        planted.commit({f"q{number}.js": text + f"// {number * 7919}\n"})
    foreign = Repository(planted.root)
    examples = data.build_examples(foreign, select(foreign, SETTINGS), model, SETTINGS, num_train=200)
    adapter = learnt(model, examples.train, tmp_path, steps=40)
    assert evaluated(job, adapter, model)[0] != "enabled"


def test_an_adapter_that_learnt_wrong_answers_is_not_enabled(job, model, examples, tmp_path):
    targets = [example.target for example in examples.train]
    random.Random(1).shuffle(targets)
    # Whatever stands at other places, letter by letter in any order.
    shuffled = []
    for example, target in zip(examples.train, targets, strict=True):
        letters = list(target)
        random.Random(2).shuffle(letters)
        shuffled.append(replace(example, target=tuple(letters)))
    adapter = learnt(model, shuffled, tmp_path, steps=40)
    assert evaluated(job, adapter, model)[0] != "enabled"


def test_an_adapter_that_was_trained_too_much_is_not_enabled(job, model, examples, tmp_path):
    recipe = replace(RECIPE, learning_rate=5e-2, batch=2, clip=100.0)
    adapter = learnt(model, examples.train[:4], tmp_path, steps=60, recipe=recipe)
    assert evaluated(job, adapter, model)[0] != "enabled"


def test_an_adapter_with_values_that_are_no_numbers_is_rejected(job, good, model, tmp_path):
    def spoil(tensors):
        next(iter(tensors.values()))[0, 0] = float("nan")
        return tensors

    found, reasons, _ = evaluated(job, copied(good, tmp_path / "nan", spoil), model)
    assert (found, "not finite" in reasons) == ("rejected", True)


def test_an_adapter_of_another_base_is_rejected(job, good, model, tmp_path):
    tiny.write_model("gpt_bigcode", tmp_path / "other", seed=7)
    other = LocalModel("other", tmp_path / "other", None, "made here")
    found, reasons, result = evaluated(job, good, other, fingerprint_of(model.path))
    assert (found, "another model" in reasons) == ("rejected", True)
    assert result["nll_gain"] is None


def test_commits_that_evaluate_again_and_again_ask_for_more(job, good, model, examples, tmp_path):
    assert learn.record_comparison(examples.test, "a") == 1
    assert learn.record_comparison(examples.test, "a") == 1
    assert learn.record_comparison(examples.test, "b") == 2
    assert learn.record_comparison([replace(one, commit=one.commit[::-1]) for one in examples.test], "c") == 1
    content = (tmp_path / "data" / "training" / "opened.json").read_text()
    assert examples.test[0].commit not in content


def test_the_model_that_learns_is_gone_before_two_engines_are_loaded(job, good, model, monkeypatch):
    weights, alive = [], []

    class Noted(Adapted):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            weights.extend(weakref.ref(one) for one in self.peft.parameters())

    fill = verdict.fill

    async def noted(*args):
        alive.extend(one for one in weights if one() is not None)
        return await fill(*args)

    monkeypatch.setattr(learn, "Adapted", Noted)
    monkeypatch.setattr(verdict, "fill", noted)
    _, _, result = evaluated(job, good, model)
    assert result["saved_chars"] is not None
    assert weights
    assert not alive


def test_what_has_been_evaluated_is_not_computed_again(job, good, model, monkeypatch):
    _, _, first = evaluated(job, good, model)

    real = Adapted.middle_and_end
    calls = []
    monkeypatch.setattr(
        Adapted, "middle_and_end", lambda self, example: calls.append(1) or real(self, example)
    )
    _, _, second = evaluated(job, good, model)
    assert second["nll_gain"] == first["nll_gain"]
    assert len(calls) < 10  # those that compare the adapter without strength with its base
    kept = (learn.run_folder("tiny") / "evaluation.jsonl").read_text()
    assert "pipeline" not in kept


def test_training_evaluates_and_registers_in_one_go(job, model, examples):
    # What it forgets of other code is another test's subject.
    limits = replace(LIMITS, general=10.0)
    job = replace(job, max_steps=30, changes=(("learning_rate", 5e-3), ("rank", 8)), limits=limits)
    result = learn.train(job, model, SETTINGS, nothing, lambda: False)
    entry = Registry().get("tiny")
    assert entry.evaluation.verdict == result["verdict"] == "enabled", result["reasons"]
    assert entry.evaluation.details["nll_gain"] == result["nll_gain"]
    assert entry.digest == result["digest"]
    assert result["training"]["steps"] == 30
    assert result["scale"] in {0.5, 0.75, 1.0}
    assert set(result["dev"]) == {"0", "0.5", "0.75", "1"}
    with pytest.raises(learn.AdapterError, match="--name"):
        learn.train(job, model, SETTINGS, nothing, lambda: False)
    assert json.dumps(result)


def test_a_saved_adapter_that_acts_differently_is_found_out(good, model, examples, tmp_path):
    made = Adapted(model, RECIPE, num_threads=1, yields=False)
    made.load(good)
    assert verdict.saved_adapter_problem(made, good, examples.test[0]) is None
    changed = copied(good, tmp_path / "changed", lambda tensors: {n: t * 1.5 for n, t in tensors.items()})
    made.load(good)
    assert "differs from the trained one" in verdict.saved_adapter_problem(made, changed, examples.test[0])
    assert layers_of(model.path)
