from __future__ import annotations

import random

from hypothesis import given, settings, strategies

from calculators.vasp.incar import NOT_FACTS, facts_of, objection


@settings(max_examples=50, deadline=None)
@given(
    tags=strategies.dictionaries(
        strategies.sampled_from(sorted(NOT_FACTS - {"NSW", "IBRION"})), strategies.integers(0, 2)
    ),
    seed=strategies.integers(0, 1000),
)
def test_order_case_and_spelling_of_tags_do_not_move_the_facts(tags: dict[str, int], seed: int) -> None:
    physical = {"ENCUT": 520, "LASPH": True, "GGA": "PE", "LDAUU": [0, 5.3, 5.3], "SIGMA": 0.05}
    spelled = {"encut": "520.0", "Lasph": ".true.", "GGA": "Pe", "lDauu": "0 2*5.3", "SIGMA": "5d-2"}
    mixed_up = [*spelled.items(), *((tag.lower(), value) for tag, value in tags.items())]
    random.Random(seed).shuffle(mixed_up)
    assert facts_of(dict(mixed_up)) == facts_of(physical)


def test_objections_are_about_single_points_only() -> None:
    assert objection({"NSW": "0", "IBRION": -1, "ISIF": 2, "ALGO": "A", "IALGO": 38, "LSORBIT": ".FALSE."}) is None
    for tags in ({"NSW": 1}, {"IMAGES": 3}, {"ALGO": "Subrot"}, {"IALGO": 2}, {"ISIF": 7}, {"PSTRESS": 10.0}):
        assert objection(tags) is not None
