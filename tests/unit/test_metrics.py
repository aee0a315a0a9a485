"""Metrics against independent formulas, and moments that merge like the pairs they came from."""

import numpy as np
import pytest
import torch
from torchmetrics.functional import concordance_corrcoef, mean_absolute_error, mean_squared_error, pearson_corrcoef

from vaemo.config import Config
from vaemo.errors import ShapeError
from vaemo.metrics import Moments, ccc, mae, pearson, rmse
from vaemo.training.loss import window_loss, window_sums

EXACT = 1e-12
"""float64: two formulas of the same sums."""
REPEATS = 500
"""How often all pairs are repeated where n - 1 is to be as good as n."""


@pytest.fixture
def pairs():
    random = np.random.default_rng(0)
    label = random.uniform(0, 1, (200, 2))
    return 0.3 + 0.5 * label + 0.1 * random.standard_normal((200, 2)), label


def by_hand(x, y, ddof=0):
    covariance = ((x - x.mean()) * (y - y.mean())).mean()
    return 2 * covariance / (x.var(ddof=ddof) + y.var(ddof=ddof) + (x.mean() - y.mean()) ** 2)


def test_formulas(pairs):
    x, y = pairs
    assert ccc(x, y) == pytest.approx([by_hand(x[:, d], y[:, d]) for d in range(2)], abs=EXACT)
    assert pearson(x, y) == pytest.approx([np.corrcoef(x[:, d], y[:, d])[0, 1] for d in range(2)], abs=EXACT)
    assert rmse(x, y) == pytest.approx(np.sqrt(((x - y) ** 2).mean(axis=0)), abs=EXACT)
    assert mae(x, y) == pytest.approx(np.abs(x - y).mean(axis=0), abs=EXACT)


def centred(values, session):
    return np.concatenate([values[session == s] - values[session == s].mean(axis=0) for s in np.unique(session)])


def test_within_sessions_each_side_is_taken_less_its_mean_over_the_session(pairs):
    x, y = pairs
    session = np.sort(np.random.default_rng(1).integers(0, 17, len(x)))
    x, y = x + session[:, None], y - 3.0 * session[:, None]
    found = Moments.within(x, y, session)
    assert found.ccc() == pytest.approx(ccc(centred(x, session), centred(y, session)), abs=EXACT)
    assert found.rmse() == pytest.approx(rmse(centred(x, session), centred(y, session)), abs=EXACT)
    assert (ccc(x, y) < 0).all()
    assert (found.ccc() > 0.5).all()
    # Neither where sessions lie nor what they are called matters.
    order = np.random.default_rng(2).permutation(len(x))
    again = Moments.within(x[order], y[order], 40 - session[order])
    assert again.ccc() == pytest.approx(found.ccc(), abs=EXACT)


def test_within_sessions_parts_of_whole_sessions_merge(pairs):
    session = np.repeat(np.arange(20), 10)
    whole = Moments.within(*pairs, session)
    first = session < 7
    parts = [Moments.within(pairs[0][rows], pairs[1][rows], session[rows]) for rows in (first, ~first)]
    merged = parts[0] + parts[1]
    assert merged.n == pytest.approx(whole.n)
    assert merged.ccc() == pytest.approx(whole.ccc(), abs=EXACT)


def test_within_sessions_a_session_with_one_label_says_nothing(pairs):
    x, y = (values[:20].copy() for values in pairs)
    session = np.repeat([0, 1], 10)
    alone = Moments.within(x[:10], y[:10], session[:10])
    y[11:, 0] = np.nan
    x[10] += 5
    found = Moments.within(x, y, session)
    assert found.n.tolist() == [10, 20]
    assert found.ccc()[0] == pytest.approx(alone.ccc()[0], abs=EXACT)
    assert found.ccc()[1] != pytest.approx(alone.ccc()[1], abs=0.01)
    assert np.isnan(Moments.within(x[:2], y[:2], np.arange(2)).ccc()).all()
    assert np.isnan(Moments.within(x[:0], y[:0], session[:0]).ccc()).all()


@pytest.mark.parametrize("constant", [0.1, 0.5123, 1 / 3, 7e6])
def test_within_sessions_predictions_that_only_know_the_session_agree_with_nothing(pairs, constant):
    session = np.repeat(np.arange(20), 10)
    known = np.repeat(constant * np.arange(1, 21), 10)[:, None] * np.ones(2)
    assert Moments.within(known, pairs[1], session).ccc() == pytest.approx([0, 0], abs=EXACT)


def test_within_sessions_shapes_must_be_alike(pairs):
    with pytest.raises(ShapeError, match=r"\(200, 2\), labels \(200, 2\) and sessions \(3,\)"):
        Moments.within(*pairs, np.arange(3))


def test_unbiased_variances_are_those_of_avec(pairs):
    x, y = (values[:12] for values in pairs)
    found = ccc(x, y, "unbiased")
    assert found == pytest.approx([by_hand(x[:, d], y[:, d], ddof=1) for d in range(2)], abs=EXACT)
    assert (ccc(x, y) - found > 0.01).all()
    assert ccc(y, y, "unbiased") == pytest.approx(11 / 12)


def test_against_torchmetrics(pairs):
    x, y = map(torch.from_numpy, pairs)
    assert pearson(*pairs) == pytest.approx(pearson_corrcoef(x, y).numpy(), abs=EXACT)
    assert rmse(*pairs) == pytest.approx(mean_squared_error(x, y, squared=False, num_outputs=2).numpy(), abs=EXACT)
    assert mae(*pairs) == pytest.approx(mean_absolute_error(x, y, num_outputs=2).numpy(), abs=EXACT)


