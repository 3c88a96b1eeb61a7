"""Values that options do not take."""

from collections.abc import Iterator

from trial import Trial, program
from world import World


def trials(world: World) -> Iterator[Trial]:
    """A few so far."""
    for option, value in (("learning_rate", "nan"), ("beta_dpo", "0"), ("beta_dpoo", "1")):
        options = world.options("diffusion_dpo") | {option: value}
        yield Trial(f"diffusion_dpo {option} {value}", program("diffusion_dpo", options), (f"--{option}",))
    yield Trial("diffusion_dpo works", program("diffusion_dpo", world.options("diffusion_dpo")))
