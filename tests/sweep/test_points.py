import itertools
import pickle

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sweep.points import Points

AXES = st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=4).map(
    lambda lists: [(f"k{i}", [f"k{i}={v}" for v in values]) for i, values in enumerate(lists)]
)
BOUND = st.none() | st.integers(-300, 300)
SLICES = st.builds(slice, BOUND, BOUND, BOUND.filter(lambda step: step != 0))


def product(axes):
    return [list(point) for point in itertools.product(*(values for _, values in axes))]


@given(AXES)
def test_points_are_the_product_with_the_last_axis_fastest(axes):
    points, expected = Points(axes), product(axes)
    assert list(points) == expected
    assert len(points) == len(expected)
    assert [points[i] for i in range(-len(points), len(points))] == expected + expected
    assert bool(points) is bool(expected)


@given(AXES, SLICES, SLICES)
def test_a_slice_of_a_slice_is_what_a_list_would_give(axes, outer, inner):
    sliced = Points(axes)[outer][inner]
    assert isinstance(sliced, Points)
    assert list(sliced) == product(axes)[outer][inner]


def test_a_huge_product_costs_nothing_until_a_point_is_asked_for():
    axes = [(f"k{i}", [f"k{i}={v}" for v in range(1000)]) for i in range(6)]
    points = Points(axes)
    assert len(points) == 10**18
    assert points[-1] == [f"k{i}=999" for i in range(6)]
    assert points[10**17 :][0] == ["k0=100", *(f"k{i}=0" for i in range(1, 6))]


def test_no_axes_are_one_point_without_overrides():
    assert list(Points([])) == [[]]


def test_a_point_is_a_new_list_each_time():
    points = Points([("a", ["a=1"])])
    points[0].append("b=2")
    assert points[0] == ["a=1"]


def test_slices_carry_the_composer_and_pickles_do_not():
    composer = object()
    points = Points([("a", ["a=1", "a=2"])], composer)
    assert points[1:].composer is composer
    copied = pickle.loads(pickle.dumps(points))
    assert copied.composer is None
    assert list(copied) == list(points)


def test_it_tells_its_size_and_keys():
    assert repr(Points([("a", ["a=1", "a=2"]), ("+b", ["+b=1"])])) == "Points(2 of a x +b)"
