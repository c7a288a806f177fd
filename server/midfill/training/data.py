"""Examples: a prompt exactly as the server would send it, and the author's text as target tokens.

The middle is cut out of a file by characters; the rest goes through the server's prompt builder, so that
windows, layout, context and token healing are those of a running server. The middle is encoded separately,
since the model never sees prefix and middle as one text, and always ends with the family's end-of-text token:
where to stop is half of what the model should learn. Runs no model.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from midfill.completion.context.bundle import EMPTY_BUNDLE
from midfill.completion.context.collector import ContextCollector
from midfill.completion.context.files import SourceFile
from midfill.completion.prompt import PromptBuilder
from midfill.engine.api import ModelInfo
from midfill.errors import ModelError
from midfill.models.store import LocalModel, read_config
from midfill.models.tokenizer import load_tokenizer
from midfill.settings import Settings
from midfill.text.documents import Document, Point, Snapshot
from midfill.training.fim_spans import SHARES, Source, Span
from midfill.training.history import Repository
from midfill.training.selection import Addition, Selection

NUM_TRAIN = 1500
NUM_TEST = 168
NUM_DEV = 16
NUM_GENERAL = 16
MAX_TARGET_TOKENS = 160
_MAX_PER_COMMIT = 12
# Share of training examples from the tree; the others come from lines that recent commits have added.
_TREE_SHARE = 0.6
_KINDS = [kind for kind, share in SHARES.items() for _ in range(share)]


@dataclass(frozen=True, slots=True)
class Example:
    """One middle with its prompt.

    Attributes:
        id: commit, path, position and kind.
        commit: the commit that wrote the middle, its cluster; "" for an example from the tree.
        path, language, kind: of the file and the middle.
        before, after: the text around the middle.
        truth: the middle.
        prompt: the tokens that the server sends for this cursor.
        target: the expected tokens: the held-back part of a half-typed word, the middle, the end-of-text.
    """

    id: str
    commit: str
    path: str
    language: str
    kind: str
    before: str
    after: str
    truth: str
    prompt: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Examples:
    """All examples of a repository; the same repository, model, settings and seed give the same ones.

    Attributes:
        train, dev, test: split by time, see `selection`.
        general: from Python's standard library: code that has nothing to do with the repository.
        digest: SHA-256 over all tokens, in hexadecimal; a run is resumed only with equal data.
        layout: the order of a prompt's parts.
    """

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
    general: tuple[Example, ...]
    digest: str
    layout: str


def info_of(model: LocalModel) -> ModelInfo:
    """Return what a prompt builder needs to know of a model, without running it. Raises `ModelError`."""
    config = read_config(model.path)
    context = config.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(context, int):
        raise ModelError(
            f"{model.path / 'config.json'} does not give the length of the model's context "
            "(max_position_embeddings or n_positions)."
        )
    return ModelInfo(
        name=model.name,
        family=model.family,
        architecture=str(config.get("model_type")),
        context=context,
        tokenizer=load_tokenizer(model.path),
        device="cpu",
        dtype="float32",
    )


@dataclass
class ExampleBuilder:
    """Makes examples for one model and one repository.

    Attributes:
        prompt_builder: the server's prompt builder.
        context: context from other files; None if the settings ask for none.
        root: the folder that paths are relative to.
        dropped: numbers of drawn middles that were not used, by reason.
    """

    prompt_builder: PromptBuilder
    tokenizer: object
    end_id: int
    settings: Settings
    context: ContextCollector | None
    root: Path
    dropped: Counter[str] = field(default_factory=Counter)
    _sources: dict[str, Source] = field(default_factory=dict)

    def cut(self, file: SourceFile, span: Span, commit: str) -> Example | None:
        """Return the example of a span; None if its middle is too long."""
        before, after = file.text[: span.start], file.text[span.end :]
        truth = file.text[span.start : span.end]
        uri = (self.root / file.path).as_uri()
        document = Document.open(uri, file.language_id, 0, before + after)
        cursor = Point(before.count("\n"), len(before) - before.rfind("\n") - 1)
        snapshot = Snapshot(document, cursor)
        context = EMPTY_BUNDLE if self.context is None else self.context.collect(snapshot)
        # Start from a fresh window, as after opening the file, whatever examples came before.
        self.prompt_builder.forget(uri)
        prompt = self.prompt_builder.build(snapshot, context)
        encode = self.tokenizer.encode  # type: ignore[attr-defined]
        target = (*encode(prompt.forced_prefix + truth), self.end_id)
        if len(target) > MAX_TARGET_TOKENS:
            self.dropped["too long"] += 1
            return None
        place = f"{commit[:12] or 'tree'}:{file.path}:{cursor.line + 1}:{cursor.column + 1}:{span.kind}"
        return Example(
            place,
            commit,
            file.path,
            file.language_id,
            span.kind,
            before,
            after,
            truth,
            prompt.tokens,
            target,
        )

    def draw(
        self, file: SourceFile, rows: Sequence[int], kind: str, commit: str, chooser: random.Random
    ) -> Example | None:
        """Return an example of this kind in these lines; None if there is none."""
        key = f"{commit}:{file.path}"
        source = self._sources.get(key)
        if source is None:
            source = Source(file.text, file.language_id, file.secret_lines)
            if len(self._sources) > 512:
                self._sources.clear()
            self._sources[key] = source
        span = source.draw(kind, rows, chooser)
        if span is None:
            self.dropped[f"no {kind}"] += 1
            return None
        return self.cut(file, span, commit)


def build_examples(
    repository: Repository,
    selection: Selection,
    model: LocalModel,
    settings: Settings,
    *,
    seed: int = 0,
    num_train: int = NUM_TRAIN,
) -> Examples:
    """Return all examples of a selection. Raises `ModelError` if the model's FIM template is not known."""
    with _example_builder(repository, selection, model, settings) as example_builder:
        train = list(_train(selection, example_builder, num_train, seed))
        dev = _held_out(selection.split.dev, example_builder, NUM_DEV, seed + 1)
        test = _held_out(selection.split.test, example_builder, NUM_TEST, seed + 2)
    general = build_general_examples(model, settings, seed)
    whole = hashlib.sha256()
    for example in (*train, *dev, *test, *general):
        whole.update(f"{example.id}{example.prompt}{example.target}".encode())
    layout = str(example_builder.prompt_builder.layout)
    return Examples(tuple(train), tuple(dev), tuple(test), tuple(general), whole.hexdigest(), layout)


