"""oneDNN computes float32 products only where they stay float32; attention's small ones are left to MKL."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from evals import products


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


def test_what_is_preferred_is_as_exact_as_float32() -> None:
    preferred = products.prefer_onednn()
    assert (torch.backends.mkldnn.matmul.fp32_precision == products.ALLOWED) is preferred
    one, other = torch.randn(300, 700), torch.randn(700, 200)
    exact = one.double() @ other.double()
    assert float(((one @ other) - exact).abs().max() / exact.std()) < 2e-5  # bfloat16's would be a hundred times that


def test_a_cpu_that_rounds_keeps_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter((1e-6, 3e-3))
    monkeypatch.setattr(products, "_error", lambda: next(errors))
    assert not products.prefer_onednn()
    assert torch.backends.mkldnn.matmul.fp32_precision == products.EXACT


def test_small_products_are_left_to_mkl_for_a_while() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = products.ALLOWED
    with products.many_small():
        assert torch.backends.mkldnn.matmul.fp32_precision == products.EXACT
    assert torch.backends.mkldnn.matmul.fp32_precision == products.ALLOWED
    with pytest.raises(RuntimeError, match="inside"), products.many_small():
        raise RuntimeError("inside")
    assert torch.backends.mkldnn.matmul.fp32_precision == products.ALLOWED


def test_a_torch_without_the_setting_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends, "mkldnn", SimpleNamespace())
    assert not products.prefer_onednn()
    with products.many_small():
        pass
