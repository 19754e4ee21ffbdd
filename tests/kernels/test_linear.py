"""Linear layers in bfloat16: every path against fp32, bits that depend on the row alone, and which path is chosen."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from native_checks import compile_program, run_check

from laguna_serve.kernels import isa
from laguna_serve.kernels import linear as package
from laguna_serve.kernels.isa import IsaError, choose_path, multiplies_bf16, uses_linear_op
from laguna_serve.kernels.linear import build, launch, linear, linear_reference

ZEN4 = {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"}
SAPPHIRE_RAPIDS = ZEN4 | {"GenuineIntel", "amx_bf16", "amx_tile"}
SKYLAKE = ZEN4 - {"avx512_bf16"}
HASWELL = {"avx2", "fma"}
HERE = isa.find_usable()
RUNNABLE = [path for path, needed in isa.PATHS.items() if needed <= HERE]
# One step, a part of one, several and a rest; a row; fewer and more rows than are narrowed together.
SIZES = [(K, N) for K in (1, 7, 16, 31, 160, 1030) for N in (1, 5, 33, 130)]


@pytest.fixture(scope="session", params=RUNNABLE)
def library(request: pytest.FixtureRequest) -> Callable[..., int]:
    return build.open_library(build.build(request.param))


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What was loaded before is forgotten, and what the test loads is too."""
    build.load_library.cache_clear()
    yield
    build.load_library.cache_clear()


