"""What is particular to the compiled scan: powers of 2, layouts, threads; its values are tested in equivalence."""

import logging
import threading

import numba
import numpy as np
import pytest
import torch

from vaemo.model import scan_compiled
from vaemo.model.scan import scan_reference

UNITS_IN_THE_LAST_PLACE = 4
"""Of a power of 2: a polynomial of up to 13 fused steps, each rounded once."""


@numba.njit
def powers(x):
    return np.array([scan_compiled.exp2(value) for value in x])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_powers_of_2(dtype):
    least = np.finfo(dtype).minexp
    x = np.concatenate([np.linspace(least, 0, 10_001), np.arange(-60, 1) / 2, -np.geomspace(1e-12, 1, 500)]).astype(
        dtype
    )
    expected = np.exp2(x.astype(np.longdouble))
    error = np.abs(powers(x) - expected) / (np.finfo(dtype).eps * expected)
    assert error.max() < UNITS_IN_THE_LAST_PLACE
    assert powers(np.zeros(1, dtype))[0] == 1
    below = powers(np.array([least - 1, -1e30, -np.inf], dtype))
    assert (below == np.finfo(dtype).tiny).all()
    assert np.isnan(powers(np.array([np.nan], dtype))[0])


def inputs(lanes=3, steps=9, width=8, states=5):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    x, B, C, h = (randn(lanes, *shape) for shape in ((steps, width), (steps, states), (steps, states), (states, width)))
    return [x, randn(lanes, steps, width).exp(), -randn(states, width).exp(), B, C, h]


def both(arguments):
    """Outputs and gradients."""
    arguments = [tensor.detach().requires_grad_() for tensor in arguments]
    y, h = scan_compiled.scan_compiled(*arguments)
    return [y, h, *torch.autograd.grad((y * y.detach()).sum() + (h * h.detach()).sum(), arguments)]


def test_layouts_change_nothing():
    plain = inputs()
    strided = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in plain]
    assert not any(tensor.is_contiguous() for tensor in strided)
    for found, expected in zip(both(strided), both(plain), strict=True):
        assert torch.equal(found, expected)


def test_arguments_stay_what_they_are():
    arguments = inputs()
    before = [tensor.clone() for tensor in arguments]
    both(arguments)
    for tensor, copy in zip(arguments, before, strict=True):
        assert torch.equal(tensor, copy)


def test_a_number_that_is_none_is_not_hidden():
    for position in range(6):
        arguments = inputs()
        arguments[position].view(-1)[0] = torch.nan
        found = scan_compiled.scan_compiled(*arguments)
        for ours, expected in zip(found, scan_reference(*arguments), strict=True):
            assert torch.equal(ours.isnan(), expected.isnan())


def test_no_steps_and_no_lanes():
    for lanes, steps in ((3, 0), (0, 4)):
        y, h, *gradients = both(inputs(lanes, steps))
        assert y.shape == (lanes, steps, 8)
        assert torch.equal(h, inputs(lanes, steps)[-1])
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_threads_do_not_meet():
    expected, found = both(inputs()), {}

    def run(number):
        for _ in range(50):
            found[number] = both(inputs())

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for results in found.values():
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected, strict=True))


def test_where_nothing_may_be_written_it_is_compiled_all_the_same(monkeypatch, caplog):
    def refuse(dispatcher):
        raise RuntimeError("no locator available")

    caplog.set_level(logging.INFO, scan_compiled.__name__)
    monkeypatch.setattr(numba.core.dispatcher.Dispatcher, "enable_caching", refuse)
    assert scan_compiled.compiled(lambda x: x + 1)(1) == 2
    assert "compiled again by every process: no locator available" in caplog.text
