"""`midfill bench lsp`: what all but the model takes for a key.

Whether that is within its budget depends on the machine, so it is for a person to run. That a key costs about
the same in a long file as in a short one is held by test_load.py.
"""

import json
import subprocess

import forkserver


def test_the_overhead_of_a_key_is_told_beside_its_budget():
    command = forkserver.command("bench", "lsp", "--json", "--keys", "60")
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    found = json.loads(done.stdout)
    assert found["keys"] == 60
    assert 0 < found["median_ms"] <= found["p95_ms"] <= found["p99_ms"] <= found["max_ms"]
    assert found["targets"].keys() == {"median_ms", "p99_ms"}
    assert found["met"] == all(found[name] < limit for name, limit in found["targets"].items())


def soak(*options):
    command = forkserver.command("bench", "soak", "--engine", "scripted", "--json")
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    print(done.stdout)
    return done.returncode, json.loads(done.stdout)


def test_a_short_session_of_every_operation_leaves_nothing():
    # Memory settles after some thousands of operations only: `midfill bench soak` alone shows that it does.
    status, found = soak("--operations", "600", "--max-growth-mb", "100")
    assert found["wrong"] == []
    assert status == 0
    assert found["operations"] == 600
    assert found["compared"] > 8
    assert found["requests"] > 300
