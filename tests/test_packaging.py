"""What is installed, what is pinned, and what a wheel made of the source distribution holds."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import blsrdma

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LIBRARY = re.compile(r"\(NEEDED\).*\[(.+)\]")


def pins() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "ci/constraints.txt").read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line]
    assert all(str(requirement.specifier).startswith("==") for requirement in requirements)
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in requirements}


def native_library() -> Path:
    path = subprocess.run(
        [sys.executable, "-c", "import blsrdma.ucx; print(blsrdma.ucx.native.__file__)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return Path(path.stdout.strip())


def test_version() -> None:
    assert blsrdma.__version__ == PROJECT["version"]


def test_every_installed_package_is_pinned() -> None:
    if os.environ.get("CI") != "true" and not str(sys.prefix).startswith(str(ROOT)):
        pytest.skip("not the environment that ci/setup makes")
    pinned = pins()
    installed = {canonicalize_name(d.metadata["Name"]): d.version for d in importlib.metadata.distributions()}
    for name in ("blsrdma", "pip"):
        installed.pop(name, None)
    # What a CUDA build of torch brings along follows from its own requirements; and UCX's packages follow it: ci/setup.
    if "ucxx-cu13" in installed:
        installed = {n: v for n, v in installed.items() if not n.startswith("cuda-") and not n.endswith("-cu13")}
    unpinned = {
        name for name in installed if name not in pinned and not name.startswith("nvidia-") and name != "triton"
    }
    assert not unpinned
    assert {name: v for name, v in installed.items() if name in pinned and v.split("+")[0] != pinned[name]} == {}


def test_every_direct_requirement_is_pinned() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    extras = {extra: names for extra, names in PROJECT["optional-dependencies"].items() if extra != "cu13"}
    for text in [*build, *PROJECT["dependencies"], *(text for names in extras.values() for text in names)]:
        requirement = Requirement(text)
        pin = pins()[canonicalize_name(requirement.name)]
        assert pin in requirement.specifier, text


def test_the_core_needs_libucp_alone_and_names_no_path() -> None:
    dynamic = subprocess.run(
        ["readelf", "--dynamic", native_library()], capture_output=True, text=True, check=True
    ).stdout
    needed = LIBRARY.findall(dynamic)
    assert [name for name in needed if name.startswith("libuc")] == ["libucp.so.0"]
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_importing_blsrdma_loads_no_ucx() -> None:
    code = "import sys, blsrdma; sys.exit('ucxx' in sys.modules or 'libucp' in open('/proc/self/maps').read())"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_sdist_and_wheel(tmp_path: Path) -> None:
    """The source distribution holds what a build needs; the wheel works where there is no checkout."""
    source, wheels, target = tmp_path / "source", tmp_path / "wheels", tmp_path / "installed"
    build = f"from scikit_build_core.build import build_sdist; build_sdist({str(source)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True)
    (archive,) = source.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.split("/", 1)[1] for name in files.getnames()}
    native = {str(path.relative_to(ROOT)) for path in (ROOT / "blsrdma" / "native").glob("*.[ch]*")}
    assert {"LICENSE", "README.md", "CMakeLists.txt", "pyproject.toml", "blsrdma/py.typed"} | native <= names
    assert not {name for name in names if name.endswith((".so", ".o", ".pyc")) or name.startswith((".venv", "build/"))}

    # A wheel of the checkout, for the objects of ci/setup's build are used again.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, ROOT], check=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        held = set(files.namelist())
    packages = {name for name in names if name.startswith(("blsrdma/", "dlrm/", "bench/")) and "/native/" not in name}
    assert packages <= held
    assert [name for name in held if name.startswith("blsrdma/_native.") and name.endswith(".so")]
    assert not [name for name in held if name.startswith(("tests/", "ci/")) or name.endswith((".cpp", ".h"))]

    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    code = """if True:
        import sys
        sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
        import dlrm, blsrdma.ucx
        print(blsrdma.ucx.native.__file__, dlrm.__file__)
    """
    environment = {**os.environ, "PYTHONPATH": str(target)}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, check=True
    )
    assert all(path.startswith(str(target)) for path in ran.stdout.decode().split())


def test_the_core_keeps_to_the_stable_abi() -> None:
    """From Python 3.12 on the core is built once for all versions. The macros that read an object's insides, as
    PyList_GET_SIZE does, are not part of that: with Python 3.11's headers they compile all the same."""
    inside = re.compile(r"\bPy(?:List|Tuple|Bytes|Unicode|Dict|Set|Float|Sequence_Fast)_[A-Z]{2,}\w*")
    sources = [*(ROOT / "blsrdma" / "native").glob("*.cpp"), *(ROOT / "blsrdma" / "native").glob("*.h")]
    assert len(sources) > 20
    assert [(path.name, inside.findall(path.read_text())) for path in sources if inside.search(path.read_text())] == []
