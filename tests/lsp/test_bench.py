"""`midfill bench lsp`: what all but the model takes for a key.

Whether that is within its budget depends on the machine, so it is for a person to run. That a key costs about
the same in a long file as in a short one is held by test_load.py.
"""

import json
import subprocess
import sys

COMMAND = [sys.executable, "-P", "-m", "midfill", "bench", "lsp", "--json", "--keys", "60"]


def test_the_overhead_of_a_key_is_told_beside_its_budget():
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=200, check=True)
    found = json.loads(done.stdout)
    assert found["keys"] == 60
    assert 0 < found["median_ms"] <= found["p95_ms"] <= found["p99_ms"] <= found["max_ms"]
    assert found["targets"].keys() == {"median_ms", "p99_ms"}
    assert found["met"] == all(found[name] < limit for name, limit in found["targets"].items())
