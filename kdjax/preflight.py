"""Compiles a run's step for TPUs that are not there: ``python -m kdjax.preflight --config=mgd:retinanet_x101_r50``.

With ``--topology=v5e:16x16`` and ``--per_chip=8`` the very step that the last stage of the config would take on those
chips is compiled on this machine, without data and without weights. What is printed, and written to ``--output``, is
what the compiler says: whether it fits, what fills the memory, the floating-point operations, what the chips tell each
other. Only the images per second are an estimate, from published peaks. Nothing runs on a TPU.

It needs ``libtpu``: ``pip install 'kdjax[preflight]'``.
"""

from collections.abc import Sequence

from absl import app, flags, logging

from kdjax.errors import Exit, UserError
from kdjax.files import check_writable, write_json, writing
from kdjax.main import CONFIG, ended, parse
from kdjax.tpu import in_words, preflight

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x4", "Generation and shape of the slice, such as v5e:16x16.")
_PER_CHIP = flags.DEFINE_integer("per_chip", None, "Images of one step on a chip; the config's by default.", 1)
_CLASSES = flags.DEFINE_integer("classes", 80, "Classes of the data; COCO has 80.", 1)
_BISECT = flags.DEFINE_bool("bisect", False, "Also find the largest batch that fits, by compiling several.")
# Whoever imports several programs at once, as their tests do, has another one's flag of this name.
_OUTPUT = flags.DEFINE_string("output", "", "JSON file for all numbers, if wanted.", allow_override=True)


def main(_: Sequence[str]) -> int:
    """Prints the report; returns the exit code."""
    logging.set_verbosity(logging.FATAL)

    def work() -> int:
        if _OUTPUT.value:
            check_writable("output", _OUTPUT.value)
        report = preflight(
            CONFIG.value, _TOPOLOGY.value, per_chip=_PER_CHIP.value, classes=_CLASSES.value, bisect=_BISECT.value
        )
        if report["fits"]:
            print(in_words(report))
        if _OUTPUT.value:
            with writing("output", _OUTPUT.value):
                write_json(_OUTPUT.value, report)
        if not report["fits"]:
            most = report["largest_batch"]
            raise UserError(
                f"{report['per_chip']} images per chip have no room on {report['topology']} ({report['refused']}); "
                + (f"--per_chip={most} has." if most else "no number of them has.")
            )
        return Exit.FINISHED

    return ended(work, "nothing was written")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
