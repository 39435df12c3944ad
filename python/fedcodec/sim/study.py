"""Several codecs on the same seeds, in parallel processes if asked."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import fedcodec as fc

from .cells import run_cells
from .federation import Run, prepare, simulate
from .settings import Settings

OnRound = Callable[[str, int], None]


def check_study(settings: Settings, codecs: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Refuse before anything is trained what cannot be run, and return the codecs' standard texts.

    Raises
    ------
    FileNotFoundError
        If the data set is not on this machine.
    ValueError
        If there is nothing to run, a codec or a seed appears twice, a text is no codec, or the settings do not fit the
        data set or this machine.
    """
    if not codecs or not seeds:
        raise ValueError("a study needs a codec and a seed at least")
    parsed = [fc.parse(codec) for codec in codecs]
    for codec in (*parsed, fc.parse(settings.downlink), fc.parse(settings.downlink_delta or "raw")):
        for stage in itertools.chain.from_iterable(line.stages for line in codec.pipelines()):
            if isinstance(stage, fc.Mask):
                raise ValueError(f"{stage} names a mask by its digest alone: a study has none")
    texts = [str(codec) for codec in parsed]
    for kind, values in (("codec", texts), ("seed", seeds)):
        for value, count in Counter(values).items():
            if count > 1:
                raise ValueError(f"the {kind} {value} appears twice")
    for seed in seeds:
        prepare(settings, seed)
    return texts


def run_study(
    settings: Settings,
    codecs: Sequence[str],
    seeds: Sequence[int],
    jobs: int = 1,
    on_round: OnRound | None = None,
) -> list[Run]:
    """Simulate each codec with each seed.

    Every run computes on one torch thread, whatever ``jobs`` is, so the results do not depend on it.

    Parameters
    ----------
    settings : Settings
    codecs : sequence of str
        Texts of the uplink codecs.
    seeds : sequence of int
    jobs : int
        Processes to use, but for Flower's engine. Above one, the calling module must be importable (guard it by
        ``__name__``).
    on_round : callable, optional
        Called with the codec's text and the seed after each round of a run.

    Returns
    -------
    list of Run
        By codec, then by seed, in the orders given.

    Raises
    ------
    FileNotFoundError, ValueError
        See `check_study`.
    NonFiniteError
        If training diverges.
    BackendError
        If the engine is not installed.
    ChildProcessError
        If a process ended by itself.
    """
    texts = check_study(settings, codecs, seeds)
    cells = [(text, seed) for text in texts for seed in seeds]
    notify = on_round or (lambda codec, seed: None)
    if settings.engine == "flower":
        try:
            import ray  # noqa: F401

            from .flower import simulate_in_flower
        except ImportError as error:
            raise fc.BackendError(f"the engine flower needs flwr[simulation]: {error}") from error
        # One after another: each uses all processors.
        return [simulate_in_flower(settings, *cell, partial(notify, *cell)) for cell in cells]
    return run_cells(
        [partial(simulate, settings, *cell) for cell in cells],
        jobs,
        on_step=lambda number: notify(*cells[number]),
    )
