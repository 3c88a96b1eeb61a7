"""What pyproject.toml cannot say: recipes/ and its presets are installed as the package prefopt_recipes."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["prefopt*", "data_builders*"]),
        "prefopt_recipes",
        "prefopt_recipes.configs",
        "prefopt_recipes.configs.accelerate",
    ],
    package_dir={"prefopt_recipes": "recipes"},
)
