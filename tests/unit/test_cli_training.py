"""`midfill adapter plan | train | eval | stats`, as far as they need no model."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from planted_adapters import write_adapter, write_base
from planted_history import Planted, grow

from midfill.adapters.registry import Evaluation, Registry, check_name
from midfill.cli.main import cli
from midfill.completion.stats import acceptance as feedback
from midfill.errors import AdapterError, MidfillError
from midfill.models.store import LocalModel
from midfill.settings import Settings
from midfill.training import job as jobs
from midfill.training import process as training
from midfill.training import worker


def run(*arguments):
    result = CliRunner().invoke(cli, ["adapter", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_repository_is_asked_for_where_there_is_none(tmp_path):
    write_base(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    with pytest.raises(MidfillError, match="no git repository"):
        run("plan", "--repo", tmp_path, "--model", tmp_path / "base")


def test_a_model_that_is_not_here_is_named_with_the_remedy(tmp_path):
    with pytest.raises(MidfillError, match="midfill model pull nobody/nothing"):
        run("train", "--repo", tmp_path, "--model", "nobody/nothing")


@pytest.mark.parametrize("budget", ["soon", "0m", "-3", "5 weeks"])
def test_a_budget_that_is_no_time_is_refused(budget):
    result = run("plan", "--budget", budget)
    assert result.exit_code == 2
    assert "20m or 1h" in result.output or "No such option" in result.output


@pytest.mark.parametrize("command", [["plan"], ["train"], ["eval", "nothing"]])
def test_a_form_of_weights_that_there_is_not_is_refused_with_those_there_are(command):
    result = run(*command, "--base-weights", "int4")
    assert result.exit_code == 2
    assert "'int4' is not one of 'auto', 'float32', 'int8'" in result.output


def test_an_adapter_that_is_neither_registered_nor_a_folder_is_refused():
    with pytest.raises(MidfillError, match="no adapter 'nothing'"):
        run("eval", "nothing")


def test_forcing_what_is_not_registered_is_refused(tmp_path):
    with pytest.raises(MidfillError, match="needs a registered adapter"):
        run("eval", tmp_path, "--force")


@pytest.mark.parametrize("folder", ["/", "/a/..", "/my model", "/.hidden", "/snapshots/0123456789abcdef"])
def test_every_folder_has_a_name_that_an_adapter_can_have(folder):
    check_name(jobs.name_for(Path(folder)))
    assert jobs.name_for(Path("/src/project")) == "project"


def test_a_name_that_is_a_path_is_evaluated_nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv("MIDFILL_DATA", str(tmp_path / "data"))
    job = jobs.Job(tmp_path, "..", 0.0)
    model = LocalModel("tiny", tmp_path, "stable-code", source="a test")
    request = jobs.request_of("eval", job, model, Settings(), tmp_path)
    with pytest.raises(AdapterError, match=r"'\.\.' is not a valid adapter name"):
        worker._work(request, print, lambda: False)
    assert not (tmp_path / "data").exists()


def test_stats_show_adapters_beside_their_base(monkeypatch, tmp_path):
    monkeypatch.setenv("MIDFILL_STATE", str(tmp_path))
    assert "No suggestion" in run("stats").output
    counts = feedback.AcceptanceCounts(offered=10, accepted=3, accepted_chars=50)
    better = feedback.AcceptanceCounts(offered=10, accepted=5, accepted_chars=80)
    feedback.add(
        feedback.counts_path(),
        {
            feedback.key_of("tiny", None): {"python": counts},
            feedback.key_of("tiny", "mine"): {"python": better},
        },
    )
    rows = json.loads(run("stats", "--json").output)["counts"]
    assert [(row["adapter"], row["accepted_share"]) for row in rows] == [(None, 0.3), ("mine", 0.5)]
    assert "mine" in run("stats").output


def test_stats_compare_sessions_with_those_that_were_held_out(monkeypatch, tmp_path):
    monkeypatch.setenv("MIDFILL_STATE", str(tmp_path))
    path, mine = feedback.counts_path(), feedback.key_of("tiny", "mine")
    for number in range(30):
        counts = feedback.AcceptanceCounts(offered=20, accepted=8 + number % 3)
        feedback.add(path, {mine: {"python": counts}}, f"a{number}")
        counts = feedback.AcceptanceCounts(offered=20, accepted=4 + number % 3)
        if number < 4:
            feedback.add(
                path, {feedback.key_of("tiny", "mine", held_out=True): {"python": counts}}, f"b{number}"
            )
    [row] = json.loads(run("stats", "--json").output)["holdout"]
    assert (row["adapter"], row["with"]["sessions"], row["without"]["sessions"]) == ("mine", 30, 4)
    assert row["with"]["share"] == pytest.approx(0.45)
    low, high = row["interval"]
    assert row["difference"] == pytest.approx(0.2125, abs=0.001)
    assert 0 < low < row["difference"] < high
    assert "30 sessions with it, 4 held out: 45.0% and 23.8% accepted" in run("stats").output


def test_one_held_out_session_is_too_few(monkeypatch, tmp_path):
    monkeypatch.setenv("MIDFILL_STATE", str(tmp_path))
    counts = {"python": feedback.AcceptanceCounts(offered=2, accepted=1)}
    feedback.add(feedback.counts_path(), {feedback.key_of("tiny", "mine"): counts}, "a")
    [row] = json.loads(run("stats", "--json").output)["holdout"]
    assert row["interval"] is None
    assert row["without"] == {"sessions": 0, "offered": 0, "accepted": 0, "share": None}
    assert "too few to compare" in run("stats").output


def test_a_verdict_that_is_forced_is_shown_as_such(monkeypatch, tmp_path):
    monkeypatch.setenv("MIDFILL_DATA", str(tmp_path / "data"))
    base = write_base(tmp_path / "base")
    Registry().add(
        write_adapter(tmp_path / "one"),
        name="one",
        base=base,
        evaluation=Evaluation("rejected", ("worse",), forced=True),
    )
    assert "rejected, forced" in run("list").output


def test_the_help_has_examples():
    for name in ("plan", "train", "eval", "stats"):
        assert "Example" in run(name, "--help").output


def test_a_worker_that_dies_is_an_error_not_a_silence(tmp_path):
    planted = Planted.new(tmp_path / "project")
    grow(planted, 1)
    with (
        training.started({"kind": "none"}) as process,
        pytest.raises(MidfillError, match="ended unexpectedly"),
    ):
        list(training.events(process))
