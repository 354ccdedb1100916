"""The names of torch's operators, made from those of packages."""

import pytest
import torch

from dynconv_hf.kernels.namespace import operator_namespace

# What transformers makes of folders, and what a folder may be called.
PACKAGES = [
    "a.b",
    "a_b",
    "a__b",
    "a b",
    "a-b",
    "a_2e_b",
    "modèle",
    "model_e",
    "模型",
    "μοντέλο",
    "a\u0301",
    "\U0001d4b3.x",
]


@pytest.mark.parametrize("package", PACKAGES)
def test_torch_takes_the_name_of_any_package(package: str) -> None:
    namespace = operator_namespace(f"tests.{package}")
    assert namespace.isascii() and namespace.isidentifier()
    with torch.library._scoped_library(namespace, "FRAGMENT") as library:
        library.define("identity(Tensor x) -> Tensor")
        assert getattr(torch.ops, namespace).identity


def test_no_two_packages_share_a_name() -> None:
    assert len({operator_namespace(package) for package in PACKAGES}) == len(PACKAGES)
