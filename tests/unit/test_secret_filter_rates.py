"""How often the search for secrets is right: planted secrets that it finds, clean files that it silences.

`pytest -s tests/unit/test_secret_filter_rates.py` prints the rates for files of the packages installed here,
and those of detect-secrets with its defaults. MIDFILL_CLEAN_FILES names other folders to draw from, with the
path separator between them, and MIDFILL_CLEAN_SAMPLE how many files to draw; server/docs/privacy.md says with
what its figures were measured.
"""

import os
import random
from pathlib import Path

import pydantic
import pytest
from planted import certain

from midfill.text.secret_filter import Severity, find_secrets

FOLDERS = os.environ.get("MIDFILL_CLEAN_FILES") or str(Path(pydantic.__file__).parents[1])
SAMPLE = int(os.environ.get("MIDFILL_CLEAN_SAMPLE", "2000"))
DRAWS = 20
SUFFIXES = {
    *(
        ".py",
        ".pyi",
        ".js",
        ".mjs",
        ".cjs",
        ".jsx",
        ".ts",
        ".tsx",
        ".vue",
        ".go",
        ".rs",
        ".rb",
        ".php",
        ".java",
    ),
    *(".kt", ".cs", ".c", ".h", ".cpp", ".hpp", ".sh", ".lua", ".yml", ".yaml", ".toml"),
}
# Files that hold what has all marks of a real secret, with the reason why it is there.
NOT_CLEAN = {
    "transformers/testing_utils.py": "the token of a user of the test server",
    "openvino_telemetry/utils/params.py": "the key of an analytics service",
    "golang.org/x/oauth2/": "access tokens and private keys of its tests, as a server sends them",
    "golang.org/x/crypto/": "private keys of its tests",
    "google.golang.org/api/": "private keys of its tests",
    "discovery/kv/kv_test.go": "a private key of its tests",
    "twilio-6.3.1/package/lib/rest/": "half of a private key, in a comment",
    "cryptography/hazmat/": "test vectors",
}


def clean_files():
    files = []
    for folder in FOLDERS.split(os.pathsep):
        for path in Path(folder).rglob("*"):
            excused = any(part in path.as_posix() for part in NOT_CLEAN)
            if path.suffix in SUFFIXES and not excused and path.is_file() and not path.is_symlink():
                files.append(path)
    files.sort()
    random.Random(20).shuffle(files)
    found = []
    for path in files:
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if 0 < len(text) < 200_000:
            found.append((path, text))
        if len(found) == SAMPLE:
            break
    return found


@pytest.fixture(scope="module")
def clean():
    return clean_files()


def planted():
    rng = random.Random(5)
    return [
        # detect-secrets leaves lines out on which something is called.
        (kind, f"a = 1\n{line.replace('call(', '').replace(', 1)', '')}\n")
        for _ in range(DRAWS)
        for kind, (line, _) in certain(rng).items()
    ]


def silences(text):
    return [number for number, severity in find_secrets(text).items() if severity is Severity.CERTAIN]


def test_not_one_clean_file_in_a_thousand_is_silenced(clean):
    silenced = [f"{path}:{lines[0] + 1}" for path, text in clean if (lines := silences(text))]
    print(f"\n{len(clean)} clean files, silenced: {len(silenced)} ({len(silenced) / len(clean):.2%})")
    assert len(silenced) <= len(clean) / 1000, silenced


def test_every_planted_secret_is_found():
    missed = [kind for kind, text in planted() if not silences(text)]
    print(f"\n{len(certain())} kinds of secrets, {DRAWS} of each, missed: {len(missed)}")
    assert not missed


@pytest.mark.slow
def test_detect_secrets_with_its_defaults_does_worse_on_both(clean, tmp_path):
    from detect_secrets.core.scan import scan_file
    from detect_secrets.settings import default_settings

    def finds(path, text):
        file = tmp_path / path.name
        file.write_text(text, encoding="utf-8")
        return any(True for _ in scan_file(str(file)))

    # It takes ten milliseconds for a hundred lines.
    few = clean if "MIDFILL_CLEAN_SAMPLE" in os.environ else clean[:200]
    ours = sum(bool(silences(text)) for _, text in few)
    draws = planted()
    with default_settings():
        theirs = sum(finds(path, text) for path, text in few)
        missed = [kind for kind, text in draws if not finds(Path("a.py"), text)]
    print(
        f"\nof {len(few)} clean files, detect-secrets silences {theirs} ({theirs / len(few):.2%}), we {ours}"
    )
    print(f"of {len(draws)} secrets, detect-secrets misses {len(missed)}: {', '.join(sorted(set(missed)))}")
    assert ours <= theirs
    assert missed
