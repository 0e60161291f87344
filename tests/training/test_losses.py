"""Losses against references written out by hand in float64."""

import math

import pytest
import torch

from dream_hf.training.losses import (
    DISTRIBUTION_LOSSES,
    distribution_losses,
    kl_divergence,
    masked_mean,
    negative_log_acceptance,
    normalize_features,
    smooth_l1,
    step_weights,
    total_variation,
)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def randn(generator, *shape, scale=1.0, dtype=torch.float64):
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def softmax(logits):
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    return [weight / sum(weights) for weight in weights]


# Plain Python, one position at a time: p and q are lists of probabilities.
REFERENCES = {
    "kl": lambda p, q: sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
    "tv": lambda p, q: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
    "nla": lambda p, q: -math.log(sum(min(a, b) for a, b in zip(p, q, strict=True))),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_distribution_loss_equals_its_formula(name, dtype, tolerance, generator):
    target, drafter = randn(generator, 2, 5, 11, scale=3), randn(generator, 2, 5, 11, scale=3)
    losses = DISTRIBUTION_LOSSES[name](target.to(dtype).log_softmax(-1), drafter.to(dtype).log_softmax(-1))
    assert losses.shape == (2, 5) and losses.dtype == dtype
    for row in range(2):
        for place in range(5):
            expected = REFERENCES[name](softmax(target[row, place].tolist()), softmax(drafter[row, place].tolist()))
            assert float(losses[row, place]) == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", REFERENCES)
def test_distribution_loss_is_least_at_the_target(name, generator):
    log_p = randn(generator, 4, 9).log_softmax(-1)
    at_target = DISTRIBUTION_LOSSES[name](log_p, log_p)
    torch.testing.assert_close(at_target, torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (DISTRIBUTION_LOSSES[name](log_p, randn(generator, 4, 9).log_softmax(-1)) > 0.01).all()


@pytest.mark.parametrize("name", REFERENCES)
def test_gradient_of_distribution_loss(name, generator):
    log_p, logits = randn(generator, 3, 7).log_softmax(-1), randn(generator, 3, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: DISTRIBUTION_LOSSES[name](log_p, q.log_softmax(-1)), logits)


def test_tokens_that_the_target_rules_out():
    """A head may give -inf (a token that is never allowed): no NaN, in the loss or its gradient."""
    target = torch.tensor([[0.0, 1.0, -math.inf]])
    for drafter in ([0.0, 1.0, 0.5], [0.0, 1.0, -math.inf]):
        logits = torch.tensor([drafter], requires_grad=True)
        for loss in (kl_divergence, total_variation, negative_log_acceptance):
            value = loss(target.log_softmax(-1), logits.log_softmax(-1))
            assert value.isfinite().all()
            assert torch.autograd.grad(value.sum(), logits)[0].isfinite().all()
    p, q = softmax([0.0, 1.0]), softmax([0.0, 1.0, 0.5])
    expected = sum(a * math.log(a / b) for a, b in zip(p, q[:2], strict=True))
    value = kl_divergence(target.log_softmax(-1), torch.tensor([[0.0, 1.0, 0.5]]).log_softmax(-1))
    assert float(value) == pytest.approx(expected, rel=1e-5)


def test_acceptance_keeps_its_gradient_where_nothing_overlaps():
    log_p = torch.tensor([[0.0, -90.0]]).log_softmax(-1)
    logits = torch.tensor([[-90.0, 0.0]], requires_grad=True)
    (tv,) = torch.autograd.grad(total_variation(log_p, logits.log_softmax(-1)).sum(), logits)
    (nla,) = torch.autograd.grad(negative_log_acceptance(log_p, logits.log_softmax(-1)).sum(), logits)
    assert tv.abs().max() < 1e-20 < 0.1 < nla.abs().max()


def test_smooth_l1_equals_its_formula(generator):
    drafted, features = randn(generator, 2, 3, 8, scale=2), randn(generator, 2, 3, 8, scale=2)

    def reference(a, b, beta):
        differences = [abs(x - y) for x, y in zip(a, b, strict=True)]
        return sum(d * d / (2 * beta) if d < beta else d - beta / 2 for d in differences) / len(differences)

    for beta in (1.0, 0.25):
        losses = smooth_l1(drafted, features, beta=beta)
        for row in range(2):
            for place in range(3):
                expected = reference(drafted[row, place].tolist(), features[row, place].tolist(), beta)
                assert float(losses[row, place]) == pytest.approx(expected, rel=1e-12)
    assert smooth_l1(drafted.bfloat16(), features.bfloat16()).dtype == torch.float32


def test_normalised_features_have_length_one_and_the_same_direction(generator):
    features = randn(generator, 4, 16, scale=30)
    normalised = normalize_features(features)
    torch.testing.assert_close(normalised.square().mean(-1), torch.ones(4, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(normalize_features(features * 7), normalised)
    torch.testing.assert_close(torch.cosine_similarity(normalised, features), torch.ones(4, dtype=torch.float64))
    assert normalize_features(torch.zeros(2, 16)).isfinite().all()


# -- chunks -----------------------------------------------------------------------------------------------------------


class Head(torch.nn.Module):
    """An LM head with soft-capping that remembers how many positions it saw at once."""

    def __init__(self, generator):
        super().__init__()
        self.weight = torch.nn.Parameter(randn(generator, 13, 6), requires_grad=False)
        self.largest = 0

    def forward(self, features):
        self.largest = max(self.largest, len(features))
        return 5.0 * torch.tanh(features @ self.weight.T / 5.0)


@pytest.mark.parametrize("num_positions", [1, 7, 8])
def test_chunks_change_neither_losses_nor_gradients(num_positions, generator):
    head, names = Head(generator), ["kl", "tv", "nla"]
    features = randn(generator, num_positions, 6)
    drafted = randn(generator, num_positions, 6).requires_grad_()
    log_p, log_q = head(features).log_softmax(-1), head(drafted).log_softmax(-1)
    expected = {name: DISTRIBUTION_LOSSES[name](log_p, log_q) for name in names}
    weights = dict(zip(names, (1.0, 0.3, 2.0), strict=True))
    (expected_gradient,) = torch.autograd.grad(sum(weights[name] * expected[name].sum() for name in names), drafted)
    for max_logits in (1, 13 * 3, 13 * 100):
        head.largest = 0
        losses = distribution_losses(drafted, features, head, names, max_logits=max_logits)
        for name in names:
            torch.testing.assert_close(losses[name], expected[name], atol=1e-12, rtol=0)
        (gradient,) = torch.autograd.grad(sum(weights[name] * losses[name].sum() for name in names), drafted)
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-12, rtol=0)
        assert head.largest <= max(1, max_logits // 13)


def test_chunks_send_no_gradient_to_the_target(generator):
    head, features = Head(generator), randn(generator, 8, 6).requires_grad_()
    drafted = randn(generator, 8, 6).requires_grad_()
    distribution_losses(drafted, features, head, ["kl"], max_logits=13 * 3)["kl"].sum().backward()
    assert features.grad is None and head.weight.grad is None
    assert drafted.grad is not None and drafted.grad.abs().sum() > 0


def test_no_positions_give_a_loss_of_nothing_with_a_gradient(generator):
    drafted = randn(generator, 0, 6).requires_grad_()
    losses = distribution_losses(drafted, randn(generator, 0, 6), Head(generator), ["kl", "nla"])
    loss = masked_mean(losses["kl"], torch.ones(0, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0 and drafted.grad is not None


# -- reduction --------------------------------------------------------------------------------------------------------


def test_masked_mean_ignores_what_is_outside_the_mask():
    values = torch.tensor([[1.0, math.nan, 3.0], [math.inf, 5.0, 7.0]], requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    loss = masked_mean(values, mask)
    assert float(loss.detach()) == 3.0
    loss.backward()
    torch.testing.assert_close(values.grad, mask / 3)
    values = values.detach()
    assert float(masked_mean(values, mask, num_items=6)) == 1.5
    assert float(masked_mean(values, mask & False)) == 0.0


def test_global_normalisation_does_not_depend_on_how_rows_are_spread(generator):
    """Two shards over the global count add up to one batch; means of means would not."""
    values, mask = randn(generator, 4, 10), torch.rand(4, 10, generator=generator) < 0.3
    mask[0] = True
    whole = masked_mean(values, mask)
    shards = [masked_mean(values[rows], mask[rows], num_items=mask.sum()) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(shards), whole)
    means = [masked_mean(values[rows], mask[rows]) for rows in (slice(0, 1), slice(1, 4))]
    assert abs(float(sum(means) / 2 - whole)) > 1e-3


def test_step_weights_decay():
    assert step_weights(3, 0.8) == pytest.approx([1.0, 0.8, 0.64])
