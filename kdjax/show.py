"""Shows what a method does inside, on real images: ``kdjax show --workdir=runs/first``.

``inside.html``, in the workdir, has the features of teacher and student and their difference, before training, at the
checkpoints that are there, and after it; the masks, attentions and tokens of methods that show theirs; each term, raw
and weighted, and its gradient by the student's features, by level; and where a term or a level has taken over, flags
that weigh it otherwise.
"""

import functools
from collections.abc import Sequence

from absl import app, flags, logging

from kdjax.errors import DataError, Exit, UsageError
from kdjax.files import read_json, writing
from kdjax.main import ended, given_workdir, parse_flags
from kdjax.paths import absolute, exists
from kdjax.plan import restored
from kdjax.run.data import open_split
from kdjax.run.inside_page import write_inside

_STAGE = flags.DEFINE_string("stage", "", "The stage to look into; by default the student's.", allow_override=True)
_IMAGES = flags.DEFINE_integer("images", 2, "Images to look at.", 1, 16, allow_override=True)


def main(_: Sequence[str]) -> int:
    """Writes the page and says where it is; returns the exit code."""
    logging.set_verbosity(logging.FATAL)

    def work() -> int:
        place = given_workdir()
        if not exists(place / "config.json"):
            raise DataError(
                f"--workdir={place} is no folder of a run of one seed: it has no config.json; of several seeds name "
                "the folder of one."
            )
        plan = restored(read_json(place / "config.json", dict))
        stage = _STAGE.value or plan.student
        if stage not in plan:
            raise UsageError(
                f"--stage={stage} is no stage of that run; it has {', '.join(x.name for x in plan.stages)}."
            )
        source = open_split(plan.data, plan.task, training=True)
        with writing("workdir", str(place)):
            print(f"What is inside is in {absolute(write_inside(plan, place, stage, source, _IMAGES.value))}.")
        return Exit.FINISHED

    return ended(work, "there may be no page")


if __name__ == "__main__":
    app.run(main, flags_parser=functools.partial(parse_flags, foreign=("config",)))