def build_general_examples(
    model: LocalModel, settings: Settings, seed: int, count: int = NUM_GENERAL
) -> list[Example]:
    """Return `count` examples from Python's standard library, without context."""
    root = Path(random.__file__).parent
    chooser = random.Random(seed)
    names = ("textwrap.py", "argparse.py", "tarfile.py", "ast.py", "queue.py", "shlex.py", "csv.py", "bdb.py")
    texts = [(name, (root / name).read_text(encoding="utf-8")) for name in names if (root / name).is_file()]
    files = [SourceFile(name, "python", text, frozenset()) for name, text in texts]
    example_builder = _new_builder(model, settings, root, None)
    found: list[Example] = []
    for attempt in range(8 * count):
        file = files[attempt % len(files)]
        example = example_builder.draw(
            file, range(file.text.count("\n")), chooser.choice(_KINDS), "", chooser
        )
        if example is not None:
            found.append(example)
        if len(found) == count:
            break
    return found


def _new_builder(
    model: LocalModel, settings: Settings, root: Path, context: ContextCollector | None
) -> ExampleBuilder:
    info = info_of(model)
    prompt_builder = PromptBuilder(info, settings)
    end = info.tokenizer.token_id(prompt_builder.family.stops[0])
    if end is None:
        raise ModelError(f"The tokenizer of {model.name!r} has no {prompt_builder.family.stops[0]!r}.")
    return ExampleBuilder(prompt_builder, info.tokenizer, end, settings, context, root)


@contextmanager
def _example_builder(
    repository: Repository, selection: Selection, model: LocalModel, settings: Settings
) -> Iterator[ExampleBuilder]:
    """Give an example builder whose context index, if any, shows the tree before the held-out commits."""
    with checked_out_tree(selection, settings) as root:
        if root is None:
            yield _new_builder(model, settings, repository.root, None)
            return
        context = ContextCollector(settings)
        try:
            context.open_folders([(selection.repository, root)])
            asyncio.run(context.indexed())
            yield _new_builder(model, settings, root, context)
        finally:
            context.close()


@contextmanager
def checked_out_tree(selection: Selection, settings: Settings) -> Iterator[Path | None]:
    """Give a folder with the tree before the held-out commits; None if the settings ask for no context."""
    if not settings.context:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="midfill-tree-") as folder:
        root = Path(folder).resolve() / selection.repository
        for file in selection.tree:
            place = root / file.path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(file.text, encoding="utf-8", newline="")
        yield root


def _train(selection: Selection, example_builder: ExampleBuilder, count: int, seed: int) -> Iterator[Example]:
    chooser = random.Random(seed)
    additions = [one for commit in selection.split.train for one in commit]
    # Recent code is more like the code that will be written next.
    recency = [
        0.98 ** (len(additions) - number) * min(len(one.rows), 40) for number, one in enumerate(additions)
    ]
    weights = [
        len(file.text) ** 0.5 * (1 + min(selection.touched.get(file.path, 0), 8)) for file in selection.tree
    ]
    seen: set[tuple[int, ...]] = set()
    found = 0
    for _ in range(8 * count):
        kind = chooser.choice(_KINDS)
        if selection.tree and (not additions or chooser.random() < _TREE_SHARE):
            file = chooser.choices(selection.tree, weights)[0]
            example = example_builder.draw(file, range(file.text.count("\n") + 1), kind, "", chooser)
        else:
            one = chooser.choices(additions, recency)[0]
            example = example_builder.draw(one.file, one.rows, kind, one.commit, chooser)
        if example is None or (key := example.prompt + example.target) in seen:
            continue
        seen.add(key)
        yield example
        found += 1
        if found == count:
            return


def _held_out(
    commits: Sequence[Sequence[Addition]], example_builder: ExampleBuilder, count: int, seed: int
) -> list[Example]:
    """Return about `count` examples, evenly from all commits, so that no commit dominates."""
    chooser = random.Random(seed)
    most = min(_MAX_PER_COMMIT, max(1, -(-count // max(1, len(commits)))))
    found = []
    for additions in commits:
        if not additions:
            continue
        weights = [min(len(one.rows), 40) for one in additions]
        seen: set[str] = set()
        for _ in range(6 * most):
            one = chooser.choices(additions, weights)[0]
            example = example_builder.draw(one.file, one.rows, chooser.choice(_KINDS), one.commit, chooser)
            if example is not None and example.id not in seen:
                seen.add(example.id)
                found.append(example)
            if len(seen) == most:
                break
    return found


def count_kinds(examples: Sequence[Example]) -> Mapping[str, int]:
    """Return the number of examples of each kind, most frequent first."""
    return dict(Counter(example.kind for example in examples).most_common())
