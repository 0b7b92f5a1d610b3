"""The sampler of csrc/sample_tokens.cu, run by host threads, and that of csrc/cpu: token for token the reference's, the former in every
launch with the same bits."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from fst_kernels import backends, sample_tokens
from fst_kernels import library as library_module
from fst_kernels.sampling import cuda, reference
from fst_kernels.sampling.cuda import Launch, launch_kernel
from tests.compiler import needs_a_compiler
from tests.kernels.test_sampling import truncated

RESIDENT, CLUSTER, AGAIN = Launch(64, 1, 1), Launch(32, 2, 1), Launch(64, 1, 0)
CPU = Launch(-1)  # stands for the kernel of csrc/cpu
LAUNCHES = (RESIDENT, CLUSTER, AGAIN, CPU)
NAMES = ["resident", "cluster", "read again", "cpu"]
RULES = (
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 100},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"top_p": 1 - 1e-9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 2.0, "top_k": 20, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
)


def numbers(rows, seed=0):
    """Seeds and positions; those of fewer rows are the first of more."""
    g = torch.Generator().manual_seed(seed)
    both = torch.randint(-(2**62), 2**62, (2, 4999), generator=g)
    return both[0, :rows].contiguous(), both[1, :rows].contiguous()


def host(logits, launch=RESIDENT, temperature=1.0, top_k=None, top_p=None, min_p=None, seed=0):
    top_k = None if top_k is not None and top_k >= logits.shape[1] else top_k
    return launched(logits, temperature, top_k, top_p, min_p, *numbers(len(logits), seed), launch)


def launched(logits, *rest):
    *rest, launch = rest
    if launch is CPU:
        needs_a_compiler("cpu")
        return launch_kernel(logits.float(), *rest, "cpu")
    return launch_kernel(logits, *rest, "host", launch)


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_like_reference(logits, got=None, seed=0, **rules):
    """Equal ids, or a draw that falls within rounding of the boundary between two tokens; log-probs to 2e-6 of their size."""
    got = host(logits, seed=seed, **rules) if got is None else got
    s, p = numbers(len(logits), seed)
    want = sample_tokens(logits, seeds=s, positions=p, backend="reference", **rules)
    for row in (got[0] != want.ids).nonzero().flatten().tolist():
        q = truncated(logits[row].float(), **rules)
        cumulative, target = q.cumsum(0), reference.uniform(s[row : row + 1], p[row : row + 1])
        assert q[got[0][row]] > 0
        lower, upper = sorted((int(got[0][row]), int(want.ids[row])))
        assert (cumulative[upper - 1 if upper - lower == 1 else lower] - target).abs() < 1e-6, row
    same = got[0] == want.ids
    assert same.float().mean() > 0.95 or len(same) < 20
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a[same], b[same], rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("vocabulary", [2, 123, 500])
def test_the_kernel_draws_what_the_reference_draws_in_every_launch_with_the_same_bits(vocabulary, rules):
    logits = 3 * torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    first = host(logits, RESIDENT, **rules)
    assert_like_reference(logits, first, **rules)
    few = logits[:2]
    for launch in (CLUSTER, AGAIN):
        assert same_bits(host(few, launch, **rules), [x[:2] for x in first])
    assert_like_reference(logits, host(logits, CPU, **rules), **rules)


@pytest.mark.parametrize("vocabulary", [50257, 151936])
def test_vocabularies_of_language_models(vocabulary):
    logits = 2.5 * torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(1))
    for rules in (
        ({"top_k": 50, "top_p": 0.95}, {"top_p": 0.9}) if vocabulary > 1e5 else ({}, {"top_k": 5000})
    ):
        got = host(logits, CLUSTER if vocabulary < 1e5 else AGAIN, **rules)
        assert_like_reference(logits, got, **rules)
    for rules in ({}, {"top_k": 5000}, {"top_k": 50, "top_p": 0.95}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert_like_reference(logits, host(logits, CPU, **rules), **rules)


@pytest.mark.parametrize("launch", [Launch(32, 1, 1), CPU], ids=["host", "cpu"])
@pytest.mark.parametrize("rules", [{"top_k": 4}, {"top_p": 0.7}, {"temperature": 2.0, "min_p": 0.2}], ids=str)
def test_draws_follow_the_distribution(rules, launch):
    row, draws = (
        1.5 * torch.randn(12, generator=torch.Generator().manual_seed(3)),
        4000 if launch is CPU else 120,
    )
    p = truncated(row, **rules)
    ids, logprob, untruncated = host(row.repeat(draws, 1), launch, seed=5, **rules)
    counts, kept = torch.bincount(ids, minlength=12).double(), p > 0
    assert (counts[~kept] == 0).all()
    freedom = int(kept.sum()) - 1
    chi_square = ((counts - draws * p)[kept] ** 2 / (draws * p[kept])).sum()
    assert chi_square <= freedom + 4 * math.sqrt(2 * freedom)
    torch.testing.assert_close(logprob, p[ids].log().float(), rtol=1e-6, atol=2e-6)
    plain = truncated(row, rules.get("temperature", 1.0))
    torch.testing.assert_close(untruncated, plain[ids].log().float(), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("launch", LAUNCHES, ids=NAMES)
def test_equal_logits_keep_the_lower_ids_wherever_the_cut_falls(launch):
    """400 equal logits lie over several warps and tiles; ranks among them are counted across all of these."""
    for k in (2, 130, 257):
        ids, logprob, _ = host(torch.zeros(6, 400), launch, top_k=k, seed=k)
        assert (ids < k).all()
        torch.testing.assert_close(logprob, torch.full((6,), -math.log(k)), rtol=1e-6, atol=1e-6)
        assert len(ids.unique()) > 1
    ids, logprob, _ = host(torch.zeros(6, 400), launch, top_p=0.25)
    assert (ids < 100).all()
    torch.testing.assert_close(logprob, torch.full((6,), -math.log(100)), rtol=1e-6, atol=1e-6)
    half = torch.cat([torch.ones(3, 5), torch.zeros(3, 395)], 1).flip(1)
    assert_like_reference(half, host(half, launch, top_k=40), top_k=40)
    assert_like_reference(half, host(half, launch, top_p=0.3), top_p=0.3)


def test_signed_zeros_are_equal_and_order_is_that_of_the_logits():
    zeros = torch.zeros(12, 8)
    zeros[:, ::2] = -0.0
    for k in (3, 5):  # fewer and more than there are of the one sign
        ids, logprob, _ = host(zeros, top_k=k)
        assert set(ids.tolist()) <= set(range(k))
        torch.testing.assert_close(logprob, torch.full((12,), -math.log(k)), rtol=1e-6, atol=1e-6)
    close = torch.tensor([1.0, 1.0 + 2**-23, 1.0 - 2**-24, -5.0, 1.0 + 2**-22]).repeat(12, 1)
    assert set(host(close, top_k=2)[0].tolist()) == {1, 4}
    assert set(host(close, top_k=3)[0].tolist()) == {0, 1, 4}


def test_extreme_rows():
    rows = [
        [200.0] + [-200.0] * 9,
        [-200.0] * 10,
        [3e38, 2e38, -3e38, 0, 0, 0, 0, 0, 0, 0],
        [-math.inf] * 9 + [-1e30],
        [0.0, -math.inf] * 5,
        [1e-40, -1e-40, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    logits = torch.tensor(rows)
    for i, rules in enumerate((*RULES, *RULES)):
        got = host(logits, LAUNCHES[i % 3] if i < len(RULES) else CPU, **rules)
        assert_like_reference(logits, got, **rules)
        assert torch.isfinite(logits[torch.arange(6), got[0]]).all()
    for tiny, launch in itertools.product((1e-30, 1e-42), (RESIDENT, CPU)):
        assert host(logits[:1], launch, temperature=tiny)[0] == 0


def test_temperature_per_row_and_greedy_rows():
    logits = torch.randn(6, 200, generator=torch.Generator().manual_seed(0))
    logits[2, 150], logits[2, 20] = 9.0, 9.0
    t = torch.tensor([0.1, 0.5, 0.0, 1.0, 3.0, 0.0])
    several = ({}, {"top_p": 0.9}, {"top_k": 5, "min_p": 0.1})
    for launch, rules in (*zip(LAUNCHES, several, strict=False), *((CPU, rules) for rules in several)):
        got = host(logits, launch, temperature=t, **rules)
        assert_like_reference(logits, got, temperature=t, **rules)
        assert got[0][2] == 20
        assert got[0][5] == logits[5].argmax()
        assert got[1][2] == 0
        assert got[1][5] == 0
    for launch in (RESIDENT, CPU):
        assert host(logits, launch, temperature=0.0)[0].tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize("launch", LAUNCHES, ids=NAMES)
def test_rules_per_row_are_those_of_each_row_in_every_launch(launch):
    """Rows of one batch go all the ways through the kernel: none, greedy, by count, by mass, both, min_p, more than a block can list."""
    logits = 2 * torch.randn(7, 301, generator=torch.Generator().manual_seed(12))
    s, p = numbers(7)
    temperature = torch.tensor([1.0, 0.0, 0.7, 1.5, 1.0, 1.0, 2.0])
    top_k = torch.tensor([301, 9, 5, 400, 40, 1, 301])
    top_p = torch.tensor([1.0, 0.5, 1.0, 0.8, 0.9, 1.0, 1.0], dtype=torch.float64)
    min_p = torch.tensor([0.0, 0.1, 0.0, 0.0, 0.05, 0.0, 0.02], dtype=torch.float64)
    whole = launched(logits, temperature, top_k, top_p, min_p, s, p, launch)
    for i in range(7):
        k = None if top_k[i] >= 301 else int(top_k[i])
        own = (temperature[i : i + 1].clone(), k, top_p[i].item(), min_p[i].item())
        alone = launched(logits[i : i + 1].clone(), *own, s[i : i + 1].clone(), p[i : i + 1].clone(), launch)
        assert same_bits([x[i : i + 1] for x in whole], alone), i
    want = reference.sample(logits, temperature, top_k, top_p, min_p, s, p)
    assert torch.equal(whole[0], want[0])
    for a, b in zip(whole[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("launch", LAUNCHES, ids=NAMES)
def test_reruns_and_neighbours_do_not_change_a_bit(launch):
    logits = 2 * torch.randn(5, 301, generator=torch.Generator().manual_seed(2))
    s, p = numbers(5)
    rules = (0.8, 30, 0.9, 0.01)
    whole = launched(logits, *rules, s, p, launch)
    assert same_bits(whole, launched(logits, *rules, s, p, launch))
    alone = launched(logits[3:4].clone(), *rules, s[3:4].clone(), p[3:4].clone(), launch)
    assert same_bits([x[3:4] for x in whole], alone)


@pytest.mark.parametrize("launch", LAUNCHES, ids=NAMES)
def test_bf16_fp16_and_unaligned_rows(launch):
    x = 3 * torch.randn(4, 333, generator=torch.Generator().manual_seed(4))
    assert same_bits(host(x.bfloat16(), launch, top_k=9), host(x.bfloat16().float(), launch, top_k=9))
    wide = torch.full((4, 500), 50.0)
    for offset in (1, 4):
        view = wide[:, offset : offset + 333]
        view.copy_(x)
        assert same_bits(host(view, launch, top_p=0.8), host(x, launch, top_p=0.8))
    s, p = numbers(4)
    half = sample_tokens(x.half(), top_k=9, seeds=s, positions=p, backend="host")
    assert same_bits(half, host(x.half().float(), top_k=9))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.nan])
def test_unusable_rows_are_named_and_spoil_nobody_else(bad):
    x = torch.zeros(4, 300)
    x[1, 299] = bad
    x[3] = -math.inf
    for launch, rules in itertools.product(
        LAUNCHES, ({}, {"top_p": 0.9}, {"top_k": 3}, {"temperature": 0.0})
    ):
        _, logprob, untruncated = host(x, launch, **rules)
        assert logprob.isnan().tolist() == untruncated.isnan().tolist() == [False, True, False, True]
    s, p = numbers(4)
    with pytest.raises(ValueError, match="logits row 1 holds NaN"):
        sample_tokens(x, seeds=s, positions=p, backend="host")


def test_no_rows_one_token_and_what_is_refused():
    one = host(torch.tensor([[-7.0]]), top_p=0.5)
    assert [x.item() for x in one] == [0, 0, 0]
    s, p = numbers(0)
    assert [len(x) for x in sample_tokens(torch.zeros(0, 5), seeds=s, positions=p, backend="host")] == [
        0,
        0,
        0,
    ]
    x = torch.zeros(1, 99)
    for launch in (Launch(33), Launch(1024), Launch(cluster=3), Launch(cluster=4), Launch(64, 2, 0)):
        with pytest.raises(
            RuntimeError, match=r"sample_tokens on \[1, 99\] with Launch.*: an argument is out of range"
        ):
            host(x, launch)
    with pytest.raises(RuntimeError, match="an argument is out of range"):  # 600 KB do not fit into one block
        host(torch.zeros(1, 151936), RESIDENT)
    s, p = numbers(1)
    with pytest.raises(RuntimeError, match="backend=cuda cannot run: it needs a CUDA device"):
        sample_tokens(x, seeds=s, positions=p, backend="cuda")
    wide = torch.zeros(1, 1).expand(1, cuda.LARGEST_VOCABULARY + 1)
    with pytest.raises(ValueError, match=r"logits has 4194305 columns; backend=host takes up to 4194304"):
        sample_tokens(wide, seeds=s, positions=p, backend="host")


@pytest.mark.parametrize("top_k", [5, torch.tensor([5, 2, 40])], ids=["one number", "per row"])
@pytest.mark.parametrize("backend", ["host", "reference"])
def test_a_compiled_model_can_hold_the_operation_in_one_graph(backend, top_k):
    def step(x, s, p):
        return sample_tokens(
            x * 2, top_k=top_k, top_p=torch.full((3,), 0.9), seeds=s, positions=p, backend=backend
        )

    x, (s, p) = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)), numbers(3)
    assert same_bits(torch.compile(step, fullgraph=True, backend="aot_eager")(x, s, p), step(x, s, p))


def test_the_operation_holds_what_torch_asks_of_one():
    x, (s, p) = torch.randn(3, 40), numbers(3)
    torch.library.opcheck(
        cuda.sample_tokens_op, (x, 1.0, 5, None, None, torch.ones(3), None, torch.ones(3), None, s, p, "host"), test_utils=("test_schema", "test_faketensor")
    )  # fmt: skip


def test_a_library_that_is_absent_or_built_from_other_sources_is_refused(monkeypatch):
    fields = [*cuda._SampleTokens._fields_, ("more", cuda.ctypes.c_int64)]
    longer = type("_SampleTokens", (cuda.ctypes.Structure,), {"_fields_": fields})
    monkeypatch.setattr(cuda, "_SampleTokens", longer)
    with pytest.raises(
        RuntimeError, match=r"built from other sources \(its arguments take \d+ bytes, \d+ exp.*build it"
    ):
        cuda._library.__wrapped__("host")
    assert "for tests" in backends()["sample_tokens"]["others"]["host"]
    for name in ("_CHECKOUT", "_PACKAGE"):
        monkeypatch.setattr(library_module, name, Path("/nowhere"))
    assert "it compiles /nowhere/csrc, which is not there" in library_module.missing("host")
    assert "cmake --build build/csrc" in library_module.missing("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_on_a_gpu_every_launch_draws_what_the_reference_draws(rules):
    if (reason := library_module.missing("cuda")) is not None:
        pytest.skip(reason)
    newest = torch.cuda.get_device_capability()[0] >= 9
    for vocabulary, dtype in itertools.product((123, 50257, 151936), (torch.float32, torch.bfloat16)):
        logits = (3 * torch.randn(64, vocabulary, generator=torch.Generator().manual_seed(1))).to(dtype)
        s, p = numbers(64)
        top_k = rules.get("top_k") if rules.get("top_k", 0) < vocabulary else None
        arguments = (
            rules.get("temperature", 1.0),
            top_k,
            rules.get("top_p"),
            rules.get("min_p"),
            s.cuda(),
            p.cuda(),
        )
        first = launch_kernel(logits.cuda(), *arguments)
        assert_like_reference(logits, [x.cpu() for x in first], **rules)
        for launch in (Launch(resident=0), *(Launch(cluster=c) for c in ((8,) if newest else ()))):
            assert same_bits(first, launch_kernel(logits.cuda(), *arguments, launch=launch))
