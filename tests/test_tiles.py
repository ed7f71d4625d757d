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
def test_choice(head_dim, head_dim_v, softcap, **problem):
    """Every problem up to head_dim 256 gets a tile that holds it, of the smallest head dimensions that do."""
    tile = _tilewright.forward_tile(head_dim, head_dim_v, softcap, **problem)
    assert tile["head_dim"] >= head_dim and tile["head_dim_v"] >= head_dim_v
    assert tile["tile_m"] > 0 and tile["tile_n"] > 0 and tile["stages_k"] > 0 and tile["stages_v"] > 0
    holding = [(d, d_v) for d, d_v in tiles.head_dims(softcap) if d >= head_dim and d_v >= head_dim_v]
    assert (tile["head_dim"], tile["head_dim_v"]) == min(holding, key=sum)


def test_small_head_dims_get_small_tiles():
    assert tiles.head_dims()[0] < tiles.head_dims()[-1]
    assert set(tiles.head_dims(softcap=True)) < set(tiles.head_dims())


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


@given(
    head_dim=head_dims,
    softcap=st.booleans(),
    seqlen_q=st.one_of(st.integers(0, 4096), lengths),
    seqlen_k=st.one_of(st.integers(0, 4096), lengths),
    causal=st.booleans(),
    deterministic=st.booleans(),
    heads_kv=st.integers(0, 1 << 12),
    group=st.sampled_from([1, 2, 3, 8, 64]),
    multiprocessors=st.integers(1, 200),
)
def test_choice_of_whole_heads(
    head_dim, softcap, seqlen_q, seqlen_k, causal, deterministic, heads_kv, group, multiprocessors
):
    """Where the sums fit in the L2 cache, or nearly if blocks would have to wait for each other, and the last round of
    heads leaves few multiprocessors idle."""
    problem = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "window_right": 0 if causal else None}
    heads = {"heads_kv": heads_kv, "group": group, "multiprocessors": multiprocessors, "deterministic": deterministic}
    tile = _tilewright.backward_tile(head_dim, head_dim, softcap, **problem, **heads)
    rows = -(-seqlen_q // tile["tile_m"]) * tile["tile_m"]
    most = (36 if causal and deterministic else 27) << 20
    fits = min(heads_kv, multiprocessors) * group * rows * tile["head_dim"] * 4 <= most
    rounds = -(-heads_kv // multiprocessors)
    one_tile = seqlen_k <= tile["tile_n"]
    even = one_tile or rounds * multiprocessors <= 1.05 * heads_kv or heads_kv >= 4 * multiprocessors
    some = heads_kv > 0 and seqlen_q > 0 and seqlen_k > 0
    assert tile["whole_heads"] == (some and fits and even and not tile["second_pass"])
    assert not _tilewright.backward_tile(head_dim, head_dim, softcap, **problem, **heads, packed=True)["whole_heads"]


@pytest.mark.parametrize(
    "head_dim, seqlen, heads, whole, waiting",
    [(64, 512, 1024, True, True), (64, 1024, 512, False, True), (64, 2048, 256, False, False),
     (96, 512, 672, False, False), (128, 256, 1024, False, False), (256, 256, 512, False, False),
     (64, 256, 160, False, False), (64, 300, 70, False, False), (64, 128, 70, True, True)],
)  # fmt: skip
def test_whole_heads_of_common_problems(head_dim, seqlen, heads, whole, waiting):
    """Those of docs/backward.md: 16,384 tokens, heads × head_dim = 2,048, on an H200; and few heads. `waiting`: with a
    fixed order, causal."""
    problem = {"head_dim": head_dim, "head_dim_v": head_dim, "seqlen_q": seqlen, "seqlen_k": seqlen, "heads_kv": heads}
    assert _tilewright.backward_tile(**problem)["whole_heads"] == whole
    assert _tilewright.backward_tile(**problem, window_right=0)["whole_heads"] == whole
    assert _tilewright.backward_tile(**problem, deterministic=True)["whole_heads"] == whole
    assert _tilewright.backward_tile(**problem, window_right=0, deterministic=True)["whole_heads"] == waiting


@pytest.mark.parametrize(
    "head_dim, softcap, causal, longest, longest_deterministic",
    [(96, False, False, 512, 512), (96, False, True, 1536, 2048), (128, False, False, 512, 512),
     (128, False, True, 1536, 2048), (256, False, False, 1 << 21, 1 << 21), (256, True, True, 1 << 21, 1 << 21),
     (128, True, True, 0, 0)],
)  # fmt: skip
def test_choice_of_the_second_pass(head_dim, softcap, causal, longest, longest_deterministic):
    """At head_dim 256 always, at 96 and 128 in short sequences, causal in longer ones where blocks would wait. The mean
    of a packed batch counts twice."""
    for deterministic, last in ((False, longest), (True, longest_deterministic)):
        for seqlen in (1, 256, 257, 512, 513, 768, 769, 1024, 1025, 1536, 1537, 2048, 2049, 1 << 19, 1 << 20):
            problem = {"seqlen_q": seqlen, "seqlen_k": seqlen, "window_right": 0 if causal else None}
            for packed in (False, True):
                tile = _tilewright.backward_tile(
                    head_dim, head_dim, softcap, **problem, deterministic=deterministic, packed=packed
                )
                assert tile["second_pass"] == ((2 if packed else 1) * seqlen <= last)


@pytest.mark.parametrize("deterministic, widest", [(False, 768), (True, 1024)])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_choice_of_the_second_pass_with_a_window(head_dim, deterministic, widest):
    """At head_dim 96 and 128 as in a causal sequence of twice its size."""
    for left, right in ((widest, 0), (100, widest - 100), (widest + 1, 0), (0, widest + 1), (8192, widest)):
        tile = _tilewright.backward_tile(
            head_dim, head_dim, False, 8192, 8192, window_left=left, window_right=right, deterministic=deterministic
        )
        assert tile["second_pass"] == (head_dim > 64 and left + right <= widest)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "heads, longest, longest_causal", [(16, 1024, 2048), (64, 256, 512), (66, 256, 512), (67, 0, 0)]
)
def test_choice_of_the_second_pass_for_few_heads(head_dim, heads, longest, longest_causal):
    """Where neither heads nor tiles fill the multiprocessors, with the heads of queries counted; not in long sequences
    of head_dim 64. Above, where heads share keys, in sequences of up to 2,048; the mean of a packed batch counts
    twice."""
    for causal, few, (always, with_splits) in ((False, longest, (256, 256)), (True, longest_causal, (768, 1024))):
        for grouped in ({"heads_kv": heads}, {"heads_kv": 1, "group": heads}):
            last = max(few, with_splits if "group" in grouped else always)
            if head_dim == 64:
                last = min(few, 1024 if causal else 512)
            for seqlen in (1, 128, 129, max(last, 1), last + 1, 1 << 20):
                problem = {"seqlen_q": seqlen, "seqlen_k": 70, "packed": True, "window_right": 0 if causal else None}
                tile = _tilewright.backward_tile(head_dim, head_dim, False, **problem, **grouped)
                assert tile["second_pass"] == (seqlen <= last)
                assert not _tilewright.backward_tile(head_dim, head_dim, True, **problem, **grouped)["second_pass"]


@given(
    head_dim=head_dims,
    softcap=st.booleans(),
    seqlen=st.integers(1, 9000),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 9000),
    sink_tokens=st.sampled_from([0, 0, 4]),
    packed=st.booleans(),
    heads_kv=st.integers(1, 300),
    group=st.integers(1, 16) | st.integers(1, 200),
    deterministic=st.booleans(),
)
def test_choice_of_splits(
    head_dim, softcap, seqlen, causal, window, sink_tokens, packed, heads_kv, group, deterministic
):
    """As few as leave seven tiles to four multiprocessors, or three beside a second pass of few tiles, and without one
    four query heads to a tile that walks long sequences; or, where all tiles are alike, the fewest that make the rounds
    shorter by a tenth."""
    problem = {"seqlen_q": seqlen, "seqlen_k": seqlen, "window_left": window, "window_right": 0 if causal else None}
    tile = _tilewright.backward_tile(
        head_dim,
        head_dim,
        softcap,
        **problem,
        sink_tokens=sink_tokens,
        packed=packed,
        heads_kv=heads_kv,
        group=group,
        deterministic=deterministic,
    )
    tiles = heads_kv * -(-seqlen // tile["tile_n"])
    # The fewest that leave so many heads to a tile; the first split may have less.
    numbers = sorted({-(-group // -(-group // n)) for n in range(1, min(group, 64) + 1)})

    def length(splits):
        return -(-tiles * splits // 132) * -(-group // splits)

    wanted = 1
    if tile["whole_heads"]:
        pass
    elif causal or packed or (window or seqlen) < seqlen:
        beside = tile["second_pass"] and heads_kv * group * -(-seqlen // 128) <= 2 * 132
        enough = 132 * (3 if beside else 7) / 4
        short = (causal and window is not None and window + 1 < 2048 and not sink_tokens) or seqlen < 2048
        most = group if tile["second_pass"] or (short and not packed) else 4
        wanted = next((n for n in numbers if -(-group // n) <= most and tiles * n >= enough), numbers[-1])
    else:
        for n in numbers:
            if 10 * length(n) <= 9 * length(wanted):
                wanted = n
    assert tile["splits"] == wanted


@pytest.mark.parametrize(
    "heads_kv, group, seqlen, splits", [(4, 7, 2048, 4), (8, 4, 2048, 2), (8, 8, 2048, 2), (16, 4, 8192, 1),
                                        (8, 7, 8192, 2), (16, 8, 8192, 2), (32, 1, 2048, 1), (1, 8, 4096, 4),
                                        (1, 71, 2048, 15), (1, 71, 8192, 18), (8, 11, 8192, 3)],
)  # fmt: skip
def test_splits_of_common_problems(heads_kv, group, seqlen, splits):
    """The heads of Qwen2.5-7B, Llama-3-8B and -70B, Falcon-7B, causal, on an H200."""
    problem = {"seqlen_q": seqlen, "seqlen_k": seqlen, "window_right": 0, "heads_kv": heads_kv, "group": group}
    assert _tilewright.backward_tile(128, 128, **problem)["splits"] == splits


bounds = st.none() | st.integers(0, 300)
TILES = [(48, 128), (64, 64), (64, 128), (80, 128), (128, 128)]


@given(
    seqlen_q=st.integers(1, 700),
    seqlen_k=st.integers(1, 700),
    tile=st.sampled_from(TILES),
    window_left=bounds,
    window_right=bounds,
    sink_tokens=st.sampled_from([0, 0, 1, 64, 200]),
)
def test_walk_of_the_backward(seqlen_q, seqlen_k, tile, window_left, window_right, sink_tokens):
    """Each tile of queries is new to the first tile of keys that visits it, and to no other; it is visited when one of
    its queries sees a key."""
    tile_m, tile_n = tile
    window = (window_left, window_right, sink_tokens)
    visited = set()
    for begin, end, fresh in _tilewright.backward_walk(seqlen_q, seqlen_k, tile_m, tile_n, *window):
        assert begin <= fresh <= end
        tiles_of_step = set(range(begin, end))
        assert set(range(fresh, end)) == tiles_of_step - visited
        visited |= tiles_of_step
    # As the conversion of dQ's sums sees it, and as it is.
    ((begin, end, fresh),) = _tilewright.backward_walk(seqlen_q, seqlen_k, tile_m, seqlen_k, *window)
    assert visited == set(range(begin, end)) and fresh == begin
    position = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    key = torch.arange(seqlen_k)
    sees = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if window_left is not None:
        sees &= (key >= position - window_left) | (key < sink_tokens)
    if window_right is not None:
        sees &= key <= position + window_right
    assert visited == {i // tile_m for i in sees.any(1).nonzero().flatten().tolist()}


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
