"""The programs of a run are compiled ahead, in the order of the stages."""

import threading

import pytest

from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.schedule import Stage
from evit_jax.runtime.programs import Programs

PLANS = [make_plan(16, 2, tokens=(keep,), reduce_at=(0,)) for keep in (12, 8, 4)]
STAGES = [Stage(*values) for values in zip((0, 5, 6), (0.0, 0.5, 1.0), PLANS)]


@pytest.fixture
def compiled():
    """A compile function that records its plans in order; `done` is set at the last plan."""

    class Compiled(list):
        done = threading.Event()

        def __call__(self, plan):
            self.append(plan)
            if plan == PLANS[-1]:
                self.done.set()
            return f'program of {plan}'

    return Compiled()


def test_programs_of_later_stages_are_compiled_in_order_while_the_first_runs(compiled):
    programs = Programs(STAGES, compiled)
    assert programs.at(0) == (STAGES[0], f'program of {PLANS[0]}')
    assert compiled.done.wait(20) and compiled == PLANS  # the second stage has one step only
    for step, number in ((4, 0), (5, 1), (6, 2), (99, 2)):
        assert programs.at(step) == (STAGES[number], f'program of {PLANS[number]}')
    programs.close()
    assert compiled == PLANS


def test_programs_of_past_stages_are_not_compiled(compiled):
    programs = Programs(STAGES, compiled)
    programs.at(5)
    programs.close()
    assert compiled[0] == PLANS[1] and PLANS[0] not in compiled
