"""The language of the project: words that no file may contain, with what to write instead.

Source, tests, recipes and documentation are searched. `CHANGELOG.md` may quote old names as code.
"""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("racnn_cli", "backbones", "recipes", "docs", "tests", ".ci")
SUFFIXES = (".py", ".md", ".toml", ".css", ".html", ".j2", "")
FILES = sorted(
    path
    for path in [*ROOT.glob("*.md"), ROOT / "pyproject.toml", *(p for f in FOLDERS for p in (ROOT / f).rglob("*"))]
    if path.is_file() and path.suffix in SUFFIXES and path != Path(__file__).resolve()
)

ONE = r"(?:CNN|row|folder|size|seed|process|image|file|wrapper|line|function|vector|number|loss|box|crop|map)"
MANY = r"(?:images|epochs|boxes|cores|losses|batches|rows|crops|updates|vectors|files)"
PER = r"(?:scale|row|class|image|seed|split|process|step|update|round|epoch|batch|command|file|GPU|data set)"
COMPARED = "(?:such|longer|more|less|fewer|larger|smaller|better|worse|faster)"

WORDS = {
    rf"\b(?:an?|one) {ONE} an? {PER}\b": "one … per …",
    rf"\b{MANY} an? {PER}\b": "… per …",
    r"\bin the place of\b": "instead of",
    r"\b(?:takes?|took|taking|taken) (?:its|their) place\b": "replace",
    r"\bso many\b": "n, this many",
    r"\bfault(?:s|y|less)?\b": "error, problem",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\breckon(?:s|ed|ing)?\b": "estimate",
    r"\b(?:varied|variants?)\b": "augmented, augmentation",
    r"\b(?:go|goes|going|gone|went) on (?:with|without|from|after|to|until|where|in|at|by)\b": "continue",
    r"\b(?:goes|went) on\b": "continue",
    r"\bshall\b": "should, must",
    r"\bsurer\b|\bhow surely\b": "more confident",
    r"\bpictures?\b": "image",
    r"\btold\b": "metadata, or rephrase",
    r"\bput_aside\b": "save_snapshot",
    r"\bGlance\b|\blook_closer\b": "CoarseOutput, refine",
    r"\bowner\b": "parent_run",
    r"\bclass Seed\b": "SeedExperiment",
    r"_as_it_is\b": "identity_collate",
    r"\b(?:leaves?|leaving|left) the house\b|\bhouse\b": "exported; project, package",
    r"\blook(?:s|ed|ing)? at\b": "attended region, or check, read, inspect",
    r"\bwings?\b": "package, part",
    r"\bwhole way\b": "every stage",
    r"\bwhat comes\b": "rephrase",
    r"\bthere (?:is|was) nothing to\b": "rephrase",
    rf"(?<!there)\s(?:is|are|was) no (?!{COMPARED}\b)[a-z]+": "is not a",
    r"\bbesides\b": "in addition, also",
    r"\b(?:leave|leaves|left|leaving) (?:\S+ )?away\b": "omit",
    r"\bmay know whom\b": "may import",
    r'"""Of\b': "a sentence with a verb",
}
IDENTIFIERS = {
    "told": "metadata",
    "explained": "translate_errors",
    "chance": "noise, uniform",
    "moments": "what it holds",
    "made": "what it holds",
}
IN_SOURCE = {"found": "what it holds"}
"""Identifiers that only tests may use."""
ALLOWED = {
    r"\b(?:varied|variants?)\b": ("font-variant",),
    r"\bfault(?:s|y|less)?\b": ("tests/faults", "tests.faults", "faults/", "page fault"),
    r"\bwings?\b": ("racnn_cli/data/datasets/birds.py", "racnn_cli/data/datasets/pose.py"),
}
"""Texts on a line, or files, in which a pattern is allowed: paths, and words in their literal meaning."""


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("file", FILES, ids=name)
def test_plain_english(file) -> None:
    text = file.read_text(encoding="utf-8")
    if file.name == "CHANGELOG.md":
        text = re.sub(r"`[^`]*`", "", text)
    problems = []
    for pattern, better in WORDS.items():
        allowed = ALLOWED.get(pattern, ())
        for match in re.finditer(pattern.replace(" ", r"[\s#]+"), text, flags=re.IGNORECASE):
            line = text.count("\n", 0, match.start()) + 1
            content = text.splitlines()[line - 1]
            if name(file) not in allowed and not any(part in content for part in allowed):
                problems.append(f"{name(file)}:{line}: {match[0]!r}: {better}")
    if file.suffix == ".py":
        identifiers = IDENTIFIERS if name(file).startswith("tests/") else IDENTIFIERS | IN_SOURCE
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME and token.string in identifiers:
                better = identifiers[token.string]
                problems.append(f"{name(file)}:{token.start[0]}: identifier {token.string!r}: {better}")
    assert not problems, "\n" + "\n".join(problems)
