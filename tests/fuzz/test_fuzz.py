"""Whatever comes from outside is read, or refused as was declared.

Each case of the corpus, and mutations of them; `FUZZ_EXAMPLES=100000` tries more, and `python -m tests.fuzz`
for as long as it is given.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.mutation import SIZES, Edit, Kind, mutated
from tests.fuzz.targets import TARGETS

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
CASES = [(target, name) for target in TARGETS.values() for name in target.cases()]
EDITS = st.builds(
    Edit,
    kind=st.sampled_from(Kind),
    at=st.integers(0, 65535),
    size=st.sampled_from(SIZES),
    pick=st.integers(0, 65535),
)


@pytest.mark.parametrize(("target", "name"), CASES, ids=[f"{t.name}/{name}" for t, name in CASES])
def test_a_case_of_the_corpus(target, name):
    with target.running() as check:
        check(target.cases()[name])


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_mutations_of_the_corpus(target):
    cases = list(target.cases().values())
    examples = max(1, EXAMPLES // 10) if target.is_slow else EXAMPLES

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(case=st.sampled_from(cases), edits=st.lists(EDITS, max_size=9))
    def holds(case, edits):
        check(mutated(case, edits, target.words, cases))

    with target.running() as check:
        holds()
