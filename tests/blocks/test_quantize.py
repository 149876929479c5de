from __future__ import annotations

import multiprocessing
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.profiler import profile

from zoo.blocks import quantize
from zoo.blocks.quantize import CosineQuantizer, GumbelQuantizer, VectorQuantizer

VQ = (VectorQuantizer, CosineQuantizer)


@pytest.fixture
def quantizer() -> VectorQuantizer:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(40, 6)
    torch.nn.init.normal_(quantizer.embedding.weight)
    # Rows of unequal length, so that the nearest is not the one with the largest product.
    quantizer.embedding.weight.data *= torch.linspace(0.2, 4, 40)[:, None]
    return quantizer


def nearest(latents: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """Every latent against every row, squared differences summed in double precision."""
    differences = latents.double().movedim(1, -1)[..., None, :] - book.double()
    return differences.square().sum(-1).argmin(-1)


def test_a_code_is_the_nearest_row(quantizer):
    latents = 2 * torch.randn(2, 6, 5, 7)
    codes = quantizer.encode(latents)
    assert codes.dtype == torch.int64 and codes.shape == (2, 5, 7)
    assert torch.equal(codes, nearest(latents, quantizer.embedding.weight))
    assert len(codes.unique()) > 5


def test_a_row_is_its_own_nearest_and_comes_back(quantizer):
    codes = torch.arange(40).view(2, 4, 5)
    rows = quantizer.decode(codes)
    assert rows.shape == (2, 6, 4, 5)
    assert torch.equal(rows[1, :, 2, 3], quantizer.embedding.weight[codes[1, 2, 3]])
    assert torch.equal(quantizer.encode(rows), codes)


@pytest.mark.parametrize("room", [1, 40, 101, 10**6])
def test_how_much_is_compared_at_once_changes_no_code(quantizer, room, monkeypatch):
    latents = torch.randn(2, 6, 5, 7)
    whole = quantizer.encode(latents)
    monkeypatch.setattr(quantize, "ROOM", room)
    assert torch.equal(quantizer.encode(latents), whole)


def test_autocast_does_not_blur_rows_that_lie_close():
    """A fresh book's rows lie within 2 / V of one another; half precision cannot tell them apart."""
    torch.manual_seed(0)
    fresh = VectorQuantizer(512, 8)
    latents = 1 + fresh.decode(torch.randint(512, (2, 8, 8))).detach()
    expected = nearest(latents, fresh.embedding.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fresh.encode(latents)
    assert (found == expected).float().mean() > 0.99


def test_gumbels_code_is_the_likeliest_by_its_projection():
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(9, 4)
    latents = torch.randn(2, 4, 3, 5)
    codes = quantizer.encode(latents)
    weight, bias = quantizer.proj.weight[:, :, 0, 0], quantizer.proj.bias
    for place in ((0, 0, 0), (1, 2, 4), (0, 1, 3)):
        logits = weight @ latents[place[0], :, place[1], place[2]] + bias
        assert int(codes[place]) == int(logits.argmax())
    assert torch.equal(quantizer.decode(codes)[1, :, 2, 4], quantizer.embed.weight[codes[1, 2, 4]])


def test_what_is_compared_at_once_fits_its_room(monkeypatch):
    """Measured as memory taken: 16,384 rows by 1,024 latents are 64 rooms of this size."""
    monkeypatch.setattr(quantize, "ROOM", 1 << 18)
    quantizer, latents = VectorQuantizer(16384, 4), torch.randn(1, 4, 32, 32)
    with profile(profile_memory=True) as profiled:
        quantizer.encode(latents)
    taken = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held, most = 0, 0
    for event in sorted(taken, key=lambda event: event.start_ns()):
        held += event.nbytes() // 4
        most = max(most, held)
    assert 1 << 18 <= most < 1.2 * (1 << 18)


# --- losses and gradients --------------------------------------------------------------------------------------------
def direction(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x / x.square().sum(dim, keepdim=True).sqrt()


@pytest.mark.parametrize("codebook, commitment", [(1, 0.25), (0.25, 1), (0.2, 1)], ids=["paper", "taming", "clip-gen"])
def test_losses_and_gradients_follow_the_paper(codebook, commitment):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(5, 3, codebook=codebook, commitment=commitment)
    torch.nn.init.normal_(quantizer.embedding.weight)
    latents, pull = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    rows, codes, loss = quantizer(latents)
    assert torch.equal(codes, nearest(latents, quantizer.embedding.weight)) and codes.shape == (2, 4, 4)
    assert torch.equal(rows, quantizer.decode(codes))
    difference = (rows - latents).detach()  # (B, D, h, w), 96 numbers
    torch.testing.assert_close(loss, (codebook + commitment) * difference.square().sum() / 96)

    (loss + (rows * pull).sum()).backward()
    torch.testing.assert_close(latents.grad, pull - commitment * 2 * difference / 96)  # straight-through, and the term
    expected = torch.zeros(5, 3)
    for b, y, x in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(4)).tolist():
        expected[codes[b, y, x]] += codebook * 2 * difference[b, :, y, x] / 96
    torch.testing.assert_close(quantizer.embedding.weight.grad, expected)


def test_cosine_compares_directions():
    torch.manual_seed(0)
    quantizer = CosineQuantizer(30, 4, codebook=0.5, commitment=2)
    quantizer.embedding.weight.data *= torch.linspace(0.1, 9, 30)[:, None]
    latents = torch.randn(2, 4, 5, 5, requires_grad=True)
    book = direction(quantizer.embedding.weight, 1)
    rows, codes, loss = quantizer(latents)
    products = torch.einsum("bdhw,vd->bhwv", latents, book)
    assert torch.equal(codes, products.argmax(-1)) and torch.equal(codes, quantizer.encode(latents))
    assert (codes != nearest(latents, quantizer.embedding.weight)).any()
    assert torch.equal(codes, quantizer.encode(latents * 2**-20))  # however short
    torch.testing.assert_close(rows, book[codes].movedim(-1, 1))
    assert torch.equal(rows, quantizer.decode(codes))

    # Of vectors of length 1, the squared difference is 2 - 2 cos.
    cosines = products.amax(-1) / latents.square().sum(1).sqrt()
    torch.testing.assert_close(loss, 2.5 * (2 - 2 * cosines).mean() / 4)
    pull = torch.randn_like(rows)
    through = torch.autograd.grad((direction(latents, 1) * pull).sum(), latents)[0]
    torch.testing.assert_close(torch.autograd.grad((rows * pull).sum(), latents)[0], through)


@pytest.mark.parametrize("kind", VQ)
def test_autocast_changes_nothing(kind):
    torch.manual_seed(0)
    quantizer = kind(300, 8, decay=0.9).eval()
    torch.nn.init.normal_(quantizer.embedding.weight)
    latents = torch.randn(2, 8, 8, 8)
    rows, codes, loss = quantizer(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.encode(latents), codes)
        found = quantizer(latents)
        half = quantizer(latents.bfloat16())
    assert torch.equal(found.rows, rows) and torch.equal(found.codes, codes) and torch.equal(found.loss, loss)
    whole = quantizer(latents.bfloat16().float())
    assert all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in zip(half, whole, strict=True))


def test_gumbels_loss_by_formula_and_the_likeliest_row_in_evaluation():
    torch.manual_seed(0)
    quantizer, latents = GumbelQuantizer(7, 4), 3 * torch.randn(2, 4, 3, 5)
    logits = torch.einsum("vd,bdhw->bhwv", quantizer.proj.weight[:, :, 0, 0], latents) + quantizer.proj.bias
    q = logits.exp() / logits.exp().sum(-1, keepdim=True)
    expected = 5e-4 * (q * (q * 7).log()).sum(-1).mean()  # KL(q | uniform)
    for mode in (True, False):
        found = quantizer.train(mode)(latents)
        torch.testing.assert_close(found.loss, expected)
        assert torch.equal(found.codes, logits.argmax(-1))
        assert torch.equal(found.rows, quantizer.decode(found.codes)) != mode


def test_gumbel_draws_rows_as_often_as_they_are_likely():
    torch.manual_seed(0)
    quantizer, latent = GumbelQuantizer(5, 4), torch.randn(1, 4, 1, 1)
    latents, q = latent.expand(1, 4, 100, 100), quantizer.proj(latent).flatten().softmax(0)
    book = quantizer.embed.weight
    torch.testing.assert_close(quantizer(latents, 1e5).rows.mean((0, 2, 3)), book.mean(0), atol=1e-3, rtol=0)
    quantizer.hard = True
    rows = quantizer(latents, 0.5).rows.movedim(1, -1).reshape(-1, 4)
    same = (rows[:, None] - book).abs().amax(2) < 1e-5  # (10000, V)
    assert same.any(1).all()
    torch.testing.assert_close(same.float().mean(0), q, atol=0.02, rtol=0)
    rows.sum().backward()
    assert quantizer.proj.weight.grad.abs().sum() > 0 and book.grad.abs().sum() > 0


# --- rows that follow, rows that start again -------------------------------------------------------------------------
@pytest.mark.parametrize("kind", VQ)
def test_without_options_the_state_is_the_book(kind):
    assert list(kind(5, 3).state_dict()) == ["embedding.weight"] and kind(5, 3).embedding.weight.requires_grad
    assert list(kind(5, 3, restart=1.0).state_dict()) == ["counts", "embedding.weight"]
    moving = kind(5, 3, decay=0.9)
    assert list(moving.state_dict()) == ["counts", "sums", "embedding.weight"]
    assert not moving.embedding.weight.requires_grad


@pytest.mark.parametrize("kind", VQ)
def test_rows_follow_the_average_of_their_latents(kind):
    """Four updates against a loop over codes, in double precision."""
    torch.manual_seed(0)
    quantizer = kind(6, 3, decay=0.8, commitment=0.3)
    torch.nn.init.normal_(quantizer.embedding.weight)
    quantizer.embedding.weight.data[5] = torch.tensor([-9.0, -9, -9])  # nobody's nearest, nor near in direction
    same = kind is VectorQuantizer
    book = quantizer.embedding.weight.double() if same else direction(quantizer.embedding.weight.double(), 1)
    counts = [40 / 6] * 6  # at first the share of an average row: 40 latents, 6 rows
    sums = [40 / 6 * book[code] for code in range(6)]
    for _ in range(4):
        latents = (3 + torch.randn(2, 3, 4, 5)).requires_grad_()
        points = latents.detach().double() if same else direction(latents.detach().double(), 1)
        rows, codes, loss = quantizer(latents)
        assert torch.equal(codes, nearest(points, book))
        torch.testing.assert_close(rows.double(), book[codes].movedim(-1, 1), atol=1e-5, rtol=0)  # of before
        torch.testing.assert_close(loss.double(), 0.3 * (points - book[codes].movedim(-1, 1)).square().mean())
        loss.backward()
        for code in range(6):
            chose = points.movedim(1, -1)[codes == code]  # (n, D)
            counts[code] = 0.8 * counts[code] + 0.2 * len(chose)
            sums[code] = 0.8 * sums[code] + 0.2 * chose.sum(0)
        smooth = [(count + 1e-5) / (sum(counts) + 6e-5) * sum(counts) for count in counts]
        book = torch.stack([total / count for total, count in zip(sums, smooth, strict=True)])
        book = book if same else direction(book, 1)
        torch.testing.assert_close(quantizer.embedding.weight.double(), book, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(quantizer.counts.double(), torch.tensor(counts).double())
    assert counts[5] < 3 < max(counts)


def test_evaluation_and_broken_latents_leave_the_book_alone():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(6, 3, decay=0.8, restart=0.5)
    quantizer(torch.randn(2, 3, 4, 4))
    state = {name: value.clone() for name, value in quantizer.state_dict().items()}
    broken = torch.randn(2, 3, 4, 4)
    broken[1, 2, 3, 3] = torch.nan
    quantizer(broken)  # the trainer leaves out an update whose loss is nan; an average would keep it
    quantizer.eval()(torch.randn(2, 3, 4, 4))
    assert all(torch.equal(value, state[name]) for name, value in quantizer.state_dict().items())


@pytest.mark.parametrize("kind", VQ)
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_only_rows_below_the_limit_start_again(kind, decay):
    """Rows 0..3 lie among the latents; 4 and 5 are nobody's nearest, and go where two latents lie."""
    torch.manual_seed(0)
    quantizer = kind(6, 2, decay=decay, restart=1.0)
    first = torch.tensor([[1.0, 0], [0, 1], [0.8, 0.6], [0.6, 0.8], [-1, 0], [0, -1]])
    quantizer.embedding.weight.data.copy_(first)
    latents = torch.rand(2, 2, 8, 8) * 0.9 + 0.1  # 128, of positive numbers
    points = (latents if kind is VectorQuantizer else direction(latents, 1)).movedim(1, -1).flatten(0, -2)
    quantizer.counts.copy_(torch.tensor([20.0, 20, 20, 20, 1.5, 1.5]))
    if decay:
        quantizer.sums.copy_(quantizer.counts[:, None] * first)
    quantizer.eval()(latents)
    assert torch.equal(quantizer.embedding.weight, first)

    quantizer.train()
    kept = decay or 0.99
    updates = 0
    while 1.5 * kept ** (updates + 1) >= 1:
        updates += 1
        quantizer(latents)
        # What is nobody's keeps its place, for its sum falls as its count does.
        torch.testing.assert_close(quantizer.embedding.weight[4:], first[4:], atol=1e-3, rtol=0)
        torch.testing.assert_close(quantizer.counts[4:], torch.full((2,), 1.5 * kept**updates))
    before = quantizer.embedding.weight.detach().clone()
    rows, codes, loss = quantizer(latents)
    assert set(codes.unique().tolist()) == {0, 1, 2, 3}
    now = quantizer.embedding.weight.detach()
    where = torch.cdist(now[4:], points).argmin(1)
    torch.testing.assert_close(now[4:], points[where], atol=1e-6, rtol=0)
    assert where[0] != where[1]
    assert torch.equal(quantizer.counts[4:], torch.full((2,), 128 / 6))
    if decay:
        torch.testing.assert_close(quantizer.sums[4:], 128 / 6 * points[where])
    else:
        assert torch.equal(now[:4], before[:4])
        loss.backward()  # by the rows of before, which is what was looked up
        assert quantizer.embedding.weight.grad[4:].abs().sum() == 0
    torch.testing.assert_close(
        rows, (before if kind is VectorQuantizer else direction(before, 1))[codes].movedim(-1, 1)
    )


def test_more_rows_than_latents_start_again_together():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(50, 2, restart=3.0)
    latents = torch.rand(1, 2, 2, 3)
    quantizer(latents)
    points = latents.movedim(1, -1).flatten(0, -2)
    restarted = [row for row in quantizer.embedding.weight if (row == points).all(1).any()]
    assert len(restarted) >= 49  # all but the one that the latents chose, if it was above the limit


def rank_learns(kind: type, half: torch.Tensor, number: int, expected: dict[str, torch.Tensor], store: Path) -> None:
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2, timeout=limit)
    quantizer = learner(kind)
    torch.manual_seed(7 + number)  # rank 0's draw counts
    for latents in half:
        quantizer(latents)
    for name, value in quantizer.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-5)


def learner(kind: type) -> VectorQuantizer:
    torch.manual_seed(0)
    quantizer = kind(20, 3, decay=0.7, restart=0.6)
    torch.nn.init.normal_(quantizer.embedding.weight)
    return quantizer


@pytest.mark.parametrize("kind", VQ)
def test_two_ranks_move_the_book_as_one_process_with_the_whole_batch(kind, tmp_path):
    quantizer = learner(kind)
    whole = torch.randn(4, 4, 3, 3, 3) + 1  # updates, B, D, h, w
    torch.manual_seed(7)
    before = torch.get_rng_state()
    for latents in whole:
        quantizer(latents)
    assert not torch.equal(torch.get_rng_state(), before)  # there were restarts
    fork = multiprocessing.get_context("fork")
    state = {name: value.detach() for name, value in quantizer.state_dict().items()}
    ranks = [
        fork.Process(target=rank_learns, args=(kind, whole[:, 2 * number :][:, :2], number, state, tmp_path / "store"))
        for number in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
