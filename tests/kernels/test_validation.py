"""Every wrong argument of the operation: an error of the right type, with the offending value in it."""

import pytest
import torch

from dynconv_hf.kernels import headwise_dynamic_conv1d, lowrank_dynamic_conv1d, static_conv1d, static_conv1d_update

X = torch.zeros(2, 5, 6)
S = torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], S), {}, TypeError, "x must be a tensor, got list"),
        ((X.int(), S), {}, TypeError, "x must be a floating tensor, got dtype torch.int32"),
        ((X.to(torch.float8_e4m3fn), S), {}, TypeError, "got torch.float8_e4m3fn"),
        ((X[0], S), {}, ValueError, r"x must have shape \(B, T, D\), got \(5, 6\)"),
        ((X, S[0]), {}, ValueError, r"static_filter must have shape \(W, D\), got \(6,\)"),
        ((X, S.long()), {}, TypeError, "static_filter must be a floating tensor, got dtype torch.int64"),
        ((X, torch.zeros(4, 5)), {}, ValueError, r"\(W, D\) = \(4, 6\), got \(4, 5\)"),
        ((X, torch.zeros(0, 6)), {}, ValueError, "from 1 to 8, got 0"),
        ((X, torch.zeros(9, 6)), {}, ValueError, "from 1 to 8, got 9"),
        ((X, S), {"positions": torch.zeros(2, 4, dtype=torch.long)}, ValueError, r"\(2, 5\).*got \(2, 4\)"),
        ((X, S), {"positions": torch.zeros(5, dtype=torch.long)}, ValueError, r"got \(5,\)"),
        ((X, S), {"positions": torch.zeros(2, 5)}, TypeError, "integer tensor, got dtype torch.float32"),
        ((X, S), {"positions": torch.zeros(2, 5, dtype=torch.bool)}, TypeError, "got dtype torch.bool"),
        ((X, S), {"positions": [0, 1]}, TypeError, "positions must be a tensor, got list"),
        ((X, S), {"initial_state": torch.zeros(2, 4, 6)}, ValueError, r"\(2, 3, 6\), got \(2, 4, 6\)"),
        ((X, S), {"initial_state": torch.zeros(2, 3, 6).int()}, TypeError, "initial_state must be a floating tensor"),
        ((X, S.to("meta")), {}, ValueError, "on the device of x, cpu, got meta"),
        ((X, S), {"impl": "cuda"}, ValueError, "impl must be one of .*got 'cuda'"),
    ],
)
def test_static(arguments, options, error, message):
    with pytest.raises(error, match=message):
        static_conv1d(*arguments, **options)


@pytest.mark.parametrize(
    ("filters", "error", "message"),
    [
        (torch.zeros(2, 5, 4, 4), ValueError, "H must divide the channels D, got H = 4, D = 6"),
        (torch.zeros(2, 5, 0, 4), ValueError, "got H = 0, D = 6"),
        (torch.zeros(2, 4, 3, 4), ValueError, r"B, T = \(2, 5\) as in x, got \(2, 4, 3, 4\)"),
        (torch.zeros(2, 5, 3), ValueError, r"\(B, T, H, W\).*got \(2, 5, 3\)"),
        (torch.zeros(2, 5, 3, 9), ValueError, "from 1 to 8, got 9"),
        (None, TypeError, "filters must be a tensor, got NoneType"),
    ],
)
def test_headwise(filters, error, message):
    with pytest.raises(error, match=message):
        headwise_dynamic_conv1d(X, filters)


@pytest.mark.parametrize(
    ("coefficients", "basis", "error", "message"),
    [
        (torch.zeros(2, 5, 0), torch.zeros(0, 4, 6), ValueError, r"R must be at least 1, got .*\(2, 5, 0\)"),
        (torch.zeros(2, 5, 3), torch.zeros(2, 4, 6), ValueError, r"R = 3 .*got \(2, 4, 6\)"),
        (torch.zeros(2, 5, 3), torch.zeros(3, 4, 5), ValueError, r"D = 6 .*got \(3, 4, 5\)"),
        (torch.zeros(2, 5, 3), torch.zeros(3, 0, 6), ValueError, "from 1 to 8, got 0"),
        (torch.zeros(1, 5, 3), torch.zeros(3, 4, 6), ValueError, r"B, T = \(2, 5\) as in x, got \(1, 5, 3\)"),
        (torch.zeros(2, 5, 3).long(), torch.zeros(3, 4, 6), TypeError, "coefficients must be a floating tensor"),
    ],
)
def test_lowrank(coefficients, basis, error, message):
    with pytest.raises(error, match=message):
        lowrank_dynamic_conv1d(X, coefficients, basis)


@pytest.mark.parametrize(
    ("x", "state", "positions", "error", "message"),
    [
        (X, torch.zeros(2, 3, 6), None, ValueError, r"x must have shape \(B, D\), got \(2, 5, 6\)"),
        (X[:, 0], torch.zeros(2, 4, 6), None, ValueError, r"\(2, 3, 6\), got \(2, 4, 6\)"),
        (X[:, 0], None, None, TypeError, "state must be a tensor, got NoneType"),
        (X[:, 0], torch.zeros(2, 3, 6), torch.tensor(1), ValueError, "positions must have a batch dimension"),
        (X[:, 0], torch.zeros(2, 3, 6), torch.zeros(3, dtype=torch.long), ValueError, r"got \(3, 1\)"),
    ],
)
def test_update(x, state, positions, error, message):
    with pytest.raises(error, match=message):
        static_conv1d_update(x, S, state, positions=positions)


def test_the_environment_overrides_auto_only(monkeypatch):
    monkeypatch.setenv("DYNCONV_IMPL", "cutlass")
    with pytest.raises(ValueError, match=r"DYNCONV_IMPL must be one of .*got 'cutlass'"):
        static_conv1d(X, S)
    static_conv1d(X, S, impl="reference")
    monkeypatch.setenv("DYNCONV_IMPL", "reference")
    static_conv1d(X, S)
