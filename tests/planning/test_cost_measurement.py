"""Token counts to measure, and the refinement at steps of the cost."""

from evit_jax.planning import cost_measurement
from evit_jax.planning.search import steps


def step_cost(n):
    """Cost of a block as on a TPU: it jumps at 129 tokens."""
    return 10 * n + n * n / 50 + 400 * (n > 128)


def test_refine_steps_finds_a_step_to_the_token():
    evaluated = []
    counts = cost_measurement.compiled_counts(2, 197)
    costs = cost_measurement.refine_steps(lambda n: evaluated.append(n) or step_cost(n), counts)
    assert {128, 129} <= set(counts)  # real costs also have a smaller jump from 127 to 128
    assert (128, 129) in steps(costs) and len(evaluated) == len(set(evaluated)) == len(costs) < 20
    assert costs == {n: step_cost(n) for n in costs}
    smooth = cost_measurement.refine_steps(lambda n: 10 * n + n * n / 50, counts)
    assert len(smooth) <= len(counts) + 2 and not steps(smooth)


def test_timed_counts_have_every_fourth_count_and_the_edges_of_tiles():
    assert cost_measurement.timed_counts(2, 20) == [2, 4, 8, 12, 16, 20]
    counts = cost_measurement.timed_counts(2, 577)
    assert {2, 128, 129, 256, 257, 512, 513, 577} <= set(counts) and len(counts) < 50 and counts == sorted(counts)
