"""What comes next after a run: commands that measure its student, and find out what its method was worth."""

import shlex

from kdjax.config.schema import Data, Run
from kdjax.options import defaults
from kdjax.paths import Path
from kdjax.plan import Plan
from kdjax.run.data import is_own
from kdjax.run.record import stage_folder


def commands(plan: Plan, folder: Path) -> list[tuple[str, str]]:
    """What a person may want, and how to get it.

    Args:
        plan: of one seed or several.
        folder: of one seed, where the student is.
    """

    def evaluation(model: Path) -> str:
        return shlex.join(["python", "-m", "kdjax.evaluate", f"--model={model}", *_data_flags(plan)])

    found = [("all numbers, also by class", evaluation(folder / "student"))]
    if plan.baseline:
        found.append(("those of the baseline", evaluation(stage_folder(folder, plan.baseline.name) / "model")))
    elif plan[plan.student].methods:
        found.append(
            (
                "what the method was worth",
                "the same command with --config.compare=True, which also trains the identical student without it",
            )
        )
    trained = [stage for stage in plan.stages if stage.steps and not stage.options.teacher]
    if trained and is_own(plan.data) and not any(stage.options.weights for stage in trained):
        found.append(
            (
                "more from few images",
                f"a backbone that knows ImageNet, --config.{trained[0].name}.weights=<file>, such as torchvision's "
                "ResNet-18 for a backbone of that depth and width 1",
            )
        )
    photographs = shlex.join(["kdjax", "predict", f"--model={folder / 'student'}", "--input=FOLDER", "--output=found"])
    found.append(("what it says of your photographs", photographs))
    return [*found, ("in Python", f"student, variables = kdjax.load_student({str(folder / 'student')!r})")]


_OF_EVALUATION = ("name", "data_dir", "eval_split", "lenient")
"""Keys of the data that an evaluation needs; the student knows how its images are scaled."""


def _data_flags(plan: Plan) -> list[str]:
    """What of the data and the task has to be said to evaluate on them, as flags."""
    usual, task = defaults(Data), defaults(Run)["task"]
    said = {f"data.{key}": getattr(plan.data, key) for key in _OF_EVALUATION if getattr(plan.data, key) != usual[key]}
    if plan.run.task != task:
        said["task"] = plan.run.task
    return [f"--config.{key}={value}" for key, value in said.items()]


def methods_of(plan: Plan) -> str:
    """What the student is distilled by, in words."""
    return " + ".join(method.config["name"] for method in plan[plan.student].methods.values()) or "none"
