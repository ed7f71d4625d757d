"""The choice between the compiled instances of the Hopper kernels, and each of the forward's."""

import cases
import pytest
import tiles
import torch
from hypothesis import given
from hypothesis import strategies as st

import tilewright
from tilewright import _tilewright

pytestmark = pytest.mark.skipif(
    not hasattr(_tilewright, "forward_tile"), reason="this build does not say which tile it would choose"
)
KERNELS = [name for name in tilewright.build_info()["kernels"] if name.startswith("forward_")]

head_dims = st.integers(1, 32).map(lambda n: 8 * n)
lengths = st.one_of(st.integers(0, 300), st.integers(0, 1 << 20))


@given(
    head_dim=head_dims,
    head_dim_v=head_dims,
    softcap=st.booleans(),
    heads=st.integers(0, 1 << 16),
    seqlen_q=lengths,
    seqlen_k=lengths,
    window_left=st.none() | lengths,
    window_right=st.none() | lengths,
    multiprocessors=st.integers(1, 200),
)
def test_choice(head_dim, head_dim_v, **problem):
    """Every problem up to head_dim 256 gets a tile that holds it, of the smallest head dimensions that do."""
    tile = _tilewright.forward_tile(head_dim, head_dim_v, **problem)
    assert tile["head_dim"] >= head_dim and tile["head_dim_v"] >= head_dim_v
    assert tile["tile_m"] > 0 and tile["tile_n"] > 0 and tile["stages_k"] > 0 and tile["stages_v"] > 0
    holding = [(d, d_v) for d, d_v in tiles.head_dims() if d >= head_dim and d_v >= head_dim_v]
    assert (tile["head_dim"], tile["head_dim_v"]) == min(holding, key=sum)


def test_small_head_dims_get_small_tiles():
    assert tiles.head_dims()[0] < tiles.head_dims()[-1]


@pytest.mark.parametrize("head_dim, head_dim_v", [(264, 64), (64, 264), (1 << 30, 1 << 30)])
def test_no_tile_holds_it(head_dim, head_dim_v):
    with pytest.raises(ValueError, match="256"):
        _tilewright.forward_tile(head_dim, head_dim_v)


def test_no_multiprocessors():
    with pytest.raises(ValueError, match="multiprocessors"):
        _tilewright.forward_tile(64, 64, multiprocessors=0)


@given(
    head_dim=head_dims,
    head_dim_v=head_dims,
    softcap=st.booleans(),
    seqlen_q=lengths,
    seqlen_k=lengths,
    window_left=st.none() | lengths,
    window_right=st.none() | lengths,
)
def test_choice_of_the_backward(head_dim, head_dim_v, **problem):
    """Every problem up to head_dim 256 gets a tile that holds it, of the head dimensions that the forward would use."""
    tile = _tilewright.backward_tile(head_dim, head_dim_v, **problem)
    forward = _tilewright.forward_tile(head_dim, head_dim_v)
    assert tile["head_dim_v"] == forward["head_dim_v"] or problem["softcap"]
    assert tile["head_dim"] >= head_dim and tile["head_dim_v"] >= head_dim_v
    assert tile["tile_m"] % 16 == 0 and tile["tile_n"] % 64 == 0


@pytest.mark.cuda_build
def test_chosen_of_the_backward_are_compiled():
    """No problem gets a tile that is not there, and each that is there is some problem's."""
    compiled = {name for name in tilewright.build_info()["kernels"] if name.startswith("backward_")}
    chosen = set()
    for head_dim, head_dim_v in tiles.head_dims():
        for softcap in (False, True):
            for seqlen in (128, 1024, 16384):
                tile = _tilewright.backward_tile(head_dim, head_dim_v, softcap, seqlen, seqlen)
                score = "softcap" if softcap else "none"
                name = f"{tile['head_dim']}_{tile['head_dim_v']}_{score}_{tile['tile_m']}"
                chosen |= {f"backward_{dtype}_{name}" for dtype in tiles.DTYPES}
    assert chosen == compiled


@pytest.mark.parametrize("head_dim, head_dim_v", [(264, 64), (64, 264)])
def test_no_tile_of_the_backward_holds_it(head_dim, head_dim_v):
    with pytest.raises(ValueError, match="256"):
        _tilewright.backward_tile(head_dim, head_dim_v)


@pytest.mark.cuda_build
def test_chosen_are_compiled():
    """No problem gets a tile that is not there, and each that is there is some small problem's."""
    count = tiles.multiprocessors()
    chosen = {problem.kernel(dtype, count) for problem in tiles.problems() for dtype in tiles.DTYPES}
    assert chosen == set(KERNELS)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_results(device, kernel):
    """Of every instance, for each option and layout that the table has for it."""
    element = kernel.split("_")[1]
    count = tiles.multiprocessors(device)
    own = [problem for problem in tiles.problems() if problem.kernel(element, count) == kernel]
    assert own
    for problem in own:
        tensors, options = problem.make(device, tiles.DTYPES[element])
        cases.check_forward(*tensors, **options)


@pytest.mark.gpu
def test_chosen_are_launched(device):
    """The profiler sees another kernel for each instance, and always the same for the same."""
    count = tiles.multiprocessors(device)
    runs = [(p.kernel(element, count), p, element) for p in tiles.problems() for element in tiles.DTYPES]
    prepared = [(name, *problem.make(device, tiles.DTYPES[element])) for name, problem, element in runs]
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _, tensors, options in prepared:
            cases.call(*tensors, **options)
        torch.cuda.synchronize()
    launches = [event for event in profile.events() if "forward_sm90" in event.name]
    if not launches:
        pytest.skip("the profiler sees no kernels on this machine")
    launches.sort(key=lambda event: event.time_range.start)
    assert len(launches) == len(prepared)
    pairs = {(name, event.name) for (name, _, _), event in zip(prepared, launches, strict=True)}
    assert {name for name, _ in pairs} == set(KERNELS)
    assert len(pairs) == len({launched for _, launched in pairs}) == len(KERNELS), sorted(pairs)
