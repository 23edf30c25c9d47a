"""The knapsack against enumeration, a plain dynamic program over bits, and SciPy's HiGHS."""

import itertools
import math
import time
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_matrix

import golden.knapsack_search
from golden.errors import InputError
from golden.knapsack import COST_UNITS_PER_PPM, Layer, Option, Plan, solve_mckp

# (total cost, total bits, option of each layer): their order is the rule for ties.
Ranked = tuple[int, int, tuple[int, ...]]


def layer(name: str, params: int, *options: tuple[int, float]) -> Layer:
    """Layer with options a, b, ... of (bits, gap)."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return Layer(
        name,
        params,
        tuple(Option(letter, *option) for letter, option in zip(letters, options, strict=False)),
    )


def cost_of(layer: Layer, option: Option) -> int:
    return layer.params * round(Fraction(option.gap_ppm) * 10**6)


def ranked(plan: Plan) -> Ranked:
    return plan.cost, plan.bits, tuple(choice.index for choice in plan.choices)


def enumerate_best(layers: Sequence[Layer], budget: int) -> Ranked | None:
    """The best of all choices, None if none meets the budget."""
    found = []
    for picks in itertools.product(*(range(len(item.options)) for item in layers)):
        chosen = [item.options[pick] for item, pick in zip(layers, picks, strict=True)]
        bits = sum(option.bits for option in chosen)
        if bits <= budget:
            cost = sum(cost_of(*pair) for pair in zip(layers, chosen, strict=True))
            found.append((cost, bits, picks))
    return min(found, default=None)


def best_over_bits(layers: Sequence[Layer], budget: int) -> Ranked:
    """Dynamic program over the number of bits, one entry for each."""
    best: dict[int, Ranked] = {0: (0, 0, ())}
    for item in layers:
        extended: dict[int, Ranked] = {}
        for cost, bits, picks in best.values():
            for pick, option in enumerate(item.options):
                state = (
                    cost + cost_of(item, option),
                    bits + option.bits,
                    (*picks, pick),
                )
                if state[1] <= budget:
                    extended[state[1]] = min(state, extended.get(state[1], state))
        best = extended
    return min(best.values())


def check_plan(plan: Plan, layers: Sequence[Layer], budget: int) -> None:
    """What a plan says of itself agrees with the problem, and its bound with its multiplier."""
    assert plan.budget_bits == budget
    assert [choice.layer for choice in plan.choices] == list(layers)
    assert plan.bits == sum(choice.option.bits for choice in plan.choices) <= budget
    assert plan.cost == sum(cost_of(c.layer, c.option) for c in plan.choices)
    assert plan.cost == sum(choice.cost for choice in plan.choices)
    for choice in plan.choices:
        assert not choice.rows[choice.index].dominated
    dual = -plan.multiplier * budget + sum(
        min(cost_of(item, option) + plan.multiplier * option.bits for option in item.options)
        for item in layers
    )
    assert plan.multiplier >= 0
    assert plan.bound == math.ceil(dual) <= plan.cost
    assert plan.bound_distance == plan.cost - plan.bound


def model_layers(seed: int, count: int = 224, options: int = 12) -> list[Layer]:
    """Layers of 0.1 to 10 M weights; 4 to 16 bits per weight with LUTs and odd corrections."""
    rng = np.random.default_rng(seed)
    layers = []
    for position in range(count):
        params = int(10 ** rng.uniform(5, 7))
        sensitivity = np.exp(rng.normal(0, 0.7))
        choices = []
        for number, base in enumerate(np.linspace(4.5, 16, options)):
            density = rng.uniform(0, 0.002) if number % 2 else 0.0
            bits = int(params * base) + 256 + 25 * int(params * density)
            noise = np.exp(rng.normal(0, 0.1))
            gap = float(2e6 * sensitivity * 2.0 ** (-2 * bits / params) * noise)
            choices.append((bits, gap))
        layers.append(layer(f"layers.{position}", params, *choices))
    return layers


def budget_for(layers: Sequence[Layer], bits_per_weight: float) -> int:
    return int(sum(item.params for item in layers) * bits_per_weight)


# ---------------------------------------------------------------------------------- small problems

# Few different values, so that equal costs, bits and slopes are common.
SMALL_LAYERS = st.lists(
    st.tuples(
        st.integers(1, 3),
        st.lists(st.tuples(st.integers(0, 8), st.integers(0, 5)), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=5,
).map(lambda rows: [layer(f"layer{i}", row[0], *row[1]) for i, row in enumerate(rows)])


@settings(max_examples=300, deadline=None)
@given(layers=SMALL_LAYERS, budget=st.integers(0, 45))
def test_equals_enumeration_with_its_ties(layers: list[Layer], budget: int) -> None:
    wanted = enumerate_best(layers, budget)
    if wanted is None:
        with pytest.raises(InputError, match="cannot be met"):
            solve_mckp(layers, budget)
        return
    plan = solve_mckp(layers, budget)
    assert ranked(plan) == wanted
    check_plan(plan, layers, budget)


@settings(max_examples=60, deadline=None)
@given(
    layers=SMALL_LAYERS,
    budget=st.integers(0, 45),
    bits_factor=st.sampled_from([1, 10**14, 3**50]),
    params_factor=st.sampled_from([1, 10**9, 3**50]),
)
def test_numbers_beyond_64_bits(
    layers: list[Layer], budget: int, bits_factor: int, params_factor: int
) -> None:
    """Other units of bits and weights change no choice."""
    wanted = enumerate_best(layers, budget)
    if wanted is None:
        return
    scaled = [
        Layer(
            item.name,
            item.params * params_factor,
            tuple(Option(o.name, o.bits * bits_factor, o.gap_ppm) for o in item.options),
        )
        for item in layers
    ]
    plan = solve_mckp(scaled, budget * bits_factor)
    assert ranked(plan) == (wanted[0] * params_factor, wanted[1] * bits_factor, wanted[2])


@pytest.mark.parametrize("seed", range(12))
def test_equals_dynamic_program_over_bits(seed: int) -> None:
    """Thirty layers, with many equal totals, in 64-bit numbers and in larger ones."""
    rng = np.random.default_rng(seed)
    values = (6, 30, 1000)[seed % 3]
    layers = [
        layer(
            f"layer{i}",
            int(rng.integers(1, 4)),
            *((int(rng.integers(1, 40)), int(rng.integers(0, values))) for _ in range(6)),
        )
        for i in range(30)
    ]
    smallest = sum(min(option.bits for option in item.options) for item in layers)
    for budget in (smallest, smallest + 7, smallest + int(rng.integers(20, 400))):
        wanted = best_over_bits(layers, budget)
        plan = solve_mckp(layers, budget)
        assert ranked(plan) == wanted, f"seed {seed}, budget {budget}"
        check_plan(plan, layers, budget)
        huge = [Layer(item.name, item.params << 60, item.options) for item in layers]
        assert ranked(solve_mckp(huge, budget)) == (wanted[0] << 60, *wanted[1:])


# ------------------------------------------------------------------------------------ ties by hand


@pytest.mark.parametrize(
    ("layers", "budget", "wanted"),
    [
        # Equal cost: fewer bits, though the option stands later.
        ([layer("x", 1, (5, 2), (4, 2))], 9, (4, (1,))),
        # Equal options: the earlier.
        ([layer("x", 1, (4, 2), (4, 2))], 9, (4, (0,))),
        # One of two equal layers can have the better option b: the second, as a stands before b.
        ([layer("x", 1, (1, 3), (2, 1)), layer("y", 1, (1, 3), (2, 1))], 3, (3, (0, 1))),
        # The same with b listed first: the first layer.
        ([layer("x", 1, (2, 1), (1, 3)), layer("y", 1, (2, 1), (1, 3))], 3, (3, (0, 1))),
        # Equal cost in two ways, 4 or 5 bits.
        ([layer("x", 1, (0, 5), (5, 3)), layer("y", 2, (0, 5), (4, 4))], 5, (4, (0, 1))),
    ],
)
def test_ties(layers: list[Layer], budget: int, wanted: tuple[int, tuple[int, ...]]) -> None:
    assert ranked(solve_mckp(layers, budget))[1:] == wanted


@pytest.mark.parametrize("budget", [41, 87])
def test_ties_of_many_layers(budget: int) -> None:
    """One slope everywhere, so that all 5**40 choices are near the bound."""
    rng = np.random.default_rng(budget)
    layers = []
    for position in range(40):
        order = rng.permutation(5)
        layers.append(layer(f"layer{position}", 1, *((int(b), 9 - 2 * int(b)) for b in order)))
    assert ranked(solve_mckp(layers, budget)) == best_over_bits(layers, budget)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_order_of_options_matters_only_in_ties(data: st.DataObject) -> None:
    """Costs and bits with all subset sums different: option names stay, wherever they stand."""
    count = data.draw(st.integers(1, 4))
    layers = [
        layer(f"layer{i}", 1, *((7 * 3 ** (3 * i + j), 5 * 3 ** (3 * i + 2 - j)) for j in range(3)))
        for i in range(count)
    ]
    budget = data.draw(st.integers(7 * (27**count - 1) // 26, 7 * 27**count))
    shuffled = [
        Layer(item.name, item.params, tuple(data.draw(st.permutations(item.options))))
        for item in data.draw(st.permutations(layers))
    ]
    first, second = solve_mckp(layers, budget), solve_mckp(shuffled, budget)
    names = {choice.layer.name: choice.option.name for choice in first.choices}
    assert {choice.layer.name: choice.option.name for choice in second.choices} == names
    assert (first.bound, first.multiplier) == (second.bound, second.multiplier)


def test_order_of_options_in_a_model() -> None:
    layers = model_layers(3, count=60)
    rng = np.random.default_rng(3)
    shuffled = [
        Layer(item.name, item.params, tuple(item.options[i] for i in rng.permutation(12)))
        for item in layers
    ]
    budget = budget_for(layers, 5.3)
    first, second = solve_mckp(layers, budget), solve_mckp(shuffled, budget)
    assert [c.option for c in first.choices] == [c.option for c in second.choices]
    assert first == solve_mckp(layers, budget)


# ------------------------------------------------------------------------------- cost, option table


@pytest.mark.parametrize(
    ("gap", "units"),
    [
        (0, 0),
        (3, 3_000_000),
        (2_000_000, 2_000_000_000_000),
        (1 / 128, 7812),  # 7812.5 exactly: to the even neighbour
        (3 / 128, 23438),
        (0.1, 100_000),  # the float is a little above
        (4e-7, 0),
    ],
)
def test_cost_of_a_gap(gap: float, units: int) -> None:
    """Rounded before it is multiplied with the weights."""
    plan = solve_mckp([layer("x", 1000, (1, gap))], 1)
    assert plan.cost == plan.choices[0].rows[0].cost == 1000 * units


def test_plan_in_bits_per_weight_and_ppm() -> None:
    plan = solve_mckp([layer("x", 3, (12, 8)), layer("y", 1, (5, 4))], 100)
    assert (plan.params, plan.bits_per_weight, plan.mean_gap_ppm) == (4, Fraction(17, 4), 7.0)
    assert COST_UNITS_PER_PPM * plan.params * plan.mean_gap_ppm == plan.cost


def test_option_table() -> None:
    """Hull (0, 12) (4, 4) (8, 0); (1, 11) above an edge, (6, 2) on one; the rest dominated."""
    options = [(8, 0), (4, 4), (4, 4), (6, 2), (1, 11), (0, 12), (5, 4), (4, 5), (9, 0), (7, 3)]
    plan = solve_mckp([layer("x", 1, *options)], 6)
    (choice,) = plan.choices
    table = "".join("d" if r.dominated else "h" if r.on_hull else "-" for r in choice.rows)
    assert table == "hhd--hdddd"
    assert [row.option for row in choice.rows] == list(choice.layer.options)
    assert (choice.index, choice.option.name) == (3, "d")
    # On the edge from (4, 4) to (8, 0): 1 ppm per bit, and the bound is met.
    assert plan.multiplier == 10**6
    assert plan.bound_distance == 0


def test_bound_of_the_relaxation_by_hand() -> None:
    """7 of 10 bits: 0.7 of the step from 10 ppm to 5; the bound rounds up, the cost stays."""
    plan = solve_mckp([layer("x", 1, (0, 10), (10, 5))], 7)
    assert (plan.cost, plan.bound, plan.bound_distance) == (10_000_000, 6_500_000, 3_500_000)
    plan = solve_mckp([layer("x", 1, (0, 2e-6), (3, 0))], 1)
    assert (plan.cost, plan.bound, plan.multiplier) == (2, 2, Fraction(2, 3))  # 4/3, rounded up


@pytest.mark.parametrize("spare", [0, 10**12])
def test_everything_fits(spare: int) -> None:
    layers = model_layers(5, count=20)
    best = [min(item.options, key=lambda option: option.gap_ppm) for item in layers]
    plan = solve_mckp(layers, sum(option.bits for option in best) + spare)
    assert [choice.option for choice in plan.choices] == best
    assert plan.multiplier == 0
    assert plan.bound_distance == 0


# ----------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("seed", [1, 2])
def test_budget_exactly_met_and_monotone(seed: int) -> None:
    """A budget equal to the bits of an optimum gives it again; one bit less costs more."""
    layers = model_layers(seed, count=40)
    costs = []
    for bits_per_weight in (4.6, 4.8, 5.0, 5.5, 6.5, 8.0, 12.0):
        plan = solve_mckp(layers, budget_for(layers, bits_per_weight))
        check_plan(plan, layers, budget_for(layers, bits_per_weight))
        exact, tighter = solve_mckp(layers, plan.bits), solve_mckp(layers, plan.bits - 1)
        assert ranked(exact) == ranked(plan)
        assert tighter.cost > plan.cost
        assert tighter.bits < plan.bits
        costs += [tighter.cost, plan.cost]
    assert costs == sorted(costs, reverse=True)


@settings(max_examples=60, deadline=None)
@given(layers=SMALL_LAYERS)
def test_more_budget_never_costs_more(layers: list[Layer]) -> None:
    smallest = sum(min(option.bits for option in item.options) for item in layers)
    costs = [solve_mckp(layers, budget).cost for budget in range(smallest, smallest + 12)]
    assert costs == sorted(costs, reverse=True)


def test_infeasible_budget_names_what_can_be_met() -> None:
    layers = [layer("x", 2, (9, 1), (8, 2)), layer("y", 1, (5, 3))]
    with pytest.raises(InputError) as caught:
        solve_mckp(layers, 12)
    assert str(caught.value) == (
        "a budget of 4.000000 bits per weight (12 bits) cannot be met; "
        "the smallest choice takes 4.333334 bits per weight (13 bits)"
    )
    # The number named is rounded up, so that asking for it succeeds.
    assert solve_mckp(layers, int(3 * Fraction("4.333334"))).bits == 13


def test_zero_budget() -> None:
    assert solve_mckp([layer("x", 1, (0, 5), (1, 0))], 0).cost == 5_000_000


# ------------------------------------------------------------------------------------------ errors

GOOD = layer("good", 4, (16, 10), (20, 5))


@pytest.mark.parametrize(
    ("layers", "budget", "message"),
    [
        ([], 9, "there are no layers to choose options for"),
        ([GOOD], -1, "budget must not be negative, not -1 bits"),
        ([GOOD, layer("bad", 4)], 99, "layer bad has no options"),
        ([GOOD, layer("bad", 0, (1, 1))], 99, "layer bad: params must be at least 1, not 0"),
        ([GOOD, layer("bad", -3, (1, 1))], 99, "layer bad: params must be at least 1, not -3"),
        ([GOOD, GOOD], 99, "layer good is given 2 times"),
        (
            [Layer("bad", 1, (Option("NF4", 4, 1), Option("E2M3", 6, 1), Option("NF4", 5, 1)))],
            99,
            "layer bad: option NF4 is given 2 times",
        ),
        (
            [layer("bad", 4, (1, 1), (-2, 1))],
            99,
            "layer bad, option b: bits must not be negative, not -2",
        ),
        *(
            (
                [GOOD, layer("bad", 4, (1, 1), (2, gap))],
                99,
                f"layer bad, option b: gap must be from 0 to 2000000 ppm, not {gap}",
            )
            for gap in (math.nan, math.inf, -math.inf, -1e-9, 2000000.5)
        ),
    ],
)
def test_errors_name_layer_and_option(layers: list[Layer], budget: int, message: str) -> None:
    with pytest.raises(InputError) as caught:
        solve_mckp(layers, budget)
    assert str(caught.value) == message


# ---------------------------------------------------------------------------- against HiGHS, speed


def integer_program(
    layers: Sequence[Layer], budget: int
) -> tuple[np.ndarray, csr_matrix, list[int], list[int]]:
    """Costs in ppm, rows (bits, then one per layer), and their lower and upper ends."""
    pairs = [(i, option) for i, item in enumerate(layers) for option in item.options]
    costs = np.array([layers[i].params * option.gap_ppm for i, option in pairs], dtype=np.float64)
    columns = np.arange(len(pairs))
    values = np.concatenate([[option.bits for _, option in pairs], np.ones(len(pairs))])
    rows = np.concatenate([np.zeros(len(pairs), int), [1 + i for i, _ in pairs]])
    matrix = csr_matrix((values, (rows, np.tile(columns, 2))))
    ones = [1] * len(layers)
    return costs, matrix, [0, *ones], [budget, *ones]


@pytest.mark.parametrize("seed", range(4))
def test_equals_milp_on_200_layers(seed: int) -> None:
    """HiGHS works in float64 with tolerances: its choice may only be worse, or not feasible."""
    rng = np.random.default_rng(seed)
    layers = []
    for position in range(200):
        params = int(rng.integers(100, 10_000))
        sensitivity = rng.uniform(0.3, 3)
        options = [
            (int(params * b) + int(rng.integers(0, 60)), round(2e5 * sensitivity * 0.3**b))
            for b in np.sort(rng.uniform(2, 7, 8))
        ]
        layers.append(layer(f"layer{position}", params, *options))
    budget = budget_for(layers, 3 + 0.5 * seed)
    plan = solve_mckp(layers, budget)
    check_plan(plan, layers, budget)

    costs, matrix, low, high = integer_program(layers, budget)
    answer = milp(
        costs,
        integrality=np.ones(len(costs)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, low, high),
        options={"mip_rel_gap": 0.0, "time_limit": 60},
    )
    assert answer.status == 0, answer.message
    taken = np.rint(answer.x).astype(int).reshape(200, 8)
    assert (taken.sum(axis=1) == 1).all()
    chosen = [item.options[int(row.argmax())] for item, row in zip(layers, taken, strict=True)]
    assert sum(option.bits for option in chosen) <= budget
    cost = sum(cost_of(*pair) for pair in zip(layers, chosen, strict=True))
    assert plan.cost == cost, f"seed {seed}"

    relaxed = linprog(
        costs, A_ub=matrix[:1], b_ub=high[:1], A_eq=matrix[1:], b_eq=high[1:], bounds=(0, 1)
    )
    assert plan.bound / COST_UNITS_PER_PPM == pytest.approx(relaxed.fun, rel=1e-9)


@pytest.mark.parametrize("bits_per_weight", [4.7, 5.0, 6.5])
def test_a_large_model_takes_a_moment(bits_per_weight: float) -> None:
    """224 layers with 12 options, about 0.2 s; the optimum is all but on the bound."""
    layers = model_layers(7)
    budget = budget_for(layers, bits_per_weight)
    start = time.process_time()
    plan = solve_mckp(layers, budget)
    assert time.process_time() - start < 2
    check_plan(plan, layers, budget)
    assert 0 < plan.bound_distance < plan.cost / 1000


@pytest.mark.parametrize("seed", [11])
def test_search_arithmetic_does_not_change_the_optimum(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coarse price and a large first limit search more, and find the same."""
    layers = model_layers(seed, count=30)
    budget = budget_for(layers, 5.2)
    plan = solve_mckp(layers, budget)
    monkeypatch.setattr(golden.knapsack_search, "_PRICE_BITS", 4)
    assert solve_mckp(layers, budget) == plan
    monkeypatch.setattr(golden.knapsack_search, "_FIRST_LIMIT_DIVISOR", 1)
    assert solve_mckp(layers, budget) == plan
