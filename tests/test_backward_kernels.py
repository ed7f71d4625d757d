"""The ways in which the Hopper backward computes a gradient, each where it is chosen (csrc/kernels/backward/select.h),
against the oracle."""

import cases
import pytest
import tiles
import torch

pytestmark = pytest.mark.gpu


WHOLE_HEADS = [
    {},
    {"causal": True},
    {"window": (30, 12)},
    {"window": (70, 0), "sink_tokens": 3},
    {"causal": True, "softcap": 9.0},
    {"scale": -0.2},
]


def check_order(q, k, v, dout, dlse, grads, options):
    """dQ's sums have one order: the bits are the same every run, whatever `deterministic` says."""
    for deterministic in (False, True):
        again = cases.gradients(cases.call, q, k, v, dout, dlse, deterministic=deterministic, **options)
        assert all(torch.equal(grad, grads[name]) for name, grad in again.items())


@pytest.mark.parametrize("options", WHOLE_HEADS, ids=str)
@pytest.mark.parametrize("heads_q", [2, 4])
@pytest.mark.parametrize(
    "head_dim, head_dim_v, seqlen_q, seqlen_k, softcap",
    [
        (64, 64, 190, 270, {}),
        (64, 64, 180, 600, {}),
        (64, 64, 190, 200, {}),
        (128, 128, 130, 300, {"softcap": 9.0}),  # without it these have a second pass
        (120, 104, 150, 600, {"softcap": 9.0}),
        (192, 128, 96, 300, {}),
    ],
    ids=str,
)
def test_whole_heads(device, dtype, head_dim, head_dim_v, seqlen_q, seqlen_k, softcap, heads_q, options):
    """Blocks that take two key heads each, from end to end (kernels/backward/whole_heads.cuh)."""
    count = tiles.multiprocessors(device)
    options = {**options, **softcap}
    lengths = [seqlen_q] * count, [seqlen_k] * count
    problem = tiles.Problem(head_dim, head_dim_v, *lengths, False, options, heads_q, heads_kv=2)
    tile = problem.backward_tile(count)
    assert tile["whole_heads"] and seqlen_k > tile["tile_n"]
    (q, k, v), options = problem.make(device, dtype)
    dout, dlse = cases.into_outputs(q, v)
    grads = cases.check_gradients(q, k, v, dout=dout, dlse=dlse, **options)
    check_order(q, k, v, dout, dlse, grads, options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "head_dim, head_dim_v, lengths_q, lengths_k, options",
    [
        (*sizes, options)
        for sizes in [
            (64, 64, [300] * 5, [270] * 5),
            (40, 24, [65, 129, 400], [500, 63, 129]),
            (96, 96, [240] * 9, [210] * 9),
            (72, 40, [65, 129, 400], [500, 63, 129]),
            (128, 128, [240] * 40, [210] * 40),
            (104, 120, [500, 1, 64], [64, 600, 500]),
            (256, 256, [300] * 20, [310] * 20),
            (200, 136, [900, 77], [100, 1000]),
        ]
        for options in [*WHOLE_HEADS, {"softcap": 5.0, "window": (None, 9), "sink_tokens": 70}]
        if sizes[0] > 128 or "softcap" not in options  # up to 128 softcap has none
    ],
    ids=str,
)
def test_second_pass(device, dtype, head_dim, head_dim_v, lengths_q, lengths_k, options, packed):
    """dQ by itself (kernels/backward/sm90_second_pass.cuh). What lay in memory before is no number."""
    if not packed:
        lengths_q, lengths_k = lengths_q[:1] * len(lengths_q), lengths_k[:1] * len(lengths_k)
    problem = tiles.Problem(head_dim, head_dim_v, lengths_q, lengths_k, packed, options, heads_q=6, heads_kv=2)
    assert problem.backward_tile(tiles.multiprocessors(device))["second_pass"]
    (q, k, v), options = problem.make(device, dtype)
    dout, dlse = cases.into_outputs(q, v)
    torch.full((1 << 26,), float("nan"), device=device)
    grads = cases.check_gradients(q, k, v, dout=dout, dlse=dlse, **options)
    check_order(q, k, v, dout, dlse, grads, options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [options for options in WHOLE_HEADS if "softcap" not in options], ids=str)
