"""Which folder becomes which package; everything else about the project is in pyproject.toml."""

from setuptools import find_packages, setup

# These lie at the top of the repository, but an install adds the one name nsp.
AT_THE_TOP = {"nsp.cli": "cli", "nsp.stores": "stores", "nsp.recipes": "recipes"}
packages = find_packages(include=["nsp", "nsp.*"])
for name, folder in AT_THE_TOP.items():
    packages += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]

setup(packages=packages, package_dir={"nsp": "nsp", **AT_THE_TOP})
