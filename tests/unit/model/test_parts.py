"""The parts between features and feedback: standardisation, FiLM, EMA, head, convolution, scan choice."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from model_cases import assert_close

from vaemo.errors import ConfigValueError
from vaemo.model import scan
from vaemo.model.conv import conv_chunk, conv_step, resolve_conv, taps_of
from vaemo.model.ema import BLOCK_STEPS, LEARNED_RANGE, SessionEma
from vaemo.model.film import Film, FilmDelta
from vaemo.model.head import Head
from vaemo.model.mamba2 import Mamba2
from vaemo.model.standardize import CLIP, Standardize


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_standardised_features_have_mean_0_and_deviation_1_and_are_clipped():
    x = 5 + 3 * randn(500, 4)
    x[:, 2] = 7.0  # constant in training
    part = Standardize(4).double()
    part.set(x.mean(0), x.std(0))
    z = part(x)
    assert_close(z.mean(0), torch.zeros(4, dtype=torch.float64), 1e-9)
    assert_close(z.std(0)[[0, 1, 3]], torch.ones(3, dtype=torch.float64), 1e-9)
    assert part.deviation[2] == 1
    assert part(torch.full((1, 4), 1e9, dtype=torch.float64)).tolist() == [[CLIP] * 4]


def test_film_starts_as_the_identity_and_then_scales_and_shifts():
    film = Film(5, 6, 7).double()
    speech, speaker = randn(3, 4, 6), randn(3, 4, 5)
    assert torch.equal(film(speech, speaker), speech)
    torch.nn.init.normal_(film.last.weight)
    torch.nn.init.normal_(film.last.bias)
    gamma, beta = film.last(film.hidden(speaker).relu()).split(6, -1)
    assert_close(film(speech, speaker), (1 + torch.tanh(gamma)) * speech + beta)


@pytest.mark.parametrize("layers", ["last", "all"])
def test_a_delta_is_film_with_other_parameters_on_the_speakers_own_utterances(layers):
    film = Film(5, 6, 7).double()
    torch.nn.init.normal_(film.last.weight)
    names = [name for name, _ in film.named_parameters() if layers == "all" or name.startswith("last.")]
    deltas = {name: randn(3, *film.get_parameter(name).shape).requires_grad_() for name in names}
    speech, speaker_embedding = randn(2, 5, 6), randn(2, 5, 5)
    for speaker in ([[0, 2, -1, 0, 2], [2, 2, 0, -1, 0]], [[-1] * 5] * 2, [[0, 1, 2, 0, 1]] * 2):
        index = torch.tensor(speaker)
        found = film(speech, speaker_embedding, FilmDelta(deltas, index))
        expected = film(speech, speaker_embedding).detach().clone()
        for s in range(3):
            own = Film(5, 6, 7).double()
            own.load_state_dict(
                {n: p.detach() + (deltas[n][s].detach() if n in deltas else 0) for n, p in film.named_parameters()}
            )
            expected[index == s] = own(speech, speaker_embedding)[index == s].detach()
        assert_close(found.detach(), expected)
    found.square().sum().backward()
    assert all(delta.grad[s].any() for delta in deltas.values() for s in range(3))


@pytest.mark.parametrize("steps", [1, 5, BLOCK_STEPS, BLOCK_STEPS + 1, 3 * BLOCK_STEPS])
@pytest.mark.parametrize(
    ("kind", "alphas"),
    [("fixed", [0.8]), ("fixed", [0.95, 0.3, 0.5]), ("fixed", [0.0]), ("learned", [0.7, 0.85]), ("none", [0.8])],
)
def test_the_closed_form_of_the_ema_is_its_recurrence(kind, alphas, steps):
    ema = SessionEma(kind, 5, alphas).double()
    u, c = randn(2, steps, 5).requires_grad_(), randn(2, 5).requires_grad_()
    per_channel, after, expected = ema.per_channel(u), c, []
    for t in range(steps):
        after = ema.step(u[:, t], after, per_channel)
        expected.append(after)
    found, expected = ema(u, c), torch.stack(expected, 1)
    assert_close(found, expected)
    weights = randn(2, steps, 5)
    leaves = [u, *([c] if kind != "none" else []), *ema.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        assert_close(ours, theirs)


def test_the_parts_of_c_have_their_own_alpha():
    per_channel = SessionEma("fixed", 5, [0.8, 0.3]).per_channel(randn(1))
    assert per_channel.tolist() == pytest.approx([0.8, 0.8, 0.8, 0.3, 0.3])
    per_channel = SessionEma("fixed", 8, [0.8, 0.3, 0.1]).per_channel(randn(1))
    assert per_channel.tolist() == pytest.approx([0.8, 0.8, 0.8, 0.3, 0.3, 0.3, 0.1, 0.1])


@pytest.mark.parametrize("start", [0.0, 0.6, 0.75, 0.9, 0.999])
def test_a_learned_alpha_starts_near_its_start_and_never_leaves_its_range(start):
    ema = SessionEma("learned", 4, [start])
    low, high = LEARNED_RANGE
    assert abs(ema.alpha().item() - min(max(start, low), high)) < 0.004
    for far in (-100.0, 100.0):
        with torch.no_grad():
            ema.logits.fill_(far)
        assert low <= round(ema.alpha().item(), 6) <= high


@pytest.mark.parametrize(("label_range", "squash"), [((0.0, 1.0), torch.sigmoid), ((-1.0, 1.0), torch.tanh)])
def test_the_head_is_one_hidden_layer_and_a_linear_head_for_either_dimension(label_range, squash):
    head = Head(4, 3, 6, label_range).double()
    z, c, mask = randn(2, 5, 4), randn(2, 5, 3), torch.rand(2, 5, 6, dtype=torch.float64)
    hidden = head.hidden(torch.cat([z, c], -1)).relu() * mask
    expected = squash(torch.cat([head.valence(hidden), head.arousal(hidden)], -1))
    weights = head.weights()
    assert_close(head(head.project(z, weights), c, weights, mask), expected)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_the_convolution_is_the_one_of_torch_behind_a_tail(width):
    leaves = [randn(6, 1, width), randn(6), randn(3, 9, 6), randn(3, width - 1, 6)]
    weight, bias, x, tail = (leaf.requires_grad_() for leaf in leaves)
    padded = torch.cat([tail, x], 1).transpose(1, 2)
    expected = torch.nn.functional.silu(torch.conv1d(padded, weight, bias, groups=6)).transpose(1, 2)
    lengths = torch.tensor([9, 1, 0])
    valid = torch.arange(9) < lengths[:, None]
    y, after = conv_chunk(x, tail, taps_of(weight), bias, valid)
    assert_close(y, expected)
    loss_weights = randn(3, 9, 6)
    found, theirs = (torch.autograd.grad((out * loss_weights).sum(), leaves) for out in (y, expected))
    for grad, other in zip(found, theirs, strict=True):
        assert_close(grad, other)
    for lane, length in enumerate(lengths):
        assert torch.equal(after[lane], torch.cat([tail, x], 1)[lane, length : length + width - 1])
    for t in range(9):
        own = valid[:, t] if t % 2 else None
        y_t, stepped = conv_step(x[:, t], tail, taps_of(weight), bias, own)
        assert_close(y_t[0], functional_step(x, tail, weight, bias, t))
        if own is not None:
            assert torch.equal(stepped[~own], tail[~own])


def test_the_kernel_of_causal_conv1d_gets_the_layouts_that_it_asks_for(monkeypatch):
    def causal_conv1d_fn(x, weight, bias, initial_states, activation):
        assert (activation, x.stride(1), initial_states.stride(1)) == ("silu", 1, 1)
        padded = torch.cat([initial_states, x], 2)
        return torch.nn.functional.silu(torch.conv1d(padded, weight[:, None], bias, groups=len(bias)))

    monkeypatch.setitem(sys.modules, "causal_conv1d", SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn))
    inputs = randn(3, 9, 6), randn(3, 3, 6), randn(4, 6), randn(6), torch.arange(9) < torch.tensor([[9], [1], [0]])
    for found, expected in zip(conv_chunk(*inputs, kernel=True), conv_chunk(*inputs), strict=True):
        assert_close(found, expected)


def test_causal_conv1d_is_used_beside_a_scan_on_kernels_where_it_imports(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "vaemo.model.conv")
    for there, said in ((SimpleNamespace(), "convolution: causal_conv1d"), (None, "plain (causal_conv1d cannot be")):
        resolve_conv.cache_clear()
        monkeypatch.setitem(sys.modules, "causal_conv1d", there)
        assert resolve_conv("kernel") == (there is not None)
        assert said in caplog.text
        assert not resolve_conv("chunk")
    resolve_conv.cache_clear()


def functional_step(x, tail, weight, bias, t):
    """The convolution of lane 0 where `tail` comes directly before step t."""
    window = torch.cat([tail, x[:, t : t + 1]], 1)[0]
    return torch.nn.functional.silu((window * weight[:, 0].t()).sum(0) + bias)


def test_padding_leaves_the_scan_state_bit_identical():
    x, B, C, h = randn(2, 4, 3), randn(2, 4, 5), randn(2, 4, 5), randn(2, 5, 3)
    for form in (scan.scan_reference, scan.scan_chunk, scan.scan_compiled):
        for context in (torch.enable_grad(), torch.no_grad()):
            with context:
                assert torch.equal(form(x, torch.zeros_like(x), -torch.rand(5, 3).double(), B, C, h)[1], h)


def test_headdim_must_divide_the_inner_width():
    with pytest.raises(ConfigValueError, match=r"headdim is 5, which does not divide .* = 16"):
        Mamba2(8, headdim=5)


@pytest.fixture
def resolve():
    scan.resolve_scan.cache_clear()
    yield scan.resolve_scan
    scan.resolve_scan.cache_clear()


def test_the_scan_is_resolved_once_and_logged_with_the_reason(resolve, caplog):
    caplog.set_level(logging.INFO, scan.__name__)
    assert resolve("auto", "cpu") == resolve("auto", "cpu") == "compiled"
    assert resolve("auto", "cpu", "mamba2") == "chunk"
    assert [record.getMessage() for record in caplog.records] == [
        "scan of mamba on cpu: compiled (the model is on cpu)",
        "scan of mamba2 on cpu: chunk (the model is on cpu)",
    ]
    assert resolve("reference", "cuda") == "reference"


@pytest.mark.parametrize(("device", "updater"), [("cuda", "mamba"), ("cpu", "mamba2")])
def test_what_is_not_compiled_is_an_error_that_says_what_is(resolve, device, updater):
    assert resolve("compiled", "cpu") == "compiled"
    with pytest.raises(scan.ScanNotAvailableError, match=rf"for mamba on a CPU; the model is {updater} on {device}"):
        resolve("compiled", device, updater)


def test_a_kernel_that_cannot_be_had_is_an_error_that_says_why(resolve):
    with pytest.raises(scan.ScanNotAvailableError, match=r"kernel, but the model is on cpu\. Use auto or chunk"):
        resolve("kernel", "cpu")


@pytest.mark.parametrize("updater", ["mamba", "mamba2"])
def test_on_cuda_the_kernels_are_taken_where_they_import(resolve, updater, monkeypatch):
    imported = []
    monkeypatch.setattr(scan.importlib, "import_module", imported.append)
    assert resolve("auto", "cuda", updater) == "kernel"
    assert len(imported) == 1


def test_on_cuda_a_broken_package_is_logged_and_the_plain_scan_taken(resolve, caplog, monkeypatch):
    def broken(name):
        raise OSError("undefined symbol")

    monkeypatch.setattr(scan.importlib, "import_module", broken)
    caplog.set_level(logging.INFO, scan.__name__)
    assert resolve("auto", "cuda") == "chunk"
    assert "cannot be imported: OSError: undefined symbol" in caplog.text
    with pytest.raises(scan.ScanNotAvailableError, match="OSError: undefined symbol"):
        resolve("kernel", "cuda")