@pytest.mark.parametrize(
    "head_dim, head_dim_v, lengths_q, lengths_k",
    [
        (64, 64, [300] * 30, [270] * 30),
        (40, 56, [1, 400, 130, 64] * 8, [300, 200, 1, 129] * 8),
        (96, 96, [200, 60], [4300, 4400]),
        (128, 128, [200, 60], [4300, 4400]),
        (104, 120, [4300, 4350], [200, 129]),
        (192, 128, [300, 70], [400, 270]),
    ],
    ids=str,
)
def test_additions(device, dtype, head_dim, head_dim_v, lengths_q, lengths_k, options, packed):
    """Blocks that add to the same rows of dq, in any order and in turns (kernels/backward/turns.cuh), in memory that
    held no numbers before."""
    if not packed:
        lengths_q, lengths_k = lengths_q[:1] * len(lengths_q), lengths_k[:1] * len(lengths_k)
    if 64 < head_dim <= 128 and "window" in options:  # a narrow one has a second pass
        left, right = options["window"]
        options = {**options, "window": (left + 1000, right)}
    problem = tiles.Problem(head_dim, head_dim_v, lengths_q, lengths_k, packed, options)
    for deterministic in (False, True):
        tile = problem.backward_tile(tiles.multiprocessors(device), deterministic)
        assert not tile["second_pass"] and not tile["whole_heads"]
    (q, k, v), options = problem.make(device, dtype)
    dout, dlse = cases.into_outputs(q, v)
    torch.full((1 << 26,), float("nan"), device=device)
    cases.check_gradients(q, k, v, dout=dout, dlse=dlse, **options)
    grads = cases.check_gradients(q, k, v, dout=dout, dlse=dlse, deterministic=True, **options)
    for _ in range(3):
        again = cases.gradients(cases.call, q, k, v, dout, dlse, deterministic=True, **options)
        assert all(torch.equal(grad, grads[name]) for name, grad in again.items())


@pytest.mark.parametrize("options", [{"causal": True}, {"window": (70, 200)}], ids=str)
@pytest.mark.parametrize(
    "lengths, packed, heads_kv", [([550] * 50, False, 1), ([420] * 31, False, 2), ([700, 500], True, 50)], ids=str
)
@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 64), (192, 128)])
def test_groups_of_heads_in_turns(device, dtype, head_dim, head_dim_v, lengths, packed, heads_kv, options):
    """So many heads that groups of them overlap (TileOrder::at_overlapping); the last group is a smaller one."""
    problem = tiles.Problem(head_dim, head_dim_v, lengths, lengths, packed, options, 8 * heads_kv, heads_kv)
    tile = problem.backward_tile(tiles.multiprocessors(device), True)
    assert not tile["second_pass"] and not tile["whole_heads"]
    (q, k, v), options = problem.make(device, dtype)
    dout, dlse = cases.into_outputs(q, v)
    torch.full((1 << 26,), float("nan"), device=device)
    grads = cases.check_gradients(q, k, v, dout=dout, dlse=dlse, deterministic=True, **options)
    again = cases.gradients(cases.call, q, k, v, dout, dlse, deterministic=True, **options)
    assert all(torch.equal(grad, grads[name]) for name, grad in again.items())


