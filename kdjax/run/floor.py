"""What a stage's teacher must reach before it may teach."""

from collections.abc import Mapping, Sequence
from typing import Any

from kdjax.errors import UserError
from kdjax.evaluation import Evaluation, make_predict
from kdjax.plan import Plan, StagePlan
from kdjax.report import spoken
from kdjax.run.record import Finished
from kdjax.run.start import Teacher
from kdjax.weights import COCO_NAMES

_PUBLISHED_SLACK = 1.0
"""By how much less than published a teacher may be."""


def check_teacher(
    plan: Plan,
    stage: StagePlan,
    earlier: Mapping[str, Finished],
    teacher: Teacher | None,
    evaluation: Evaluation,
    class_names: Sequence[str],
) -> Mapping[str, Any] | None:
    """The teacher's metrics on the evaluation split; a teacher below the stage's floor stops the run."""
    if teacher is None:
        return None
    origin = stage.options.teacher
    if origin in earlier:
        metrics: Mapping[str, Any] = earlier[origin].metrics
    else:
        metrics, _ = evaluation(make_predict(teacher.module), teacher.variables)
        print(f"[{stage.name}] teacher: {spoken(metrics, plan.task.spoken)}", flush=True)
    task, floor = plan.task, teacher_floor(plan, stage, class_names)
    value = metrics[task.primary]
    if floor is not None and not (value >= floor if task.higher_is_better else value <= floor):
        known = "" if stage.options.teacher_floor is not None else " (what is known of it, as the config says nothing)"
        raise UserError(
            f"The teacher of stage {stage.name!r}, {origin!r}, reaches {task.primary} {value:.1f}, worse than "
            f"config.{stage.name}.teacher_floor = {floor:g}{known}: check its weights, train it longer, or lower the "
            "floor."
        )
    return metrics


def teacher_floor(plan: Plan, stage: StagePlan, class_names: Sequence[str]) -> float | None:
    """The value of the task's primary metric that a stage's teacher must reach to teach; None for any.

    Where the config says none, that is what is known of the teacher: what the task knows of the data set; one less than
    a model zoo states of weights which are taken over as they are, on COCO's classes; and nothing elsewhere, for nobody
    knows what a teacher reaches on somebody's own data. A floor of 0 in the config is none.
    """
    if stage.options.teacher_floor is not None:
        return stage.options.teacher_floor or None
    if plan.data.name in plan.task.floors:
        return plan.task.floors[plan.data.name]
    origin = stage.options.teacher
    if (
        origin in plan
        and not plan[origin].steps
        and tuple(class_names) == COCO_NAMES
        and plan[origin].options.published
    ):
        return plan[origin].options.published - _PUBLISHED_SLACK
    return None
