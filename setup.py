"""The extension module; everything else is in pyproject.toml.

It is here because ``[tool.setuptools] ext-modules`` in pyproject.toml is experimental (setuptools warns at
every build) and takes no globs: a new C file or header would have to be listed, or a stale build goes unnoticed.

Warnings are not errors here, so that a compiler newer than ours can build a release; the Makefile sets
``CFLAGS=-Werror`` for every build of the development environment.
"""

from pathlib import Path

from setuptools import Extension, setup

native = Path("shmloader/native")

setup(
    ext_modules=[
        Extension(
            "shmloader._native",
            sources=["shmloader/_native.c", *sorted(map(str, native.glob("*.c")))],
            depends=["setup.py", *sorted(map(str, native.glob("*.h")))],
            include_dirs=[str(native)],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            extra_compile_args=["-std=c11", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"],
            extra_link_args=["-pthread"],
            py_limited_api=True,
        )
    ]
)
