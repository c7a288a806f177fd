"""The user's own calibrations on disk."""

import json

import pytest

from midfill.cli.doctor_checks import _calibration
from midfill.completion import calibrations
from midfill.completion.calibrations import CalibrationError, Saved
from midfill.completion.confidence import BUILT_IN, WEIGHTS, Eagerness, Evidence, confidence, length_to_show
from midfill.settings import Settings

EVIDENCE = Evidence("compute(value)", ((7, -0.01), (14, -0.02)), True, "    x = ")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MIDFILL_DATA", str(tmp_path))


def saved(model="m", **changes):
    values = {
        "model": model,
        "suggestions": 200,
        "repositories": 3,
        "made": "2026-11-30",
        "weights": {**WEIGHTS, "bias": -9.0},
        "thresholds": {"low": 0.5, "normal": 0.2, "high": 0.1},
    }
    return values | changes


def write(values, model="m"):
    path = calibrations.path_of(model)
    path.parent.mkdir(exist_ok=True)
    path.write_text(values if isinstance(values, str) else json.dumps({"format": 1} | values))
    return path


def test_without_a_file_the_built_in_one_is_used():
    found = calibrations.in_use("m")
    assert found.calibration is BUILT_IN
    assert (found.saved, found.problem) == (None, "")
    assert calibrations.describe(found) == "built-in calibration"
    assert calibrations.remove("m") is None


def test_what_is_written_is_used_and_can_be_taken_back():
    path = calibrations.write(Saved(**saved()))
    found = calibrations.in_use("m")
    assert found.problem == ""
    assert found.calibration.source == str(path)
    assert found.calibration.thresholds[Eagerness.LOW] == 0.5
    assert length_to_show(EVIDENCE, Eagerness.NORMAL) == 14
    assert length_to_show(EVIDENCE, Eagerness.NORMAL, found.calibration) == 0
    assert confidence(EVIDENCE, 14, found.calibration) < confidence(EVIDENCE, 14)
    assert "200 suggestions in 3 repositories" in calibrations.describe(found)
    assert calibrations.remove("m") == path
    assert calibrations.in_use("m").calibration is BUILT_IN


def test_each_model_has_its_own():
    calibrations.write(Saved(**saved("Qwen/Coder 7B")))
    calibrations.write(Saved(**saved("Qwen-Coder-7B")))
    paths = {calibrations.path_of(name) for name in ("Qwen/Coder 7B", "Qwen-Coder-7B", "../../x", "é", "")}
    assert len(paths) == 5
    assert len({path.parent for path in paths}) == 1
    assert calibrations.in_use("Qwen/Coder 7B").saved.model == "Qwen/Coder 7B"
    assert calibrations.in_use("m").saved is None


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        json.dumps(saved()) + "\n" * 70_000,
        saved(format=2),
        saved(model="another"),
        saved(weights={}),
        saved(weights={**WEIGHTS, "more": 1.0}),
        saved(weights={**WEIGHTS, "bias": "1"}),
        saved(weights={**WEIGHTS, "bias": 1e9}),
        saved(weights={**WEIGHTS, "bias": float("nan")}),
        saved(weights={**WEIGHTS, "bias": float("inf")}),
        saved(thresholds={"low": 0.5, "normal": 0.2}),
        saved(thresholds={"low": 0.1, "normal": 0.2, "high": 0.3}),
        saved(thresholds={"low": 0.5, "normal": 0.2, "high": 0.0}),
        saved(thresholds={"low": 0.5, "normal": 0.2, "high": 0.1, "always": 0.1}),
        saved(suggestions=0),
        saved(command="touch /tmp/x"),
    ],
)
def test_a_broken_file_is_said_and_not_used(broken):
    path = write(broken)
    found = calibrations.in_use("m")
    assert found.calibration is BUILT_IN
    assert str(path) in found.problem
    assert "built-in calibration is used" in found.problem
    assert "--reset" in found.problem
    with pytest.raises(CalibrationError, match=path.name):
        calibrations.read("m")


def test_the_doctor_says_what_suggestions_are_judged_by():
    settings = Settings(model="m")
    assert _calibration(settings).as_dict() | {"name": ""} == {
        "name": "",
        "status": "ok",
        "found": "built-in calibration",
        "remedy": "",
    }
    calibrations.write(Saved(**saved()))
    assert "your own calibration of 2026-11-30" in _calibration(settings).found
    write("{")
    check = _calibration(settings)
    assert (check.status, check.remedy) == ("warning", "Run: midfill eval calibrate --reset")


def test_a_byte_order_mark_is_no_fault():
    path = write(saved())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert calibrations.in_use("m").problem == ""


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "calibrations").write_text("a file")
    with pytest.raises(CalibrationError, match="Cannot write"):
        calibrations.write(Saved(**saved()))
