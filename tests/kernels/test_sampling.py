"""sample_tokens against known answers of its random numbers, and against the distributions it promises."""

import math

import pytest
import torch

from fst_kernels import sample_tokens
from fst_kernels.sampling import reference
from fst_kernels.sampling.reference import philox, uniform
from tests.compiler import needs_a_compiler


@pytest.fixture(params=["reference", "cpu"], autouse=True)
def backend(request, monkeypatch):
    """Whatever is sampled here is sampled by both."""
    needs_a_compiler(request.param)
    monkeypatch.setenv("FST_KERNELS", request.param)
    return request.param


def positions(count, start=0):
    return torch.arange(start, start + count)


def seeds(count, value=11):
    return torch.full((count,), value)


def truncated(row, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The definition for one row, token by token."""
    p = (row.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda v: (-p[v], v))[:top_k]
    if top_p is not None:
        mass, nucleus = 0.0, []
        for v in order:
            if mass >= top_p * sum(p[u] for u in order):
                break
            nucleus.append(v)
            mass += p[v]
        order = nucleus
    kept = [v for v in order if p[v] >= (min_p or 0) * max(p)]
    total = sum(p[v] for v in kept)
    return torch.tensor([p[v] / total if v in kept else 0.0 for v in range(len(p))], dtype=torch.float64)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # the vectors published with Random123
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, answer):
    words = philox(torch.tensor([counter] * 3).t(), torch.tensor([key] * 3).t())
    assert words.t().tolist() == [answer] * 3


def test_uniform_numbers_use_all_64_bits_of_seed_and_position():
    assert uniform(torch.tensor([0]), torch.tensor([0])) == 0x6627E8D5 / 2**32
    pairs = torch.tensor([[0, 0], [1, 0], [0, 1], [1 << 32, 0], [0, 1 << 32], [-1, 0], [0, -1], [1 << 62, 5]])
    assert len(set(uniform(pairs[:, 0], pairs[:, 1]).tolist())) == len(pairs)
    u = uniform(seeds(20000), positions(20000))
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * 20000)
    assert abs(torch.corrcoef(torch.stack((u[:-1], u[1:])))[0, 1]) < 4 / math.sqrt(20000)
    neighbours = torch.stack(
        (uniform(positions(20000), seeds(20000)), uniform(positions(20000) + 1, seeds(20000)))
    )
    assert abs(torch.corrcoef(neighbours)[0, 1]) < 4 / math.sqrt(20000)


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.8},
        {"temperature": 0.7, "top_k": 8, "top_p": 0.9, "min_p": 0.15},
        {"top_k": 1},
    ],
    ids=str,
)
def test_samples_follow_the_distribution_and_report_its_logprob(rules):
    g = torch.Generator().manual_seed(3)
    row, draws = 1.5 * torch.randn(12, generator=g), 20000
    p = truncated(row, **rules)
    out = sample_tokens(row.expand(draws, -1), seeds=seeds(draws), positions=positions(draws), **rules)
    counts = torch.bincount(out.ids, minlength=12).double()
    kept = p > 0
    assert (counts[~kept] == 0).all()
    freedom = int(kept.sum()) - 1
    chi_square = ((counts - draws * p)[kept] ** 2 / (draws * p[kept])).sum()
    assert chi_square <= freedom + 4 * math.sqrt(2 * freedom)
    torch.testing.assert_close(out.logprob, p[out.ids].log().float())
    plain = truncated(row, rules.get("temperature", 1.0))
    torch.testing.assert_close(out.untruncated_logprob, plain[out.ids].log().float())
    assert out.ids.dtype == torch.int64


def test_rules_that_keep_everything_change_nothing():
    x = torch.randn(50, 9)
    plain = sample_tokens(x, seeds=seeds(50), positions=positions(50))
    for rules in ({"top_k": 9}, {"top_k": 100}, {"top_p": 1.0}, {"min_p": 0.0}):
        kept = sample_tokens(x, seeds=seeds(50), positions=positions(50), **rules)
        assert all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True))
    assert torch.equal(plain.logprob, plain.untruncated_logprob)


def test_equal_logits_keep_the_lower_ids():
    out = sample_tokens(torch.zeros(300, 8), top_k=3, seeds=seeds(300), positions=positions(300))
    assert set(out.ids.tolist()) == {0, 1, 2}
    torch.testing.assert_close(out.logprob, torch.full((300,), -math.log(3.0)))
    torch.testing.assert_close(out.untruncated_logprob, torch.full((300,), -math.log(8.0)))


@pytest.mark.parametrize(
    "rules", [{}, {"temperature": 0.6, "top_p": 0.95}, {"top_k": 5, "min_p": 0.1}], ids=str
)
@pytest.mark.parametrize("vocabulary", [123, 40009])
def test_a_row_does_not_depend_on_its_neighbours(rules, vocabulary):
    g = torch.Generator().manual_seed(7)
    x = 3 * torch.randn(70, vocabulary, generator=g)
    s, p = torch.randint(-(2**62), 2**62, (70,), generator=g), torch.randint(0, 4000, (70,), generator=g)
    whole = sample_tokens(x, seeds=s, positions=p, **rules)
    order = torch.randperm(70, generator=g)
    shuffled = sample_tokens(x[order], seeds=s[order], positions=p[order], **rules)
    assert all(torch.equal(a[order], b) for a, b in zip(whole, shuffled, strict=True))
    for i in (0, 33, 69):
        alone = sample_tokens(x[i : i + 1], seeds=s[i : i + 1], positions=p[i : i + 1], **rules)
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole, alone, strict=True))
    assert not torch.equal(whole.ids, sample_tokens(x, seeds=s + 1, positions=p, **rules).ids)
    assert not torch.equal(whole.ids, sample_tokens(x, seeds=s, positions=p + 1, **rules).ids)


def test_temperature_per_row_equals_row_by_row():
    x, t = torch.randn(6, 20), torch.tensor([0.1, 0.5, 0.0, 1.0, 2.0, 0.0])
    whole = sample_tokens(x, temperature=t, top_p=0.9, seeds=seeds(6), positions=positions(6))
    for i in range(6):
        one = sample_tokens(
            x[i : i + 1], temperature=float(t[i]), top_p=0.9, seeds=seeds(1), positions=positions(1, i)
        )
        assert one.ids == whole.ids[i]
        torch.testing.assert_close(one.logprob[0], whole.logprob[i])
        torch.testing.assert_close(one.untruncated_logprob[0], whole.untruncated_logprob[i])


ROW_RULES = {
    "top_k": torch.tensor([1, 2, 20, 3, 7, 500, 4]),
    "top_p": torch.tensor([0.9, 0.2, 1.0, 0.5, 1.0, 1.0, 0.99], dtype=torch.float64),
    "min_p": torch.tensor([0.0, 0.1, 0.3, 0.0, 1.0, 0.0, 0.02], dtype=torch.float64),
}
ROW_TEMPERATURE = torch.tensor([1.0, 0.5, 2.0, 0.0, 0.7, 1.0, 1.3])


@pytest.mark.parametrize(
    "names", [("top_k",), ("top_p",), ("min_p",), ("top_k", "top_p"), tuple(ROW_RULES)], ids="+".join
)
def test_rules_per_row_sample_each_row_as_a_call_with_its_numbers(names):
    """Bit for bit, log-probs too; row 5 is left whole, row 3 is greedy."""
    x = 2 * torch.randn(7, 20, generator=torch.Generator().manual_seed(8))
    rules = {name: ROW_RULES[name] for name in names}
    for temperature in (0.8, ROW_TEMPERATURE):
        whole = sample_tokens(x, temperature=temperature, seeds=seeds(7), positions=positions(7), **rules)
        for i in range(7):
            own = {name: rule[i].item() for name, rule in rules.items()}
            t = temperature if isinstance(temperature, float) else temperature[i : i + 1]
            one = sample_tokens(x[i : i + 1], temperature=t, seeds=seeds(1), positions=positions(1, i), **own)
            assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole, one, strict=True)), i
        assert whole.logprob[5] == whole.untruncated_logprob[5]
        assert (whole.logprob != whole.untruncated_logprob).sum() >= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_number_for_all_rows_and_the_same_in_every_row_draw_the_same_bits(dtype):
    g = torch.Generator().manual_seed(2)
    x, s = 3 * torch.randn(300, 40, generator=g), torch.randint(-(2**62), 2**62, (300,), generator=g)
    numbers = {
        "top_k": 9,
        "top_p": torch.tensor(0.8, dtype=dtype).item(),
        "min_p": torch.tensor(0.05, dtype=dtype).item(),
    }
    tensors = {
        "top_k": torch.full((300,), 9, dtype=torch.int32), "top_p": torch.full((300,), 0.8, dtype=dtype),
        "min_p": torch.full((300,), 0.05, dtype=dtype),
    }  # fmt: skip
    want = sample_tokens(x, seeds=s, positions=positions(300), **numbers)
    got = sample_tokens(x, seeds=s, positions=positions(300), **tensors)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not torch.equal(want.ids, sample_tokens(x, seeds=s, positions=positions(300)).ids)


def test_rules_per_row_follow_the_distributions_of_their_rows():
    """A row of its own kind for each of four sets of rules, drawn 5000 times side by side."""
    row, draws = 1.5 * torch.randn(12, generator=torch.Generator().manual_seed(3)), 20000
    several = [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 6, "top_p": 0.8, "min_p": 0.1}]
    off = {"top_k": 12, "top_p": 1.0, "min_p": 0.0}
    kind = torch.arange(draws) % 4
    rules = {name: torch.tensor([one.get(name, none) for one in several])[kind] for name, none in off.items()}
    out = sample_tokens(row.expand(draws, -1), seeds=seeds(draws), positions=positions(draws), **rules)
    for i, one in enumerate(several):
        p, mine = truncated(row, **one), kind == i
        counts, kept = torch.bincount(out.ids[mine], minlength=12).double(), p > 0
        assert (counts[~kept] == 0).all()
        freedom, many = int(kept.sum()) - 1, int(mine.sum())
        chi_square = ((counts - many * p)[kept] ** 2 / (many * p[kept])).sum()
        assert chi_square <= freedom + 4 * math.sqrt(2 * freedom)
        torch.testing.assert_close(out.logprob[mine], p[out.ids[mine]].log().float())


def test_temperature_zero_takes_the_first_of_the_most_probable_tokens():
    x = torch.tensor([[0.0, 2.0, 2.0, 1.0], [5.0, 1.0, 0.0, -torch.inf]])
    out = sample_tokens(x, temperature=0.0, seeds=seeds(2), positions=positions(2))
    assert out.ids.tolist() == [1, 0]
    assert out.logprob.tolist() == [0.0, 0.0]
    torch.testing.assert_close(out.untruncated_logprob, x.log_softmax(-1)[[0, 1], [1, 0]])


def test_impossible_tokens_are_never_sampled():
    x = torch.zeros(500, 6)
    x[:, [0, 3, 5]] = -torch.inf
    for rules in ({}, {"top_k": 5}, {"top_p": 0.99}):
        out = sample_tokens(x, seeds=seeds(500), positions=positions(500), **rules)
        assert set(out.ids.tolist()) == {1, 2, 4}
    extreme = torch.tensor([[200.0, -200.0, -200.0], [-200.0, -200.0, 200.0]])
    assert sample_tokens(extreme, seeds=seeds(2), positions=positions(2)).ids.tolist() == [0, 2]


def test_the_ends_of_the_unit_interval_hit_possible_tokens(monkeypatch, backend):
    if backend == "cpu":
        pytest.skip("its random numbers cannot be replaced")
    x = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    for u, token in ((0.0, 1), (1 - 2.0**-32, 2)):
        monkeypatch.setattr(reference, "uniform", lambda s, p, u=u: torch.full((1,), u, dtype=torch.float64))
        assert sample_tokens(x, seeds=seeds(1), positions=positions(1)).ids == token


def test_no_rows_and_one_token():
    none = sample_tokens(torch.zeros(0, 5), seeds=seeds(0), positions=positions(0), top_p=0.5)
    assert [len(x) for x in none] == [0, 0, 0]
    one = sample_tokens(torch.zeros(2, 1), seeds=seeds(2), positions=positions(2))
    assert (one.ids.tolist(), one.logprob.tolist()) == ([0, 0], [0.0, 0.0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_strides_are_read_as_they_are(dtype):
    x = torch.randn(20, 30).to(dtype)
    got = sample_tokens(x.t(), seeds=seeds(30), positions=positions(30))
    want = sample_tokens(x.t().contiguous().float(), seeds=seeds(30), positions=positions(30))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("bad", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]])
@pytest.mark.parametrize("rules", [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 1}], ids=str)
def test_unusable_logits_are_refused_with_their_row(bad, rules):
    x = torch.zeros(3, 2)
    x[1] = torch.tensor(bad)
    with pytest.raises(ValueError, match="logits row 1 holds"):
        sample_tokens(x, seeds=seeds(3), positions=positions(3), **rules)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, r"temperature=-1\.0; allowed: a finite number >= 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": torch.tensor([1.0, -2.0, 1.0])}, r"temperature=\[1\.0, -2\.0, 1\.0\]"),
        ({"temperature": torch.ones(2)}, r"temperature has shape \[2\]; allowed: \[3\]"),
        ({"top_k": 0}, "top_k=0; allowed: None or an integer >= 1"),
        ({"top_p": 0.0}, r"top_p=0\.0; allowed"),
        ({"top_p": 1.1}, r"top_p=1\.1; allowed"),
        ({"min_p": -0.1}, r"min_p=-0\.1; allowed"),
        ({"top_k": torch.tensor([3, 0, 1])}, r"top_k\[1\]=0; allowed: integers >= 1"),
        ({"top_k": torch.ones(3)}, "top_k has dtype float32; allowed: int64, int32"),
        ({"top_k": torch.ones(2, dtype=torch.int64)}, r"top_k has shape \[2\]; allowed: \[3\]"),
        ({"top_p": torch.tensor([0.5, 1.0, 0.0])}, r"top_p\[2\]=0\.0; allowed: numbers in \(0, 1\]"),
        ({"top_p": torch.tensor([0.5, math.nan, 0.1])}, r"top_p\[1\]=nan; allowed"),
        ({"min_p": torch.tensor([-0.5, 1.0, 0.0])}, r"min_p\[0\]=-0\.5; allowed: numbers in \[0, 1\]"),
        ({"min_p": torch.ones(3, 1)}, r"min_p has shape \[3, 1\]; allowed: \[3\]"),
        ({"min_p": torch.ones(3, device="meta")}, "min_p is on meta; it must be on cpu"),
        ({"seeds": torch.zeros(3)}, "seeds has dtype float32; allowed: int64"),
        ({"positions": torch.zeros(4, dtype=torch.int64)}, r"positions has shape \[4\]; allowed: \[3\]"),
        ({"logits": torch.zeros(3)}, r"logits has shape \[3\]; allowed: \[S, V\]"),
        ({"logits": torch.zeros(3, 0)}, "at least one token"),
        ({"backend": "metal"}, "backend='metal' is not a backend"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"logits": torch.zeros(3, 4), "seeds": seeds(3), "positions": positions(3)} | change
    with pytest.raises(ValueError, match=message):
        sample_tokens(arguments.pop("logits"), **arguments)
