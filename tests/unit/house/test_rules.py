"""House rules that a look at the syntax tree can hold; each rule is first shown to find what it forbids."""

from collections.abc import Callable

import msgspec
import pytest

from folovllm.common.messages.core_worker import SchedulerOutput
from tests.sources import ROOT, SourceFile, source_files
from tests.unit.house import rules

Rule = Callable[[SourceFile], list[str]]

# Rule, code that breaks it, code that is like it and keeps it.
RULES: list[tuple[Rule, str, str]] = [
    (rules.no_global, "def f():\n    global a\n    a = 1", "def f():\n    a = 1"),
    (rules.no_mutable_module_state, "cache = {}", "def f():\n    cache = {}"),
    (rules.no_mutable_module_state, "seen: set[int] = set()", "SEEN = frozenset()"),
    (rules.no_mutable_module_state, "import collections\nq = collections.deque()", "import collections"),
    (rules.no_mutable_module_state, "A = {}\ndef f():\n    A[1] = 2", "A = {}\ndef f():\n    return A[1]"),
    (rules.no_mutable_module_state, "A = []\ndef f():\n    A.append(2)", "A = []\ndef f():\n    return A.index(2)"),
    (rules.no_mutable_module_state, "A = [1]\ndef f():\n    del A[0]", "table: Final = [1]"),
    (rules.environment_only_in_config, "import os\nos.environ['A']", "import os\nos.path"),
    (rules.environment_only_in_config, "from os import getenv", "from os import path"),
    (rules.no_pickle, "import pickle", "import json"),
    (rules.no_pickle, "from cloudpickle import dumps", "from msgspec import json"),
    (rules.no_pickle, "import torch\ntorch.load('x')", "import torch\ntorch.tensor(1)"),
    (rules.no_feature_probing, "hasattr(a, 'b')", "isinstance(a, B)"),
    (rules.no_feature_probing, "getattr(a, 'b', None)", "getattr(a, name)"),
    (rules.no_mixin, "class SpeedMixin: pass", "class Speed: pass"),
]


@pytest.mark.parametrize(("rule", "bad", "good"), RULES)
def test_rule_finds_what_it_forbids(rule: Rule, bad: str, good: str) -> None:
    assert rule(SourceFile("common/example.py", bad))
    assert not rule(SourceFile("common/example.py", good))


@pytest.mark.parametrize("rule", list(dict.fromkeys(rule for rule, _, _ in RULES)))
def test_every_source_file_keeps_the_rule(rule: Rule) -> None:
    violations = [violation for file in source_files() for violation in rule(file)]
    assert not violations, "\n".join(violations)


def test_the_configuration_may_read_the_environment_and_reads_little() -> None:
    text = (ROOT / "common" / "config.py").read_text(encoding="utf-8")
    assert not rules.environment_only_in_config(SourceFile("common/config.py", text))
    names = {word.strip("\"'(),.:`$") for word in text.split() if "FOLOVLLM_" in word}
    assert 1 <= len(names) <= 10, names


def test_scheduler_output_stays_small() -> None:
    assert len(msgspec.structs.fields(SchedulerOutput)) <= 12
