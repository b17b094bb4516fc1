"""Writes the report of a run, of one that is not finished too: ``kdjax report --workdir=runs/first``.

``report.html``, in the workdir, is one file for a browser: what the method was worth, how it came to that, on which
images, and what comes next. Runs write it themselves when they end.
"""

import functools
from collections.abc import Sequence

from absl import app, logging

from kdjax.errors import DataError, Exit, UserError
from kdjax.files import read_json, writing
from kdjax.main import ended, given_workdir, parse_flags
from kdjax.paths import Path, absolute, exists
from kdjax.plan import Plan, restored
from kdjax.run.data import open_split
from kdjax.run.page import write_report
from kdjax.types import Source


def main(_: Sequence[str]) -> int:
    """Writes the page and says where it is; returns the exit code."""
    logging.set_verbosity(logging.FATAL)

    def work() -> int:
        place = given_workdir()
        folders = _folders(place)
        plan = restored(read_json(next(iter(folders.values())) / "config.json", dict))
        with writing("workdir", str(place)):
            print(f"The report is in {absolute(write_report(plan, folders, place, _source(plan)))}.")
        return Exit.FINISHED

    return ended(work, "there may be no report")


def _folders(place: Path) -> dict[int, Path]:
    """The folder of each seed of a run.

    Raises:
        DataError: there is no run.
    """
    if exists(place / "config.json"):
        return {read_json(place / "config.json", dict).get("seed", 0): place}
    found = {folder.name.removeprefix("seed_"): folder for folder in place.glob("seed_*")} if exists(place) else {}
    seeds = {int(name): folder for name, folder in found.items() if name.isdecimal() and exists(folder / "config.json")}
    if not seeds:
        raise DataError(f"--workdir={place} is no folder of a run: it has no config.json, and no folders of seeds.")
    return dict(sorted(seeds.items()))


def _source(plan: Plan) -> Source | None:
    """What models were evaluated on; None where it is not to be had here."""
    try:
        return open_split(plan.data, plan.task, training=False)
    except UserError as error:
        print(f"{error} The report is without images.", flush=True)
        return None


if __name__ == "__main__":
    app.run(main, flags_parser=functools.partial(parse_flags, foreign=("config",)))
