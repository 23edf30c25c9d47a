"""Parts of running language models: places of matrices, products that are watched.

Skipped where the extra ``llm`` is not installed.
"""

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sop.llm.places import UNUSED, Place, PlaceFinder
from sop.llm.products import watching


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---------------------------------------------------------------------------------------- places


def interleaved(gate: Any, up: Any) -> Any:
    return np.stack([gate, up], axis=1).reshape(-1, gate.shape[1])


GATE, UP = normal(6, 4, seed=1), normal(6, 4, seed=2)
OTHER = normal(6, 4, seed=3)


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        (UP, Place("layers.0.x", None, False, 0, 1, (6, 4))),
        (UP.T, Place("layers.0.x", None, True, 0, 1, (6, 4))),
        (np.concatenate([GATE, UP]), Place("layers.0.x", None, False, 6, 1, (6, 4))),
        (interleaved(GATE, UP), Place("layers.0.x", None, False, 1, 2, (6, 4))),
        (np.stack([OTHER, GATE, UP]), Place("layers.0.x", 2, False, 0, 1, (6, 4))),
        (
            np.stack([np.hstack([OTHER.T, GATE.T]), np.hstack([GATE.T, UP.T])]),
            Place("layers.0.x", 1, True, 6, 1, (6, 4)),
        ),
    ],
    ids=["same", "transposed", "below", "alternating", "stacked", "stacked-transposed"],
)
def test_a_matrix_is_found_by_its_values(
    torch: ModuleType, parameter: Any, expected: Place
) -> None:
    parameters = {"layers.0.x": torch.from_numpy(np.array(parameter, order="C"))}
    place, problem = PlaceFinder(parameters).find("model.layers.0.up.weight", None, UP)
    assert (place, problem) == (expected, "")
    assert place is not None
    np.testing.assert_array_equal(place.read(parameters), UP)
    before = parameters["layers.0.x"].clone()
    place.write(parameters, OTHER)
    np.testing.assert_array_equal(place.read(parameters), OTHER)
    changed = int((parameters["layers.0.x"] != before).sum())
    assert changed == UP.size  # and nothing else


@pytest.mark.parametrize(
    "parameter", [normal(6, 4), UP[:5], np.concatenate([UP[:5], OTHER[:1]]), UP.astype(np.float64)]
)
def test_a_matrix_that_is_not_there(torch: ModuleType, parameter: Any) -> None:
    parameters = {"layers.0.x": torch.from_numpy(np.array(parameter, order="C"))}
    place, problem = PlaceFinder(parameters).find("layers.0.up.weight", None, UP)
    assert place is None
    assert problem == "its values are nowhere in the model that transformers loads"
    elsewhere = {"layers.1.x": torch.from_numpy(UP)}  # another layer is another matrix
    assert PlaceFinder(elsewhere).find("layers.0.up.weight", None, UP) == (None, UNUSED)


def test_equal_matrices_are_told_apart_by_name_and_number(torch: ModuleType) -> None:
    same = torch.from_numpy(np.stack([UP, UP, UP]))
    finder = PlaceFinder({"layers.3.experts.up": same})
    place, _ = finder.find("layers.3.experts.1.up.weight", None, UP)
    assert place is not None
    assert place.index == 1
    place, _ = finder.find("layers.3.experts.up", 2, UP)
    assert place is not None
    assert place.index == 2
    parameters = {"layers.0.a.weight": same[0], "layers.0.b.weight": same[1]}
    place, _ = PlaceFinder(parameters).find("model.layers.0.b.weight", None, UP)
    assert place is not None
    assert place.parameter == "layers.0.b.weight"
    place, problem = PlaceFinder(parameters).find("model.layers.0.c.weight", None, UP)
    assert place is None
    assert problem == "its values are in 2 places of the model that transformers loads"


# -------------------------------------------------------------------------------------- products


class Seen:
    """What was reported of products."""

    def __init__(self) -> None:
        self.inputs: list[tuple[Any, Any]] = []
        self.misused: list[str] = []

    def observe(self, site: Any, x: Any) -> None:
        self.inputs.append((site, x.clone().numpy()))


@pytest.mark.parametrize(
    "product",
    ["linear(x, w)", "linear(input=x, weight=w)", "x @ w.T", "torch.matmul(x, w.T)", "x.mm(w.T)",
     "torch.addmm(b, x, w.T)", "(w @ x.T).T", "torch.mm(x, mat2=w.T)",
     "torch.matmul(input=x, other=w.T)", "torch.addmm(b, mat2=w.T, mat1=x)",
     "b.expand(3, 4).addmm(mat1=x, mat2=w.T)"],
)  # fmt: skip
def test_products_give_their_input(torch: ModuleType, product: str) -> None:
    weight, x, bias = (torch.from_numpy(normal(*shape)) for shape in ((4, 4), (3, 4), (4,)))
    names = {"torch": torch, "linear": torch.nn.functional.linear, "w": weight, "x": x, "b": bias}
    seen = Seen()
    with watching({"w": (weight, 1)}, seen.observe, seen.misused.append):
        result = eval(product, names)  # the products are those of this file
    expected = x @ weight.T + (bias if "addmm" in product else 0)
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    ((site, found),) = seen.inputs
    assert site == ("w", None)
    np.testing.assert_array_equal(found.reshape(-1, 4), x)
    assert not seen.misused


def test_a_product_over_the_outputs_is_no_use_of_the_inputs(torch: ModuleType) -> None:
    weight, x = torch.from_numpy(normal(4, 4)), torch.from_numpy(normal(3, 4))
    seen = Seen()
    with watching({"w": (weight, 1)}, seen.observe, seen.misused.append):
        _ = x @ weight
        _ = torch.einsum("ti,oi->to", x, weight)
        _ = torch.mv(weight, x[0])
        _ = x @ weight[:, :].T[:, :2]  # only some of the outputs
        _ = torch.bmm(x[None], weight.T[None])
    assert seen.misused == ["w"] * 5
    assert not seen.inputs


def test_experts_by_slice_and_all_at_once(torch: ModuleType) -> None:
    stacked = torch.from_numpy(normal(3, 4, 5))  # experts, inputs, outputs
    x = torch.from_numpy(normal(3, 2, 4, seed=5))
    x[1, 0] = 0  # a place that no token was sent to
    seen = Seen()
    with watching({"e": (stacked, 0)}, seen.observe, seen.misused.append):
        _ = x[0] @ stacked[2]
        _ = torch.bmm(x, stacked)
    assert [site for site, _ in seen.inputs] == [("e", 2), ("e", 0), ("e", 1), ("e", 2)]
    np.testing.assert_array_equal(seen.inputs[0][1], x[0])
    np.testing.assert_array_equal(seen.inputs[2][1], x[1, 1:])
    assert not seen.misused
