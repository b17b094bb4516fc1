"""What a stage's teacher must reach before it may teach."""

from collections.abc import Mapping, Sequence
from typing import Any

from kdjax.errors import UserError
from kdjax.evaluation import Evaluation, make_predict
from kdjax.plan import Plan, StagePlan
from kdjax.report import spoken
from kdjax.run.record import Finished
from kdjax.run.start import Teacher
from kdjax.weights import COCO_NAMES, are_imagenet

_PUBLISHED_SLACK = 1.0
"""By how much less than published a teacher may be."""


def metrics_of_teacher(
    plan: Plan,
    stage: StagePlan,
    earlier: Mapping[str, Finished],
    teacher: Teacher | None,
    evaluation: Evaluation,
    class_names: Sequence[str],
) -> Mapping[str, Any] | None:
    """The metrics of a stage's teacher on the evaluation split, None where it has none.

    A teacher from elsewhere is measured here, and stops the run where it is below the stage's floor.
    """
    if teacher is None:
        return None
    if stage.options.teacher in earlier:
        return earlier[stage.options.teacher].metrics
    metrics, _ = evaluation(make_predict(teacher.module), teacher.variables)
    print(f"[{stage.name}] teacher: {spoken(metrics, plan.task.spoken)}", flush=True)
    check_floor(plan, stage, metrics, class_names)
    return metrics


def check_floors(plan: Plan, teacher: str, metrics: Mapping[str, Any], class_names: Sequence[str]) -> None:
    """Stops the run where a stage that has finished is below the floor of one that it will teach.

    Before any other stage begins: one that only prepares for the teaching, as MasKD's tokens do, would be in vain.
    """
    for stage in plan.stages:
        if stage.options.teacher == teacher:
            check_floor(plan, stage, metrics, class_names)


def check_floor(plan: Plan, stage: StagePlan, metrics: Mapping[str, Any], class_names: Sequence[str]) -> None:
    """Raises UserError where a teacher's metrics are below the floor of the stage that it teaches."""
    task, floor = plan.task, teacher_floor(plan, stage, class_names)
    value = metrics[task.primary]
    if floor is not None and not (value >= floor if task.higher_is_better else value <= floor):
        known = "" if stage.options.teacher_floor is not None else " (what is known of it, as the config says nothing)"
        error = UserError(
            f"The teacher of stage {stage.name!r}, {stage.options.teacher!r}, reaches {task.primary} {value:.1f}, "
            f"worse than config.{stage.name}.teacher_floor = {floor:g}{known}: check its weights, train it longer, or "
            "lower the floor."
        )
        error.everywhere = True
        raise error


def teacher_floor(plan: Plan, stage: StagePlan, class_names: Sequence[str]) -> float | None:
    """The value of the task's primary metric that a stage's teacher must reach to teach; None for any.

    Where the config says none, that is what is known of the teacher: what the task knows of the data set; one less than
    a model zoo states of weights which are taken over as they are, on the classes of COCO or ImageNet; and nothing
    elsewhere, for nobody knows what a teacher reaches on somebody's own data. A floor of 0 in the config is none.
    """
    if stage.options.teacher_floor is not None:
        return stage.options.teacher_floor or None
    if plan.data.name in plan.task.floors:
        return plan.task.floors[plan.data.name]
    origin = stage.options.teacher
    if (
        origin in plan
        and not plan[origin].steps
        and (tuple(class_names) == COCO_NAMES or are_imagenet(class_names))
        and plan[origin].options.published
    ):
        return plan[origin].options.published - _PUBLISHED_SLACK
    return None
