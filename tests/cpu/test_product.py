"""The native product of a few rows: right, and the same bits for any company."""

import pytest
import torch

from gigatok_ds.cpu.few_row_product import few_row_product, has_few_row_product, in_panels

pytestmark = pytest.mark.skipif(not has_few_row_product(torch.ones(1)), reason="no native kernel, or no AVX-512")


@pytest.mark.parametrize("rows", [0, 1, 3, 6, 16, 17, 35])
@pytest.mark.parametrize("depth, columns", [(1, 1), (7, 16), (64, 33), (768, 100), (256, 17), (257, 16)])
def test_it_is_the_product(rows, depth, columns):
    draws = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(size, depth, generator=draws) for size in (rows, columns))
    found = few_row_product(x, in_panels(weight), columns)
    exact = x.double() @ weight.double().T
    # The bound of any order of summation.
    bound = 2**-24 * (depth + 1) * (x.double().abs() @ weight.double().T.abs()) + 1e-30
    assert found.shape == (rows, columns) and bool(((found - exact).abs() <= bound).all())


def test_a_row_is_the_same_bits_in_any_company():
    draws = torch.Generator().manual_seed(0)
    x, panels = torch.randn(40, 96, generator=draws), in_panels(torch.randn(50, 96, generator=draws))
    threads, full = torch.get_num_threads(), few_row_product(x, panels, 50)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for rows in (1, 2, 5, 15, 33):
                assert torch.equal(few_row_product(x[:rows], panels, 50), full[:rows])
    finally:
        torch.set_num_threads(threads)


def test_leading_dimensions_and_strides_do_not_matter():
    x, weight = torch.randn(3, 8, 2).transpose(1, 2), torch.randn(5, 8)
    assert torch.equal(few_row_product(x, in_panels(weight), 5),
                       few_row_product(x.reshape(6, 8).contiguous(), in_panels(weight), 5).view(3, 2, 5))


def test_not_a_number_stays_in_its_row():
    x = torch.ones(4, 8)
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    found = few_row_product(x, in_panels(torch.ones(17, 8)), 17)
    assert found[1].isnan().all() and found[2].isinf().all() and (found[[0, 3]] == 8).all()


@pytest.mark.parametrize("rows, panels, columns", [
    (torch.ones(2, 8), torch.ones(1, 9, 16), 16), (torch.ones(2, 8), torch.ones(1, 8, 16), 17),
    (torch.ones(2, 8), torch.ones(1, 8, 8), 8), (torch.ones(2, 8).double(), torch.ones(1, 8, 16), 16),
    (torch.ones(8), torch.ones(1, 8, 16), 16), (torch.ones(2, 8), torch.ones(0, 8, 16), 0),
])
def test_what_does_not_fit_is_refused(rows, panels, columns):
    with pytest.raises(RuntimeError, match="rows and panels must be"):
        torch.ops.gigatok_native.few_row_product(rows, panels, columns)


def test_only_where_the_kernels_run(monkeypatch):
    assert has_few_row_product(torch.ones(3)) and not has_few_row_product(torch.ones(3).double())
    assert not has_few_row_product(torch.ones(3, device="meta"))
    for level in ("avx2", "portable"):
        with monkeypatch.context() as other:
            other.setenv("GIGATOK_CPU_CAPABILITY", level)
            assert not has_few_row_product(torch.ones(3))
            with pytest.raises(RuntimeError, match=f"no such product for {level}"):
                torch.ops.gigatok_native.few_row_product(torch.ones(2, 8), in_panels(torch.ones(3, 8)), 3)
    monkeypatch.setenv("GIGATOK_KERNELS", "torch")
    assert not has_few_row_product(torch.ones(3))
