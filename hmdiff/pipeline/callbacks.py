"""Callbacks and progress of a pipeline call, with diffusers' names and signatures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from hmdiff.diffusion.sampling import Callback

# pipe, step index, timestep, {"latents": x_t after the step, "prediction": the network's} -> entries to replace
StepEnd = Callable[[Any, int, int, dict[str, Tensor]], Mapping[str, Tensor] | None]
Progress = Callable[[int], object]  # called with the number of hypotheses done


def step_callback(pipe: Any, on_step_end: StepEnd | None) -> Callback | None:
    """The sampler's callback for a `callback_on_step_end` of diffusers."""
    if on_step_end is None:
        return None

    def callback(number: int, timestep: int, x_t: Tensor, prediction: Tensor) -> Tensor | None:
        found = on_step_end(pipe, number, timestep, {"latents": x_t, "prediction": prediction})
        return None if found is None else found.get("latents")

    return callback


@contextmanager
def progress_bar(
    config: Mapping[str, Any] | None,  # of tqdm; None: no bar
    total: int,  # hypotheses of all people
    progress: Progress | None,
) -> Iterator[Progress | None]:
    """`progress` itself, or the update of a tqdm bar."""
    if progress is not None or config is None:
        yield progress
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, **{"unit": "hypothesis", **config}) as bar:
        yield bar.update
