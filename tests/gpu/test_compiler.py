"""Kernels compile by NVRTC for GPUs of three generations, without spilling a register. No GPU is needed for that."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from blsrdma.errors import CompileError
from blsrdma.gpu import compiler, pooling, tables
from blsrdma.lookup_tables import FORMATS
from dlrm.gpu import interaction

try:
    from cuda.bindings import nvrtc

    nvrtc.nvrtcVersion()
except (ImportError, RuntimeError) as error:
    pytest.skip(f"no NVRTC: {error}", allow_module_level=True)

GENERATIONS = ((8, 0), (9, 0), (10, 0))  # A100, H100, B200


def check(name: str, image: compiler.Compiled, registers: int) -> None:
    """That the assembler gave what it takes of a multiprocessor, and spilled nothing."""
    assert image.image.startswith(b"\x7fELF")
    usage = image.usage[name]
    assert (usage.stack_bytes, usage.spilled_bytes) == (0, 0), usage
    assert 16 <= usage.registers <= registers, usage


@pytest.mark.parametrize("capability", GENERATIONS)
def test_pool(capability: compiler.Capability) -> None:
    """The kernels that most use: 24 warps of them fit on a multiprocessor of an H100."""
    for format_, weighted in (("fp32", False), ("fp32", True), ("fp16", False), ("int8", True)):
        image = compiler.nvrtc(pooling.SOURCE, pooling.defines(format_, weighted, 4), capability)
        check("pool", image, 80 if capability < (10, 0) else 128)


@pytest.mark.parametrize("capability", GENERATIONS)
def test_interaction(capability: compiler.Capability) -> None:
    """As many registers as leave room for two blocks of 256 threads; the most common kernel has one warp in a block."""
    image = compiler.nvrtc(interaction.SOURCE, interaction.defines(4, 4), capability)
    check("dot", image, 128)
    check("cat", image, 64)


@pytest.mark.slow
@pytest.mark.parametrize("capability", GENERATIONS)
def test_interaction_of_every_size(capability: compiler.Capability) -> None:
    for elements, tile in itertools.product((4, 1), (4, 2, 1)):
        check("dot", compiler.nvrtc(interaction.SOURCE, interaction.defines(elements, tile), capability), 128)


@pytest.mark.slow
@pytest.mark.parametrize("capability", GENERATIONS)
def test_pool_of_every_kind(capability: compiler.Capability) -> None:
    for format_, weighted, elements in itertools.product(FORMATS, (False, True), (4, 1)):
        image = compiler.nvrtc(pooling.SOURCE, pooling.defines(format_, weighted, elements), capability)
        check("pool", image, 80 if capability < (10, 0) else 128)


def test_rows_are_read_eight_at_a_time() -> None:
    """The goal's kernel has eight loads of 16 bytes one behind the other: what hides the latency of memory."""
    image = compiler.nvrtc(pooling.SOURCE, pooling.defines("fp32", False, 4), (99, 0))  # newer than the compiler: PTX
    text = image.image.decode()
    loads = re.findall(r"ld\.global\.nc\.v4\.(?:f32|u32|b32)", text)
    assert len(loads) == 8
    first, last = text.index(loads[0]), text.rindex(loads[0])
    assert not re.findall(r"add\.(rn\.)?f32", text[first:last])
    assert image.usage == {}


def test_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By source, macros and capability."""
    asked: list[tuple[object, ...]] = []

    def build(source: Path, defines: object, capability: compiler.Capability) -> compiler.Compiled:
        asked.append((source.read_text(), str(defines), capability))
        return compiler.Compiled(b"", "")

    monkeypatch.setattr(compiler, "build", build)
    source = tmp_path / "a.cu"
    for text, defines, capability in itertools.product(("1", "2"), ({"A": 1}, {"A": 2}), GENERATIONS):
        source.write_text(text)
        first = compiler.compiled(source, defines, capability)
        assert compiler.compiled(source, dict(defines), capability) is first
    assert len(asked) == len(set(asked)) == 12


def test_what_does_not_compile(tmp_path: Path) -> None:
    """The compiler's words are in the error."""
    source = tmp_path / "wrong.cu"
    source.write_text('extern "C" __global__ void wrong() { nothing(); }')
    with pytest.raises(CompileError, match="wrong.cu does not compile for sm_90") as error:
        compiler.nvrtc(source, {}, (9, 0))
    assert 'identifier "nothing" is undefined' in error.value.log
    with pytest.raises(CompileError, match=r"compute capability \(1, 0\)"):
        compiler.nvrtc(source, {}, (1, 0))


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install is said."""

    def missing() -> None:
        raise RuntimeError("libnvrtc.so not found")

    monkeypatch.setattr(nvrtc, "nvrtcGetSupportedArchs", missing)
    with pytest.raises(CompileError, match="install nvidia-cuda-nvrtc-cu12") as error:
        compiler.nvrtc(pooling.SOURCE, {}, (9, 0))
    assert error.value.log == ""


@pytest.mark.parametrize("capability", GENERATIONS)
def test_pool_rows(capability: compiler.Capability) -> None:
    """What owners pool requests with: no register is spilled, and there is a kernel for each row format."""
    image = compiler.nvrtc(tables.SOURCE, {}, capability)
    assert set(image.usage) == {"copy_rows", *(f"pool_{format_}" for format_ in FORMATS)}
    for name in image.usage:
        check(name, image, 80)


def test_what_is_included(tmp_path: Path) -> None:
    """Lines keep their files and numbers in the compiler's words."""
    (tmp_path / "part.cuh").write_text("using Type = int;\nstatic_assert(false);\n")
    source = tmp_path / "whole.cu"
    source.write_text('// first\n#include "part.cuh"\nstatic_assert(sizeof(Type) == 4);\nstatic_assert(false);\n')
    with pytest.raises(CompileError) as error:
        compiler.nvrtc(source, {}, (9, 0))
    assert re.findall(r"(\w+\.cuh?)\((\d)\): error", error.value.log) == [("part.cuh", "2"), ("whole.cu", "4")]
