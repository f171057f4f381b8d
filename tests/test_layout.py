"""Where parameters go: every element has one place, and none depends on the bucket."""

from hypothesis import given
from hypothesis import strategies as st

from vsa_ddp.config import VsaConfig
from vsa_ddp.layout import plan_bucket

shapes = st.lists(st.lists(st.integers(1, 70), min_size=0, max_size=3).map(tuple), min_size=1, max_size=6)


@given(shapes=shapes, bundle=st.integers(1, 20))
def test_every_element_has_one_place(shapes: list[tuple[int, ...]], bundle: int) -> None:
    config = VsaConfig(bundle=bundle, rotation_block=128)
    layout = plan_bucket(tuple((str(i), shape) for i, shape in enumerate(shapes)), config)
    dims = exact = 0
    for s in layout.slices:
        if s.num_dims:
            assert s.start == dims
            assert s.num_dims % 128 == 0
            assert s.num_dims * bundle >= s.numel > (s.num_dims - 128) * bundle
            dims += s.num_dims
        else:
            assert s.start == exact
            exact += s.numel
    assert (layout.num_dims, layout.num_exact) == (dims, exact)


@given(shapes=shapes)
def test_one_dimension_or_few_elements_means_exact(shapes: list[tuple[int, ...]]) -> None:
    layout = plan_bucket(tuple((str(i), shape) for i, shape in enumerate(shapes)), VsaConfig(min_numel=100))
    for s in layout.slices:
        assert (s.num_dims > 0) == (len(s.shape) >= 2 and s.numel >= 100)
