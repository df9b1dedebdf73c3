"""Build the compiled part of grutrace, and the description for a package index.

The compiled part is one C library, called by address, without Python's headers. Where there is no
C compiler, or the library does not build, grutrace is installed without it. Everything else about
the package stands in pyproject.toml.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class BuildLibrary(build_ext):
    """Builds a plain C library, with a file name without a version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the path of the library, as `grutrace.native.library` expects it."""
        suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
        return os.path.join(*fullname.split(".")) + suffix

    def copy_extensions_to_source(self) -> None:
        """Copy the library into a checkout that is installed as editable."""
        os.makedirs(os.path.join("grutrace", "native", "lib"), exist_ok=True)
        super().copy_extensions_to_source()

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Return the symbols to export: those that the C file marks, and no module of Python's."""
        return list(ext.export_symbols)


class AnyPythonWheel(bdist_wheel):
    """Makes one wheel for a platform, which every Python 3 takes; without the library, for all."""

    def run(self) -> None:
        """Build, and make the wheel."""
        self.run_command("build")
        outputs = self.get_finalized_command("build_ext").get_outputs()
        if not any(os.path.exists(path) for path in outputs):
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of the wheel: Python, its binary interface, and the platform."""
        return ("py3", "none", super().get_tag()[2])


#: A link to a file of the repository: [text](path), without a scheme and not within the page.
_LINK = re.compile(r"\[([^\]]*)\]\((?!#|[a-z]+:)([^)]+)\)")
_IMAGE = re.compile(r'<img src="(?![a-z]+:)([^"]+)"[^>]*>\n*')


def index_readme() -> str:
    """Return README.md with links that also hold on the page of a package index.

    They lead to the tag of the version at the address `Source` of [project.urls]. Without this
    address, they are replaced by their text.
    """
    folder = Path(__file__).parent
    text = (folder / "README.md").read_text(encoding="utf-8")
    project = (folder / "pyproject.toml").read_text(encoding="utf-8")
    source = re.search(r'^Source = "(.+?)/*"$', project, re.MULTILINE)
    if source is None:
        return _LINK.sub(r"\1", _IMAGE.sub("", text))
    version = (folder / "grutrace" / "version.py").read_text(encoding="utf-8").split('"')[-2]
    text = _LINK.sub(rf"[\1]({source[1]}/blob/v{version}/\2)", text)
    return _IMAGE.sub(
        lambda image: image[0].replace(image[1], f"{source[1]}/raw/v{version}/{image[1]}"), text
    )


library: Any = Extension(
    "grutrace.native.lib.kernels",
    ["grutrace/native/kernels.c"],
    depends=[f"grutrace/native/kernels_{part}.h" for part in ("simd", "typed", "directions")],
    # Without contraction every instruction set gives the same bits.
    extra_compile_args=[
        "-O3",
        "-std=c11",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-Wno-psabi",
    ],
    libraries=[] if sys.platform == "win32" else ["m"],
    optional=True,
)

setup(
    ext_modules=[library],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel},
    long_description=index_readme(),
    long_description_content_type="text/markdown",
)