@pytest.mark.parametrize(
    "options, deterministic",
    [
        ({}, False),
        ({"causal": True}, True),
        ({"window": (300, 40), "sink_tokens": 3}, False),
        ({"causal": True, "softcap": 20.0}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths, packed", [([1300], False), ([700, 0, 600], True)], ids=str)
@pytest.mark.parametrize("heads_kv, group", [(2, 7), (3, 16), (1, 37)])
@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 64), (88, 80), (128, 128), (192, 128), (256, 256)])
def test_splits(device, dtype, head_dim, head_dim_v, heads_kv, group, lengths, packed, options, deterministic):
    """The query heads of a key head are cut up (kernels/backward/splits.cuh). What lay in memory is no number."""
    problem = tiles.Problem(head_dim, head_dim_v, lengths, lengths, packed, options, heads_kv * group, heads_kv)
    tile = problem.backward_tile(tiles.multiprocessors(device), deterministic)
    assert tile["splits"] > 1
    (q, k, v), options = problem.make(device, dtype)
    dout, dlse = cases.into_outputs(q, v)
    torch.full((1 << 26,), float("nan"), device=device)
    grads = cases.check_gradients(q, k, v, dout=dout, dlse=dlse, deterministic=deterministic, **options)
    for _ in range(3):
        again = cases.gradients(cases.call, q, k, v, dout, dlse, deterministic=deterministic, **options)
        for name, grad in again.items():
            assert (name == "q" and not deterministic) or torch.equal(grad, grads[name]), name


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 64), (96, 96), (128, 128), (192, 128)])
def test_additions_of_a_group(device, dtype, head_dim, head_dim_v, options, deterministic):
    """So many tiles of keys that each walks all query heads of its key head."""
    problem = tiles.Problem(head_dim, head_dim_v, [2100], [2100], False, options, heads_q=28, heads_kv=14)
    tile = problem.backward_tile(tiles.multiprocessors(device), deterministic)
    assert not tile["second_pass"] and not tile["whole_heads"] and tile["splits"] == 1
    (q, k, v), options = problem.make(device, dtype)
    dout, dlse = cases.into_outputs(q, v)
    torch.full((1 << 26,), float("nan"), device=device)
    cases.check_gradients(q, k, v, dout=dout, dlse=dlse, deterministic=deterministic, **options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_many_heads(device, dtype, head_dim, options, packed):
    """More heads, which blocks share, than zeros for dQ's sums need be written for before the kernel
    (kernels/backward/zeros.cuh; packed all are). What lay in memory before is no number."""
    count = tiles.multiprocessors(device)
    batch, heads = (5, 100) if packed else (count * 3 // 4, 2)
    seqlen = 600 if head_dim in (96, 128) and not options and not packed else 300  # not in two passes
    problem = tiles.Problem(head_dim, head_dim, [seqlen] * batch, [seqlen] * batch, packed, options, heads, heads)
    assert not problem.backward_tile(count)["whole_heads"]
    (q, k, v), options = problem.make(device, dtype)
    dout, dlse = cases.into_outputs(q, v)
    torch.full((1 << 27,), float("nan"), device=device)
    cases.check_gradients(q, k, v, dout=dout, dlse=dlse, **options)


@pytest.mark.parametrize(
    "lengths_q, lengths_k, packed, options",
    [
        ([3000] * 4, [200] * 4, False, {"causal": True}),
        ([200] * 4, [3000] * 4, False, {"window": (50, 0)}),
        ([100] * 40, [0] * 15 + [90] * 10 + [0] * 15, True, {}),
        ([0] * 15 + [90] * 10 + [0] * 15, [100] * 40, True, {}),
        ([1000] * 10, [100] * 10, True, {"causal": True}),
    ],
    ids=["queries", "keys", "sequences of queries", "sequences of keys", "packed queries"],
)
@pytest.mark.parametrize("head_dim, head_dim_v", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_tiles_that_see_nothing(device, dtype, head_dim, head_dim_v, lengths_q, lengths_k, packed, options):
    """More of them in a row than a block has slots for tiles, before, between and behind others."""
    problem = tiles.Problem(head_dim, head_dim_v, lengths_q, lengths_k, packed, options, heads_q=20, heads_kv=20)
    (q, k, v), options = problem.make(device, dtype)
    dout, dlse = cases.into_outputs(q, v)
    cases.check_gradients(q, k, v, dout=dout, dlse=dlse, **options)