def make(M: int, K: int, N: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(M + K + N)
    return tuple(torch.randn(*size).bfloat16() for size in ((M, K), (N, K), (N,)))  # type: ignore[return-value]


def assert_close(out: torch.Tensor, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Within one rounding to bfloat16 of the sum, and what fp32 sums of another order differ by."""
    exact = x.double() @ w.double().t() + (0 if bias is None else bias.double())
    scale = x.double().abs() @ w.double().abs().t() + 1
    assert out.dtype == torch.bfloat16
    assert bool(((out.double() - exact).abs() <= exact.abs() * 2**-8 + scale * 1e-5).all())


@pytest.mark.parametrize(("K", "N"), SIZES)
@pytest.mark.parametrize("biased", [False, True])
def test_values(library: Callable[..., int], K: int, N: int, biased: bool) -> None:
    x, w, bias = make(21, K, N)
    out = launch.run_with(library, x, w, bias if biased else None, 1)
    assert_close(out, x, w, bias if biased else None)


@pytest.mark.parametrize(("K", "N"), [(31, 33), (160, 512), (2048, 130)])
def test_bits_of_a_row_depend_on_neither_batch_nor_threads(library: Callable[..., int], K: int, N: int) -> None:
    x, w, bias = make(300, K, N)  # more rows than are widened at once
    whole = launch.run_with(library, x, w, bias, 1)
    for M in (*range(18), 64, 257):
        for threads in (1, 3):
            assert torch.equal(launch.run_with(library, x[:M], w, bias, threads), whole[:M])
    for first in (1, 2, 3, 255):  # another place in its tile
        assert torch.equal(launch.run_with(library, x[first:], w, bias, 2), whole[first:])


def test_strides(library: Callable[..., int]) -> None:
    x, w, _ = make(9, 96, 24)
    wide, fat = torch.randn(9, 200).bfloat16(), torch.randn(24, 100).bfloat16()
    wide[:, 50:146], fat[:, 2:98] = x, w
    plain = launch.run_with(library, x, w, None, 1)
    assert torch.equal(launch.run_with(library, wide[:, 50:146], fat[:, 2:98], None, 1), plain)
    assert torch.equal(launch.run_with(library, x.t().contiguous().t(), w, None, 1), plain)
    assert torch.equal(launch.run_with(library, x.view(3, 3, 96), w, None, 1), plain.view(3, 3, 24))
    assert torch.equal(launch.run_with(library, x[0], w, None, 1), plain[0])


@pytest.mark.parametrize(("M", "K", "N"), [(600, 1070, 1088), (520, 1040, 1001), (200, 2100, 70)])
def test_many_rows_have_the_bits_of_few(library: Callable[..., int], M: int, K: int, N: int) -> None:
    """In more than are packed at once, parts of K, blocks of outputs and whole lines of a large result."""
    x, w, bias = make(M, K + 8, N)
    x, w = x[:, :K], torch.cat((w, w), 1)[:, :K]
    few = torch.cat([launch.run_with(library, rows, w, bias, 1) for rows in x.split(60)])
    assert_close(few[:9], x[:9], w, bias)
    for threads in (1, 3):
        assert torch.equal(launch.run_with(library, x, w, bias, threads), few)


@pytest.mark.parametrize("shape", [(0, 8, 4), (3, 0, 4), (3, 8, 0)], ids=["no rows", "no inputs", "no outputs"])
def test_empty(library: Callable[..., int], shape: tuple[int, int, int]) -> None:
    x, w, bias = make(*shape)
    out = launch.run_with(library, x, w, bias, 2)
    assert out.shape == (shape[0], shape[2])
    assert torch.equal(out, linear_reference(x, w, bias))
    several = x.reshape(1, *x.shape)
    assert torch.equal(launch.run_with(library, several, w, bias, 2), out[None])


def test_what_is_not_finite_stays_in_its_row_and_column(library: Callable[..., int]) -> None:
    x, w, _ = make(4, 40, 6)
    x[1, 39], w[2, 3] = float("nan"), float("inf")
    out, clean = launch.run_with(library, x, w, None, 1), launch.run_with(library, *make(4, 40, 6)[:2], None, 1)
    assert out[1].isnan().all()
    assert not out[[0, 2, 3]][:, 2].isfinite().any()
    keep = [0, 1, 3, 4, 5]
    assert torch.equal(out[[0, 2, 3]][:, keep], clean[[0, 2, 3]][:, keep])


@pytest.mark.slow
@pytest.mark.skipif("avx512_bf16" not in HERE, reason="what is around the tiles needs AVX-512")
def test_tiles_of_an_emulated_amx(tmp_path: Path) -> None:
    """The path of AMX with its tiles in plain C++: values and row bits, where no processor has them."""
    own = (flag for flag in (*build.FLAGS, *build.PATH_FLAGS["avx512bf16"]) if flag != "-shared")
    here = Path(__file__).parent
    commands = [
        (build.find_source(isa.TILES), (*own, "-DEMULATE_AMX", f"-I{here}")),
        (here / "linear_check.cpp", ("-std=c++17", "-O2")),
    ]
    run_check(compile_program(shutil.which("g++") or "c++", commands, tmp_path, ("-fopenmp",)))


@pytest.mark.slow
def test_op_is_a_node_of_a_compiled_graph() -> None:
    x, w, bias = make(5, 48, 20)
    torch.library.opcheck(torch.ops.laguna_serve.linear.default, (x, w, bias))
    compiled = torch.compile(lambda rows: linear(rows * 2, w, bias) + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), linear(x * 2, w, bias) + 1)


def test_op_runs_without_python(monkeypatch: pytest.MonkeyPatch) -> None:
    product = build.load_library()
    assert product is not None
    x, w, bias = make(9, 96, 24)
    wide = torch.randn(9, 200).bfloat16()
    wide[:, 50:146] = x
    op = torch.ops.laguna_serve.linear.default
    cases = [x, wide[:, 50:146], x.t().contiguous().t(), x[:1], x[:0]]
    expected = [launch.run_with(product, rows, w, bias, 1) for rows in cases]
    monkeypatch.setattr(launch, "run_with", None)
    for rows, out in zip(cases, expected, strict=True):
        assert torch.equal(op(rows, w, bias), out)
    whole = op(x, w, None)
    assert torch.equal(op(x.view(3, 3, 96), w, None), whole.view(3, 3, 24))
    assert torch.equal(op(x.view(3, 3, 96).transpose(0, 1), w, None), whole.view(3, 3, 24).transpose(0, 1))
    assert torch.equal(op(x[0], w, None), whole[0])


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(2, 8)},
        {"x": torch.zeros(2, 9).bfloat16()},
        {"weight": torch.zeros(8, 4).bfloat16().t()},
        {"weight": torch.zeros(4, 2, 4).bfloat16()},
        {"bias": torch.zeros(5).bfloat16()},
        {"bias": torch.zeros(8).bfloat16()[::2]},
    ],
)
def test_op_reads_nothing_that_is_not_as_expected(change: dict[str, torch.Tensor]) -> None:
    assert build.load_library() is not None
    zeros = {"x": torch.zeros(2, 8), "weight": torch.zeros(4, 8), "bias": torch.zeros(4)}
    tensors = {name: tensor.bfloat16() for name, tensor in zeros.items()} | change
    with pytest.raises((RuntimeError, ValueError), match="linear"):
        torch.ops.laguna_serve.linear.default(*tensors.values())


def test_product_without_the_op(
    forgotten: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> Path:
        raise build.BuildError("g++: expected to make op.cpp, got no torch")

    monkeypatch.setattr(build, "build_op", fail)
    x, w, bias = make(3, 16, 8)
    assert torch.equal(launch.run_from_python(x, w, bias), linear(x, w, bias))
    assert "through Python: g++: expected to make op.cpp" in caplog.text


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x": torch.zeros(2, 8)}, TypeError, "in bfloat16, got torch.float32"),
        ({"bias": torch.zeros(4)}, TypeError, "in bfloat16"),
        ({"x": torch.zeros(2, 9).bfloat16()}, ValueError, r"x \[..., K\] and weight \[N, K\]"),
        ({"weight": torch.zeros(8, 4).bfloat16().t()}, ValueError, "contiguous rows"),
        ({"bias": torch.zeros(5).bfloat16()}, ValueError, r"expected \[4\]"),
    ],
)
def test_bad_arguments(change: dict[str, torch.Tensor], error: type[Exception], says: str) -> None:
    zeros = {"x": torch.zeros(2, 8), "weight": torch.zeros(4, 8), "bias": torch.zeros(4)}
    with pytest.raises(error, match=says):
        linear(**({name: tensor.bfloat16() for name, tensor in zeros.items()} | change))


@pytest.mark.parametrize(
    ("flags", "environ", "bf16", "path", "op"),
    [
        (ZEN4, {}, True, "avx512bf16", True),
        (SKYLAKE, {}, False, "avx512", True),
        (HASWELL, {}, False, "avx2", True),
        ({"avx2"}, {}, False, "portable", True),
        ({"asimd"}, {}, False, "neon", True),
        ({"asimd", "bf16"}, {}, True, "neon", False),
        (set(), {}, False, "portable", True),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, False, "avx2", True),
        (ZEN4, {"ATEN_CPU_CAPABILITY": "avx2"}, False, "avx2", True),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, False, "avx512", True),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True, "avx512bf16", True),
        (ZEN4, {"LAGUNA_CPU_ISA": "avx2"}, False, "avx2", True),
        (ZEN4, {"LAGUNA_CPU_ISA": "avx512"}, False, "avx512", True),
        (ZEN4, {"LAGUNA_CPU_ISA": "portable"}, False, "portable", True),
        (ZEN4, {"LAGUNA_CPU_ISA": "avx512bf16"}, True, "avx512bf16", True),
        (ZEN4, {"LAGUNA_CPU_ISA": ""}, True, "avx512bf16", True),
        (ZEN4, {"LAGUNA_CPU_KERNELS": "vLLM"}, True, "avx512bf16", False),
        (HASWELL, {"LAGUNA_CPU_KERNELS": "vllm"}, False, "avx2", False),
        (HASWELL | {"avx512f", "amx_bf16"}, {}, True, "avx2", False),
        (ZEN4 | {"GenuineIntel"}, {}, False, "avx512", True),
        (ZEN4 | {"GenuineIntel"}, {"LAGUNA_CPU_ISA": "avx512bf16"}, True, "avx512bf16", True),
        (SAPPHIRE_RAPIDS, {}, True, "amx", True),
        (SAPPHIRE_RAPIDS, {"LAGUNA_CPU_ISA": "amx"}, True, "amx", True),
        (SAPPHIRE_RAPIDS, {"LAGUNA_CPU_ISA": "avx512bf16"}, True, "avx512bf16", True),
        (SAPPHIRE_RAPIDS, {"LAGUNA_CPU_KERNELS": "vllm"}, True, "amx", False),
        (SAPPHIRE_RAPIDS, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, True, "amx", True),
        (SAPPHIRE_RAPIDS, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16"}, False, "avx512", True),
        (ZEN4 | {"AuthenticAMD"}, {}, True, "avx512bf16", True),
        (SKYLAKE | {"GenuineIntel"}, {}, False, "avx512", True),
        (HASWELL, {"ATEN_CPU_CAPABILITY": "default"}, False, "avx2", True),
    ],
)
def test_choice(flags: set[str], environ: dict[str, str], bf16: bool, path: str, op: bool) -> None:
    assert multiplies_bf16(flags, environ) is bf16
    assert choose_path(flags, environ) == path
    assert uses_linear_op(flags, environ) is op


@pytest.mark.parametrize(("granted", "path"), [(True, "amx"), (False, "avx512")])
def test_tiles_that_linux_does_not_give_are_not_used(granted: bool, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "read_flags", lambda: frozenset(SAPPHIRE_RAPIDS))
    monkeypatch.setattr(isa, "ask_for_tiles", lambda: granted)
    assert choose_path(environ={}) == path
    assert multiplies_bf16(environ={}) is granted


def test_instructions_and_vendor_are_read(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    processor = "vendor_id\t: GenuineIntel\nmodel name\t: Xeon\nflags\t\t: fma avx512_bf16\n\n"
    file.write_text(processor * 2, encoding="utf-8")
    assert isa.read_flags(file) == {"GenuineIntel", "fma", "avx512_bf16"}
    file.write_text("processor\t: 0\nFeatures\t: asimd bf16\n", encoding="utf-8")
    assert isa.read_flags(file) == {"asimd", "bf16"}
    assert isa.read_flags(tmp_path / "absent") == frozenset()


@pytest.mark.parametrize(
    ("name", "says"), [("sse9", "expected avx512bf16, amx, neonbf16, avx512, "), ("avx512", "with avx512bw")]
)
def test_wrong_choice(name: str, says: str) -> None:
    with pytest.raises(IsaError, match=says):
        choose_path(HASWELL, {"LAGUNA_CPU_ISA": name})


def test_wrong_library() -> None:
    with pytest.raises(IsaError, match=r"LAGUNA_CPU_KERNELS: expected vllm or nothing, got 'torch'"):
        uses_linear_op(ZEN4, {"LAGUNA_CPU_KERNELS": "torch"})


def test_variable_chooses_the_library(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    monkeypatch.setattr(build, "build", lambda path: built.append(path) or Path("none.so"))  # type: ignore[func-returns-value]
    monkeypatch.setenv("LAGUNA_CPU_ISA", "portable")
    assert build.load_library() is None
    assert built == ["portable"]


def test_no_compiler(
    forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    x, w, bias = make(3, 16, 8)
    with caplog.at_level(logging.WARNING):
        assert_close(launch.run_from_python(x, w, bias), x, w, bias)
        launch.run_from_python(x, w, bias)
    (record,) = caplog.records
    assert "install g++ or name one in CXX" in record.getMessage()


@pytest.mark.parametrize(
    ("script", "says"), [("exit 0", "No such file"), ("echo 'cpu.cpp:1: error: no' >&2; exit 1", "error: no")]
)
def test_compiler_that_fails(
    forgotten: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    script: str,
    says: str,
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    assert build.load_library() is None
    assert "using vLLM's" in caplog.text
    assert says in caplog.text


@pytest.mark.slow
def test_library_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = build.build("portable")
    stamp = first.stat().st_mtime_ns
    assert build.build("portable") == first
    assert first.stat().st_mtime_ns == stamp
    assert build.SOURCES.parent == Path(package.__file__).parent