def test_ccc_against_torchmetrics(pairs):
    """torchmetrics divides by n - 1 throughout: the same where the means agree, and where there are many pairs."""
    x, y = pairs
    centred = x - x.mean(axis=0) + y.mean(axis=0)
    assert ccc(centred, y) == pytest.approx(
        concordance_corrcoef(torch.from_numpy(centred), torch.from_numpy(y)).numpy(), abs=EXACT
    )
    many = [torch.from_numpy(np.tile(values, (REPEATS, 1))) for values in pairs]
    assert ccc(x, y) == pytest.approx(concordance_corrcoef(*many).numpy(), rel=1 / (REPEATS * len(x)))


def test_missing_pairs_are_left_out(pairs):
    x, y = (values.copy() for values in pairs)
    x[3, 0] = y[50:60, 1] = np.nan
    keep = [np.delete(np.arange(200), 3), np.r_[0:50, 60:200]]
    for measure in (ccc, pearson, rmse, mae):
        expected = [measure(pairs[0][keep[d], d], pairs[1][keep[d], d]) for d in range(2)]
        assert measure(x, y) == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("cuts", [[0], [1, 2], [20, 20, 199], [200]])
def test_moments_merge_exactly(pairs, cuts):
    x, y = pairs
    parts = [Moments.of(a, b) for a, b in zip(np.split(x, cuts), np.split(y, cuts), strict=True)]
    merged = sum(parts[1:], parts[0])
    whole = Moments.of(x, y)
    for measure in ("ccc", "pearson", "rmse"):
        assert getattr(merged, measure)() == pytest.approx(getattr(whole, measure)(), abs=EXACT)
    assert np.allclose(merged.sd(), whole.sd(), atol=EXACT)


def test_moments_keep_digits_far_from_zero(pairs):
    x, y = pairs
    assert ccc(x + 1e6, y + 1e6) == pytest.approx(ccc(x, y), abs=1e-8)


def test_special_cases():
    y = np.array([0.1, 0.4, 0.35, 0.8])
    still, other = np.full(4, 0.5), np.full(4, 0.2)
    assert ccc(y, y) == pytest.approx(1)
    assert ccc(-y + 2 * y.mean(), y) == pytest.approx(-1)
    assert ccc(still, y) == ccc(y, still) == ccc(still, other) == 0
    assert np.isnan(ccc(still, still))
    assert ccc([0.1], [0.2]) == 0
    assert np.isnan(ccc([0.1], [0.1]))
    assert np.isnan([ccc([], []), rmse([], []), mae([], []), pearson(still, y)]).all()


def test_shapes_must_agree():
    with pytest.raises(ShapeError, match=r"\(3,\), labels \(2,\)"):
        ccc([1, 2, 3], [1, 2])


# -- the loss is 1 - the metric ------------------------------------------------------------------------------------


def train_config(**changes):
    return Config().replace({"train": {"loss": "ccc_mse", "mse_weight": 0.1, "min_labelled": 64, **changes}}).train


def test_loss_agrees_with_the_metric(pairs):
    x, y = (torch.from_numpy(values).reshape(10, 20, 2) for values in pairs)
    y[2:4, 5:] = torch.nan
    expected = 1 - ccc(pairs[0], y.reshape(-1, 2).numpy()).mean()
    expected += 0.1 * (rmse(pairs[0], y.reshape(-1, 2).numpy()) ** 2).sum()
    loss = window_loss(window_sums(x, y, 0.5), 200, train_config())
    # The loss adds an epsilon of 1e-8 to a denominator of about 0.1.
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_mse_alone(pairs):
    x, y = (torch.from_numpy(values).reshape(10, 20, 2) for values in pairs)
    loss = window_loss(window_sums(x, y, 0.5), 200, train_config(loss="mse"))
    assert loss.item() == pytest.approx((rmse(*pairs) ** 2).sum(), abs=EXACT)


def test_few_labels_give_mse_weighted_by_their_share(pairs):
    x, y = (torch.from_numpy(values).reshape(10, 20, 2) for values in pairs)
    y[..., 0].view(-1)[63:] = torch.nan
    y[..., 1] = torch.nan
    loss = window_loss(window_sums(x, y, 0.5), 250, train_config())
    expected = rmse(pairs[0][:63, 0], pairs[1][:63, 0]) ** 2 * 63 / 250
    assert loss.item() == pytest.approx(expected, abs=EXACT)


def test_loss_adds_up_over_parts(pairs):
    x, y = (torch.from_numpy(values).reshape(10, 20, 2) for values in pairs)
    whole = window_sums(x, y, 0.5)
    assert torch.allclose(window_sums(x[::2], y[::2], 0.5) + window_sums(x[1::2], y[1::2], 0.5), whole, atol=EXACT)


def test_loss_has_a_gradient_everywhere():
    label = torch.full((16, 5, 2), 0.5)
    prediction = torch.full((16, 5, 2), 0.5, requires_grad=True)
    window_loss(window_sums(prediction, label, 0.5), 80, train_config()).backward()
    assert prediction.grad.isfinite().all()
    nothing = torch.full((16, 5, 2), torch.nan)
    loss = window_loss(window_sums(prediction, nothing, 0.5), 80, train_config())
    assert loss.item() == 0
