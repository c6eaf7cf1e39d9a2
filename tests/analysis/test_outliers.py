import statistics

import pytest
import torch
from torch import nn

from visionattn.analysis import outliers
from visionattn.testing import randn

VALUES = [[1.0, 2.0, 3.0, -10.0], [0.5, 0.5, 0.5, 0.75]]


def by_hand(values: list[float]) -> float:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return sum((v - mean) ** 4 for v in values) / len(values) / (variance**2 + 1e-6)


def test_both_measures_are_those_computed_by_hand() -> None:
    x = torch.tensor(VALUES, dtype=torch.float64).view(2, 2, 2)
    assert outliers.infinity_norm(x).tolist() == [10.0, 0.75]
    torch.testing.assert_close(outliers.kurtosis(x).tolist(), [by_hand(v) for v in VALUES], rtol=1e-12, atol=0)


def test_kurtosis_of_known_distributions() -> None:
    x = randn(1, 200_000, dtype=torch.float64)
    assert outliers.kurtosis(x).item() == pytest.approx(3.0, abs=0.1)
    assert outliers.kurtosis(x.sign()).item() == pytest.approx(1.0, abs=1e-3)
    x[0, 0] = 1000.0
    assert outliers.kurtosis(x).item() > 1000


def test_a_model_is_measured_image_by_image_and_left_without_hooks() -> None:
    model = nn.Sequential()
    model.add_module("blocks", nn.ModuleList([nn.Identity(), nn.Flatten()]))
    model.forward = lambda x: model.blocks[1](2 * model.blocks[0](x))  # type: ignore[method-assign]
    batches = [torch.tensor(VALUES[:1]), torch.tensor(VALUES[1:])]
    found = outliers.measure(model, batches)
    assert (found.images, found.max_infinity_norm) == (2, pytest.approx((20 + 1.5) / 2))
    assert [row.name for row in found.activations] == ["blocks.0", "blocks.1"]
    halves = [statistics.mean(by_hand([k * v for v in values]) for values in VALUES) for k in (1, 2)]
    assert found.mean_kurtosis == pytest.approx(statistics.mean(halves))
    assert found.max_kurtosis == pytest.approx(max(halves))
    assert not any(module._forward_hooks for module in model.modules())


def test_what_there_is_nothing_to_measure_of() -> None:
    with pytest.raises(ValueError, match="no module of Linear has a name with 'attn"):
        outliers.measure(nn.Linear(2, 2), [torch.ones(1, 2)], activations="attn")
    with pytest.raises(ValueError, match="no images"):
        outliers.measure(nn.Sequential(nn.Linear(2, 2)), [], activations="0")
