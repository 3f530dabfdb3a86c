"""Means over the global batch: two processes find what one finds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from limbeck.distill.reduction import gathered, global_mean, processes, total

ROWS = torch.tensor([[1.0, 2.0], [3.0, 5.0], [7.0, 11.0], [13.0, 17.0]])
TOKENS = torch.tensor([2.0, 4.0, 8.0, 16.0, 32.0])
SHARES = (slice(0, 4), slice(4, 5))  # four tokens in one process, one in the other


def test_one_process_is_the_plain_thing() -> None:
    assert processes() == 1
    assert gathered(ROWS) is ROWS
    assert float(total(TOKENS.sum())) == 62
    assert float(global_mean(TOKENS)) == pytest.approx(62 / 5)
    assert float(global_mean(TOKENS, torch.tensor([1, 0, 0, 0, 3]))) == pytest.approx((2 + 3 * 32) / 4)
    assert float(global_mean(TOKENS, torch.tensor([True, False, False, False, True]))) == pytest.approx(17)


def test_the_mean_of_nothing_is_nothing_and_lets_a_step_through() -> None:
    values = torch.zeros(0, requires_grad=True)
    found = global_mean(values * 2)
    found.backward()
    assert float(found.detach()) == 0 and values.grad is not None


def test_a_total_carries_no_gradient() -> None:
    assert not total(torch.ones((), requires_grad=True)).requires_grad


def in_a_process(rank: int, folder: Path) -> None:
    """What each of two processes does; it writes what it found."""
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    tokens = TOKENS[SHARES[rank]].clone().requires_grad_()
    mean = global_mean(tokens.square())
    (token_gradient,) = torch.autograd.grad(mean, tokens)
    rows = ROWS[2 * rank : 2 * rank + 2].clone().requires_grad_()
    everything = gathered(rows)
    (row_gradient,) = torch.autograd.grad((everything @ everything.T).square().sum(), rows)
    beside = torch.zeros_like(everything, requires_grad=True)  # shares its gradient's memory with what was gathered
    shared = gathered(rows) + beside
    _, beside_gradient = torch.autograd.grad(shared, (rows, beside), torch.ones_like(shared))
    found = {
        "processes": processes(),
        "total": total(tokens.sum()),
        "mean": mean.detach(),
        "token_gradient": token_gradient,
        "gathered": everything.detach(),
        "row_gradient": row_gradient,
        "beside_gradient": beside_gradient,
    }
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    started = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))

    tokens, rows = TOKENS.clone().requires_grad_(), ROWS.clone().requires_grad_()
    mean = tokens.square().mean()
    (token_gradient,) = torch.autograd.grad(mean, tokens)
    (row_gradient,) = torch.autograd.grad((rows @ rows.T).square().sum(), rows)

    assert first["processes"] == second["processes"] == 2
    assert float(first["total"]) == float(second["total"]) == 62
    assert torch.equal(first["gathered"], ROWS) and torch.equal(second["gathered"], ROWS)
    # The trainer averages over the processes: that average is what one process finds.
    assert float((first["mean"] + second["mean"]) / 2) == pytest.approx(float(mean.detach()))
    assert torch.allclose(torch.cat([first["token_gradient"], second["token_gradient"]]) / 2, token_gradient)
    assert torch.allclose(torch.cat([first["row_gradient"], second["row_gradient"]]) / 2, row_gradient)
    assert torch.equal(first["beside_gradient"], torch.ones_like(ROWS))


if __name__ == "__main__":
    in_a_process(int(sys.argv[1]), Path(sys.argv[2]))
