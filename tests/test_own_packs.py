"""Ranks batch and pack their own part of a step; the packs are those that a single process would make."""

import dataclasses

import numpy as np
import pytest

from pact_fast.algorithms.registry import make_algorithm
from pact_fast.batch.flops import work_of_packs, work_of_paths
from pact_fast.batch.loss_table import build_loss_table, teacher_pairs
from pact_fast.batch.packing import distribute_packs
from pact_fast.components import LossContext
from pact_fast.config import AlgorithmConfig
from pact_fast.distributed.world import World
from pact_fast.train.packs import make_packs, send_to_owners
from pact_fast.train.quantiles import distributions
from tests.support.groups import lookup_chain_renderer, make_groups, step_context_of
from tests.support.thread_world import Hub, run_threads
from tests.support.trees import cost


@pytest.fixture(scope="module")
def renderer():
    return lookup_chain_renderer()


def prompt_batches(
    renderer, prompts: int, world: World, name: str = "pact", branched: bool = False, loss_type: str = "dapo"
):
    """Prompt batches of a rank: the same step for any number of ranks."""
    config = AlgorithmConfig(name=name, anchor={"mode": "blend"}, loss_type=loss_type)
    groups = make_groups(renderer, config, prompts=prompts, rollouts=3)
    for trajectory in [t for group in groups for t in group.trajectories[1:]] if branched else ():
        n = len(trajectory.ids)
        trajectory.branches = np.array([[n // 3, n // 4], [n // 2, -1]])
    context, algorithm = step_context_of(renderer, config, groups, world=world), make_algorithm(config)
    own = [group for group in groups if world.owner_of(group.prompt_index, prompts) == world.rank]
    return algorithm.prompt_batches(own, context)


def table_of(batch, scored):
    """The loss table in an order of its own, sequences numbered as they appear: the order of tokens means nothing."""
    table, here = build_loss_table(batch, scored)
    index, weight = teacher_pairs(here)
    columns = [c for name, c in table._asdict().items() if c is not None and name != "sequence"]
    order = np.lexsort([np.nan_to_num(c, nan=7e7) for c in columns])
    numbers: dict[int, int] = {}
    sequence = [numbers.setdefault(number, len(numbers)) for number in table.sequence[order].tolist()]
    pairs = sorted(zip(table.row[index].tolist(), table.context[index].tolist(), weight.tolist(), strict=True))
    return [sequence, pairs, *(c[order].tolist() for c in columns)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "parallel", "prompts", "budget", "merge"),
    [(2, 1, 5, 900, False), (3, 1, 4, 300, True), (4, 2, 3, 700, True), (5, 1, 2, 10_000, False), (2, 2, 4, 900, True)],
)
def test_packs_and_loss_tables_are_those_of_a_process_that_has_everything(
    renderer, ranks, parallel, prompts, budget, merge
):
    everything = prompt_batches(renderer, prompts, World())
    trees = [tree for batch in everything for tree in batch.trees]
    scored = [s for batch in everything for s in batch.scored]
    wanted = distribute_packs(trees, max_tokens=budget, ranks=ranks // parallel, cost=cost, merge=merge)

    def work(world):
        return make_packs(
            prompt_batches(renderer, prompts, world), cost, max_tokens=budget, world=world, share=True, merge=merge
        )

    for rank, found in enumerate(run_threads(work, ranks, parallel)):
        assert len(found.packs) == len(wanted)
        for row, pack in zip(wanted, found.packs, strict=True):
            batch = row[rank // parallel]
            for name in ("input_ids", "position_ids", "subtree_end"):
                assert (getattr(pack.batch, name) == getattr(batch, name)).all()
            assert pack.batch.calls == batch.calls
            mine, theirs = table_of(pack.batch, pack.scored), table_of(batch, scored)
            np.testing.assert_equal(mine, theirs)
        packs = [batch for row in wanted for batch in row]
        assert (found.cost.tokens, found.cost.packs) == (work_of_packs(packs).tokens, sum(len(b) > 0 for b in packs))
        assert found.cost.flops == cost(*work_of_packs(packs))
        assert found.cost.flops_unshared == cost(*work_of_paths(trees))
        slowest = sum(max(cost(*work_of_packs([batch])) for batch in row) for row in wanted)
        assert found.cost.flops_waited == len(wanted[0]) * slowest
        assert found.longest == max(leaf.end for tree in trees for leaf in tree.leaves())


@pytest.mark.slow
@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("branched", [False, True], ids=["straight", "branched"])
@pytest.mark.parametrize("name", ["pact", "chord", "luffy", "sdft"])
def test_any_algorithms_tokens_reach_the_packs_of_a_process_that_has_everything(renderer, name, branched, share):
    """Normalisers over all prompts, pairs of leaves that share a pack, and rollouts of several nodes."""
    everything = prompt_batches(renderer, 4, World(), name, branched)
    trees = [tree for batch in everything for tree in batch.trees]
    scored = [s for batch in everything for s in batch.scored]
    wanted = distribute_packs(trees, max_tokens=700, ranks=3, cost=cost, share=share)
    assert bool(len(teacher_pairs(scored)[0])) == (name == "sdft")
    assert any(s.offset for s in scored) == branched

    def work(world):
        batches = prompt_batches(renderer, 4, world, name, branched)
        return make_packs(batches, cost, max_tokens=700, world=world, share=share, merge=False)

    for rank, found in enumerate(run_threads(work, 3)):
        for row, pack in zip(wanted, found.packs, strict=True):
            assert (pack.batch.input_ids == row[rank].input_ids).all() and pack.batch.calls == row[rank].calls
            np.testing.assert_equal(table_of(pack.batch, pack.scored), table_of(row[rank], scored))


@pytest.mark.parametrize("name", ["chord", "luffy"])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "prompt_mean"])
def test_normalisers_over_all_prompts_are_those_of_one_rank(renderer, name, loss_type):
    """5 ranks, 3 prompts: some ranks have none, and take part in the sums all the same."""

    def weights(batches):
        return [[s.rl_weight.tolist(), s.sft_weight.tolist()] for batch in batches for s in batch.scored]

    found = run_threads(lambda world: weights(prompt_batches(renderer, 3, world, name, loss_type=loss_type)), 5)
    assert [w for part in found for w in part] == weights(
        prompt_batches(renderer, 3, World(), name, loss_type=loss_type)
    )
    assert sum(not part for part in found) == 2


@pytest.mark.parametrize(("ranks", "parallel", "prompts"), [(1, 1, 4), (3, 1, 4), (4, 2, 3), (9, 1, 1)])
def test_what_a_rank_computes_returns_to_the_one_that_owns_the_prompt(renderer, ranks, parallel, prompts):
    """Log-probs are 1000 · prompt + token id here; ranks that share a pack know every other token. Some have nothing to do."""

    def work(world):
        batches = prompt_batches(renderer, prompts, world)
        packs = make_packs(batches, cost, max_tokens=500, world=world, share=True, merge=True)
        place = world.rank % parallel

        def values(pack):
            known = [1000.0 * s.prompt + s.node.ids[s.index] for s in pack.scored]
            row = np.concatenate([np.zeros(0), *known])
            return np.where(np.arange(len(row)) % parallel == place, row, 0.0)[None]

        found = send_to_owners(packs, [values(pack) for pack in packs.packs], world)
        seen = []
        for number, array in found.items():
            unit = packs.local_units[number]
            assert array.shape == (1, unit.supervised)
            seen += [id(s) for s in unit.scored]
            expected = [1000.0 * s.prompt + s.node.ids[s.index] for s in unit.scored]
            assert array[0].tolist() == np.concatenate([np.zeros(0), *expected]).tolist()
        assert sorted(seen) == sorted(id(s) for batch in batches for s in batch.scored if len(s.index))
        return len(seen)

    work(World()) if ranks == 1 else run_threads(work, ranks, parallel)


def test_a_rank_receives_tokens_in_proportion_to_what_it_trains(renderer):
    """With twice the prompts on twice the ranks, a rank receives about as much; it used to be twice as much."""
    received = {}
    for ranks in (2, 4):
        hub = Hub(ranks)

        def work(world, prompts=4 * ranks):
            return make_packs(
                prompt_batches(renderer, prompts, world), cost, max_tokens=2000, world=world, share=True, merge=True
            )

        run_threads(work, ranks, hub=hub)
        received[ranks] = np.mean(hub.bytes_to)
    assert received[4] < 1.7 * received[2]  # half of the parts come from elsewhere on 2 ranks, three quarters on 4


def test_quantiles_over_ranks_are_exact():
    rng = np.random.default_rng(0)
    whole = [
        np.abs(rng.standard_normal(1001)).astype(np.float32), np.array([0.5], np.float32), np.zeros(0, np.float32),
        np.repeat(np.float32([0.0, 3.0, 3e38, 1e-42]), 5),
    ]  # fmt: skip
    fractions = (0.0, 0.25, 0.5, 0.99)

    def work(world):
        parts = [np.array_split(column, world.size)[world.rank] for column in whole]
        return distributions(parts, fractions, world)

    for found in [work(World()), *run_threads(work, 3)]:
        assert found[2] is None
        for column, distribution in zip(whole, found, strict=True):
            if distribution is None:
                continue
            assert distribution.count == len(column) and distribution.largest == column.max()
            assert distribution.mean == pytest.approx(float(column.mean(dtype=np.float64)))
            expected = np.quantile(column.astype(np.float64), fractions)
            np.testing.assert_allclose(distribution.quantiles, expected, rtol=1e-12)


def test_the_check_of_loss_tables_can_fail(renderer):
    (batch, *_) = prompt_batches(renderer, 1, World())
    packs = make_packs([batch], cost, max_tokens=10_000, world=World(), share=True, merge=False)
    (pack,) = packs.packs
    changed = [dataclasses.replace(s, rl_weight=s.rl_weight + 1) for s in pack.scored]
    assert any(s.context == LossContext.PROMPT for s in pack.scored)
    assert table_of(pack.batch, pack.scored) != table_of(pack.batch, changed)
