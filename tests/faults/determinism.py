"""F13: the same bits again, whatever happened on the way."""

from __future__ import annotations

from dataclasses import replace

from .campaign import Found, Trial
from .runs import KINDS, call, config_of, ending, reference, resumed, train

_WAYS = ("twice", "stopped at step 2", "stopped at step 7", "stopped at step 11", "workers")


def repeat(trial: Trial) -> Found:
    """Ten seeds; each run twice, resumed at three steps, and with 0 workers instead of 2."""
    seed, way = divmod(trial.number, len(_WAYS))
    kind = "pictures" if _WAYS[way] == "workers" else KINDS[seed % len(KINDS)]
    seed += 10 * trial.seed
    whole = reference(kind, trial.shared, f"-{seed}", seed=seed)
    config = config_of(kind, trial.folder / "run", trial.shared, seed=seed)
    if _WAYS[way] == "workers":
        config = replace(config, workers=0)
    elif _WAYS[way] != "twice":
        stop = replace(config, stop_after=int(_WAYS[way].split()[-1]))
        first = call(lambda: train(stop))
        if first.code:
            return Found(_WAYS[way], f"{kind}, seed {seed}", "exit code 0", first.last, False)
        # Its report is about an unfinished run.
        (config.out / "summary.json").unlink()
    done = call(lambda: train(resumed(config)))
    same = done.code == 0 and ending(config.out) == whole.end
    where = "0 workers against 2" if _WAYS[way] == "workers" else _WAYS[way]
    return Found(where, f"{kind}, seed {seed}", "final bits and losses equal",
                 "equal" if same else f"differ: {done.last}", same)
