import json
from dataclasses import asdict

import numpy as np
import pytest

from midfill.completion.confidence import WEIGHTS
from midfill.errors import MidfillError
from midfill.evaluation.calibration import (
    calibrate,
    describe,
    fit,
    model_of,
    read_cases,
    reliability,
    trade,
    why_not,
)
from midfill.evaluation.repository import Result


def write(path, seed, count=120):
    """Results of a made-up repository: the likelier the tokens, the more often the first line is right."""
    chance = np.random.default_rng(seed)
    with path.open("w") as out:
        out.write(json.dumps({"eval": "repo", "model": "tiny"}) + "\n")
        for number in range(count):
            logprob = -float(chance.exponential(0.5))
            right = chance.random() < np.exp(3 * logprob)
            text = "right_name\nguess" if right else "wrong_name\nguess"
            tokens = ((5, logprob), (10, logprob), (13, -1.0), (16, -1.0))
            result = Result(
                f"{path.stem}{number}",
                "a.py",
                "rest-of-line",
                "python",
                "x = ",
                "",
                "right_name",
                text,
                None,
                tokens,
                finished=False,
                latency_ms=1.0,
            )
            out.write(json.dumps(asdict(result)) + "\n")
    return path


@pytest.fixture
def files(tmp_path):
    return [write(tmp_path / f"{name}.jsonl", seed) for seed, name in enumerate("abc")]


def test_a_gate_is_fitted_and_judged_on_what_it_has_not_seen(files):
    result = calibrate(files[:2], files[2:])
    assert set(result["weights"]) == set(WEIGHTS)
    assert result["weights"]["total"] > 0
    held = result["held_out"]
    assert held["suggestions"] == 120
    for level in ("low", "normal", "high"):
        # Every suggestion has a line too much, so that showing all of it is never right.
        assert held[level]["precision_of_all"] == 0.0
    assert held["low"]["precision"] >= held["normal"]["precision"] > 0.4
    assert held["normal"]["saved_of_all"] > 0.85
    assert result["thresholds"]["low"] >= result["thresholds"]["normal"] >= result["thresholds"]["high"]
    assert result["brier"]["fitted"] < result["brier"]["built_in"]
    assert held["brier"] < held["brier_built_in"]
    assert why_not(result) is None
    text = describe(result)
    assert "240 suggestions in 2 repositories" in text
    assert "held_out  normal" in text


def test_what_is_no_better_than_the_built_in_calibration_is_not_recommended(files):
    result = calibrate(files[:2], files[2:])
    result["held_out"]["brier"] = result["held_out"]["brier_built_in"]
    assert "held-out results it is not better" in why_not(result)
    result["brier"]["fitted"] = result["brier"]["built_in"] + 0.01
    assert "not fitted to it is not better" in why_not(result)
    assert "99 suggestions only; at least 100 are needed" in why_not(result | {"suggestions": 99})


def test_results_of_two_models_are_not_mixed(files):
    assert model_of(files) == "tiny"
    files[0].write_text(files[0].read_text().replace('"tiny"', '"other"'))
    with pytest.raises(MidfillError, match="several models"):
        model_of(files)


def test_predictions_are_probabilities(files):
    cases = read_cases(files)
    model = fit(cases)
    likely = np.concatenate([model.predict(case.rows)[:1] for case in cases])
    right = np.array([float(case.scores[0].right) for case in cases])
    assert likely.mean() == pytest.approx(right.mean(), abs=0.05)
    # Better than always saying how many are right.
    assert np.mean((likely - right) ** 2) < 0.75 * right.var()
    bins = reliability(likely, right)
    assert sum(one["count"] for one in bins) == len(right)
    assert bins[0]["predicted"] < bins[-1]["predicted"]
    assert bins[0]["right"] < bins[-1]["right"]


def test_a_threshold_of_zero_shows_everything(files):
    cases = read_cases(files[:1])
    found = trade(cases, [np.ones(2) for _ in cases], 0.0)
    assert found["shown"] == found["saved_of_all"] == 1.0
    assert found["precision"] == found["precision_of_all"]


def test_results_are_read_as_a_shell_may_have_copied_them(files):
    whole = len(read_cases(files[:1]))
    files[0].write_bytes(b"\xef\xbb\xbf" + files[0].read_bytes().replace(b"\n", b"\r\n"))
    assert len(read_cases(files[:1])) == whole
    files[0].write_bytes(files[0].read_text().encode("utf-16"))
    with pytest.raises(MidfillError, match=r"UTF-16\. Save it as UTF-8\.$"):
        read_cases(files[:1])


def test_what_cannot_be_calibrated_is_said(files, tmp_path):
    with pytest.raises(MidfillError, match="two repositories"):
        calibrate(files[:1], [])
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"eval": "repo"}\n')
    with pytest.raises(MidfillError, match="have no suggestions"):
        calibrate([empty], [])
