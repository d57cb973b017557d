"""With `KMQ_JAX_PREBUILT=1` in the environment a wheel holds the native kernels, compiled; else nothing is compiled.

KMQ_JAX_PREBUILT=1 python -m build --wheel
"""

import os
import runpy
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PREBUILT = os.environ.get("KMQ_JAX_PREBUILT", "0") == "1"
HEADERS = "jaxlib>=0.10,<0.11"  # the oldest that the package runs with: what is compiled with its headers runs with all


class BuildKernels(build_py):
    """Compiles the kernels into the package."""

    def run(self) -> None:
        """Builds the package, and the kernels within."""
        super().run()
        import jaxlib

        prebuilt = runpy.run_path(str(Path(__file__).parent / "kmq_jax" / "nn" / "cpu" / "prebuilt.py"))
        compiler = prebuilt["compiler"]()
        if compiler is None:
            raise SystemExit("KMQ_JAX_PREBUILT=1 needs a C++ compiler")
        include = Path(jaxlib.__file__).parent / "include"
        if not prebuilt["build"](Path(self.build_lib, "kmq_jax", "nn", "cpu"), compiler, str(include)):
            raise SystemExit(f"KMQ_JAX_PREBUILT=1: there are no kernels for {prebuilt['architecture']()}")


class KernelWheel(bdist_wheel):
    """A wheel of one platform, for every version of Python: the libraries know nothing of it."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tag of Python, of its binary interface, and of the platform."""
        return "py3", "none", super().get_tag()[2]


class KernelDistribution(Distribution):
    """A package that is not pure."""

    def has_ext_modules(self) -> bool:
        """Yes."""
        return True


if PREBUILT:
    commands = {"build_py": BuildKernels, "bdist_wheel": KernelWheel}
    setup(distclass=KernelDistribution, cmdclass=commands, setup_requires=[HEADERS])
else:
    setup()
