"""Secrets are found by name and by line, and ordinary code is not taken for one."""

import random
import sysconfig
from pathlib import Path

import pytest
from planted import certain, possible

from midfill.documents import Document, Point, Snapshot
from midfill.secrecy import Grade, SecretWatch, find_secrets, grade, is_excluded
from midfill.settings import Settings

ORDINARY = [
    "def set_password(self, raw_password):",
    "    password = get_password()",
    '    password_field_name="password1",',
    'password = "secret"',
    'password = "<your password>"',
    'api_key = os.environ["API_KEY"]',
    "token = tokens[index + 1]",
    "elif token.token_type == TokenType.VAR:",
    "_csrf_id_token = MASKED_TEST_SECRET2",
    "token: str = field(default_factory=new_token)",
    'token = "{{ csrf_token }}"',
    'secret = f"{prefix}-{name}"',
    "for key, value in secrets.items():",
    'color = "#a1b2c3"',
    'commit = "deadbeef01"',
    'id = "550e8400-e29b-41d4-a716-446655440000"',
    'raise ValueError("The password must have at least 8 characters, 1 digit")',
    "https://user:password@example.com:8080/",
    "from django.contrib.auth.tokens import default_token_generator2",
    "test_files_that_hold_secrets_never_reach_the_model_2()",
    "        pass",
    "",
]


def test_a_random_token_with_a_few_x_is_no_placeholder():
    assert grade('curl -H "Authorization: Bearer jjD37Wpl0g4cFu6qxXxxKO"') is Grade.CERTAIN
    assert grade('curl -H "Authorization: Bearer xxxxxxxxxxxxxxxxxxxxxx"') is Grade.NONE


@pytest.mark.parametrize("kind", certain())
def test_a_planted_secret_makes_its_file_a_secret(kind):
    for _ in range(20):
        line, secret = certain()[kind]
        assert secret in line
        assert grade(line) is Grade.CERTAIN, line
        assert find_secrets(f"x = 1\n{line}\ny = 2\n") == {1: Grade.CERTAIN}


@pytest.mark.parametrize("kind", possible())
def test_what_may_be_a_secret_is_kept_out_of_the_context(kind):
    for _ in range(20):
        line, _ = possible()[kind]
        assert grade(line) is Grade.POSSIBLE, line
        assert find_secrets(f"\n\n{line}") == {2: Grade.POSSIBLE}


@pytest.mark.parametrize("line", ORDINARY)
def test_ordinary_code_is_no_secret(line):
    assert grade(line) is Grade.NONE


def test_a_very_long_line_is_judged_by_its_ends():
    line, _ = certain()["GitHub token"]
    assert grade("x" * 3_000) is Grade.POSSIBLE
    assert grade(line + "x " * 50_000) is Grade.CERTAIN
    assert grade("x " * 50_000 + line) is Grade.CERTAIN


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_numbers_and_line_ends(end):
    rng = random.Random(3)  # noqa: S311
    lines, expected = [], {}
    for number, (line, _) in enumerate((certain(rng) | possible(rng)).values()):
        lines += ["a = 1", "İ = 'ß'", line]
        expected[3 * number + 2] = grade(line)
    assert find_secrets(end.join(lines)) == expected


def test_the_quick_search_finds_what_judging_every_line_finds():
    """On real code, with secrets planted in it."""
    rng = random.Random(7)  # noqa: S311
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    lines = [line for path in rng.sample(files, 6) for line in path.read_text("utf-8").split("\n")[:400]]
    for line, _ in (certain(rng) | possible(rng)).values():
        lines.insert(rng.randrange(len(lines)), line)
    naive = {number: found for number, line in enumerate(lines) if (found := grade(line))}
    assert find_secrets("\n".join(lines)) == naive
    assert len(naive) >= len(certain() | possible())


def test_watching_edits_finds_what_judging_the_whole_text_finds():
    rng = random.Random(11)  # noqa: S311
    secrets = [line for line, _ in certain(rng).values()]
    watch, lines = SecretWatch(), []
    verdicts = set()
    for version in range(400):
        at = rng.randint(0, len(lines))
        new = [rng.choice(secrets) if rng.random() < 0.05 else "x = 1" for _ in range(rng.randint(0, 3))]
        lines[at : at + rng.randint(0, 4)] = new
        text = rng.choice(["\n", "\r\n", "\r"]).join(lines)
        document = Document.open("file:///a.py", "python", version, text)
        found = watch.finds_secret(Snapshot(document, Point(0, 0)))
        assert found is (Grade.CERTAIN in map(grade, lines))
        verdicts.add(found)
    assert verdicts == {True, False}


def test_in_a_large_document_secrets_are_looked_for_near_the_cursor():
    line, _ = certain()["AWS key"]
    text = "x = 1\n" * 50_000 + line + "\n" + "x = 1\n" * 50_000
    document = Document.open("file:///a.py", "python", 0, text)
    watch = SecretWatch()
    assert not watch.finds_secret(Snapshot(document, Point(10, 0)))
    assert watch.finds_secret(Snapshot(document, Point(50_100, 0)))
    assert watch.finds_secret(Snapshot(document, Point(49_800, 0)))
    assert not watch.finds_secret(Snapshot(document, Point(90_000, 0)))


@pytest.mark.parametrize(
    ("uri", "excluded"),
    [
        ("file:///w/.env", True),
        ("file:///w/.env.local", True),
        ("file:///w/prod.env", True),
        ("file:///w/%2Eenv", True),
        ("file:///w/Server.PEM", True),
        ("file:///w/id_rsa", True),
        ("file:///w/.npmrc", True),
        ("file:///w/.pypirc", True),
        ("file:///w/.git-credentials", True),
        ("file:///home/u/.aws/credentials", True),
        ("file:///home/u/.kube/config", True),
        ("file:///w/kubeconfig.yaml", True),
        ("file:///w/secrets.yaml", True),
        ("file:///w/credentials.json", True),
        ("file:///w/terraform.tfstate", True),
        ("C:\\Users\\u\\.docker\\config.json", True),
        ("git:/work/.env?x", True),
        ("vscode-notebook-cell:/work/.env#1", True),
        ("untitled:.env", True),
        ("file:///w/config", False),
        ("file:///w/config.json", False),
        ("file:///w/secrets.py", False),
        ("file:///w/credentials.py", False),
        ("file:///w/environment.py", False),
        ("file:///w/env.py", False),
        ("file:///w/keyboard.py", False),
        ("untitled:Untitled-1", False),
        ("vscode-notebook-cell:/w/a.ipynb#X1", False),
    ],
)
def test_secret_files_are_known_by_name(uri, excluded):
    assert is_excluded(uri, Settings().excluded_files) is excluded
