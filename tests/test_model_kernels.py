"""Compiled products: those of torch for every type and number of rows, and torch alone where nothing compiles."""

import inspect
from pathlib import Path

import pytest
import torch

from cm3.model import kernels, layers
from cm3.model.kernels import Matrix, library, multiplies, multiply
from cm3.model.layers import weight_product
from cm3.model.quantized import quantize_rows


@pytest.fixture(autouse=True)
def compiled():
    if library() is None:
        pytest.skip("no C++ compiler here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "width"), [(96, 64), (37, 32), (3, 2048)])
def test_products_are_those_in_double_precision(dtype, outputs, width):
    weight = torch.randn(outputs, width).to(dtype)
    for rows in range(1, 17):
        x = torch.randn(rows, width).to(dtype)
        assert multiplies(weight, rows)
        found = multiply(x, weight)
        assert found.dtype == dtype
        tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
        expected = (x.double() @ weight.double().t()).to(dtype)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * width**0.5)


@pytest.mark.parametrize("rows", [5, 16, 17, 32])
def test_many_rows_in_tiles(rows):
    weight, x = torch.randn(64, 96).bfloat16(), torch.randn(rows, 96).bfloat16()
    if not multiplies(weight, rows):
        pytest.skip("this processor has no matrix tiles")
    expected = (x.double() @ weight.double().t()).bfloat16()
    torch.testing.assert_close(multiply(x, weight), expected, rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16])
def test_weights_of_8_bits(rows):
    weight, scale = quantize_rows(torch.randn(20, 128))
    x, out = torch.randn(rows, 128), torch.empty(rows, 20)
    room = torch.empty(rows + 16, 128)
    library().multiply(Matrix.of(weight, scale), rows, 1, x.data_ptr(), room.data_ptr(), out.data_ptr())
    expected = x.double() @ (weight * scale[:, None]).double().t()
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_among_others(dtype):
    """Bit for bit, up to the number of rows from which on tiles are used."""
    weight, x = torch.randn(33, 96).to(dtype), torch.randn(4, 96).to(dtype)
    alone = torch.cat([multiply(row[None], weight) for row in x])
    for rows in (2, 3, 4):
        assert torch.equal(multiply(x[:rows], weight), alone[:rows])


def test_what_it_is_not_for():
    weight = torch.ones(4, 64)
    assert multiplies(weight, 16) and not multiplies(weight, 17)
    assert not multiplies(weight.double(), 1)
    assert not multiplies(torch.ones(4, 40), 1)
    assert not multiplies(torch.ones(64, 32).t(), 1)
    assert multiplies(torch.nn.Parameter(weight), 1) and not multiplies(weight.as_subclass(Other), 1)


class Other(torch.Tensor):
    """A tensor with ideas of its own."""


@torch.inference_mode()
def test_rows_of_another_width_are_refused():
    """Also where no types are checked."""
    plain = inspect.unwrap(weight_product)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(RuntimeError, match="size|shape"):
            plain(torch.ones(2, 64, dtype=dtype), torch.ones(4, 128, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (1,), (2, 1), (0,), (2, 2, 2)])
def test_layers_take_it_in_any_shape_but_not_to_learn(monkeypatch, shape):
    taken = []
    monkeypatch.setattr(layers, "multiply", lambda x, weight: taken.append(x.shape) or multiply(x, weight))
    weight, x = torch.randn(48, 32), torch.randn(*shape, 32)
    weight_product(x, weight)
    assert taken == []
    with torch.inference_mode():
        found = weight_product(x, weight)
    assert taken == [x.shape] and found.shape == (*shape, 48)
    torch.testing.assert_close(found, x @ weight.t(), rtol=1e-5, atol=1e-5)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing compiled yet, and room for it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    library.cache_clear()
    yield tmp_path
    library.cache_clear()


def test_without_a_compiler_torch_does_it(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert library() is None and not multiplies(torch.ones(4, 64), 1)
    with torch.inference_mode():
        assert torch.equal(weight_product(torch.ones(1, 64), torch.ones(4, 64)), torch.full((1, 4), 64.0))


def test_a_compiler_that_fails_is_named_once(fresh, monkeypatch):
    broken = fresh / "broken"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.warns(
        UserWarning, match=r"slower than it could be: .*broken cannot compile kernels.cpp \(no such flag"
    ):
        assert library() is None
    assert library() is None and not list(fresh.rglob("*.so"))


def copier(monkeypatch, folder, made):
    """A compiler that takes what another one made, for compiling takes seconds; where it writes its arguments."""
    compiler, runs = folder / "compiler", folder / "runs"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {runs}\nfor last; do :; done\ncp {made} "$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "cache"))
    monkeypatch.setenv("CXX", f"{compiler} -an-option 'in two words'")
    return runs


@pytest.fixture
def made():
    yield library()._name
    library.cache_clear()


def test_what_cannot_be_loaded_is_made_anew(monkeypatch, tmp_path, made):
    runs = copier(monkeypatch, tmp_path, made)
    library.cache_clear()
    name = Path(library()._name).name
    (tmp_path / "nonsense").write_text("no library")
    for folder, source in [("one", made), ("two", tmp_path / "nonsense")]:  # a library is loaded once by its path
        copier(monkeypatch, tmp_path, source)
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / folder))
        target = tmp_path / folder / "open_cm3" / name
        target.parent.mkdir(parents=True)
        target.write_text("damaged")
        library.cache_clear()
        if folder == "one":
            assert library()._name == str(target) and target.read_bytes() == Path(made).read_bytes()
            continue
        with pytest.warns(UserWarning, match=r"slower than it could be: cannot load kernels.cpp compiled \(.*\.so: "):
            assert library() is None
    assert len(runs.read_text().splitlines()) == 3


def test_without_a_home_torch_does_it(monkeypatch, made):
    def unknown(_):
        raise KeyError("uid not found")

    for name in ("HOME", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    library.cache_clear()
    with pytest.warns(UserWarning, match="slower than it could be: cannot load .*home directory"):
        assert library() is None
    assert not multiplies(torch.ones(4, 64), 1)


def test_other_compilers_and_systems(fresh, monkeypatch):
    """Clang calls itself so by a macro; nobody is warned where it cannot be otherwise."""
    monkeypatch.setenv("CXX", "g++ -D__clang__")
    with pytest.warns(UserWarning, match=r"g\+\+ -D__clang__ cannot compile kernels.cpp .*only GNU compilers"):
        assert library() is None
    library.cache_clear()
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("CXX", "g++")
    library.cache_clear()
    assert library() is None
    monkeypatch.undo()
    monkeypatch.setattr("sys.platform", "darwin")
    library.cache_clear()
    assert library() is None


def test_it_is_compiled_once_for_a_processor(monkeypatch, tmp_path, made):
    runs = copier(monkeypatch, tmp_path, made)
    for processor, expected in [("one", 1), ("one", 1), ("other", 2), ("one", 2)]:
        monkeypatch.setattr(kernels, "_processor", lambda processor=processor: processor)
        library.cache_clear()
        assert library() is not None and len(runs.read_text().splitlines()) == expected
    assert "-an-option in two words -std=c++17" in runs.read_text() and "-march=native" in runs.read_text()
    assert len(list((tmp_path / "cache").rglob("*.so"))) == 2
