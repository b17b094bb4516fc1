"""MasKD of semantic segmentation: Huang et al., ICLR 2023, https://arxiv.org/abs/2205.14589, as their code has it.

The two stages of :mod:`kdjax.methods.maskd`, with the logits of the main head in place of a pyramid: their channels
are the classes, so that nothing is aligned, and the tokens are learnt in the teacher's scores.
"""

from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kdjax.losses import maskd_loss, masked_features, token_dice_loss, token_masks
from kdjax.methods.logits import pair_logits, valid_logits
from kdjax.options import whole
from kdjax.types import Logits, MethodTerms, PredictionLoss, TeacherHeads, View

_tokens_init = nn.initializers.normal(0.01)
_TASKS = ("segmentation",)


class MasKDLogitTokens(nn.Module):
    """Stage "tokens": the teacher, frozen, is judged by logits that the tokens' masks let through [code]::

        Z'   = Z * sum_k sigmoid(Z E^T)_k
        loss = the teacher's own loss on Z' + dice loss of the masks

    The model of this stage is the teacher itself, with dropout as in training, as the authors' has it; their batch norm
    is in training mode too, which a stage's config decides here (``frozen_norm``).

    >>> view = View({"c5": jnp.ones((1, 8, 8, 16))}, {"c5": 8}, Logits(jnp.ones((1, 8, 8, 3))))
    >>> given = {"size": jnp.array([[64, 64]]), "prediction_loss": lambda masked: {"seg": jnp.mean(masked.main)}}
    >>> init = lambda key: MasKDLogitTokens().init_with_output(key, view, None, **given)
    >>> jax.tree.map(jnp.shape, jax.eval_shape(init, jax.random.key(0)))
    ({'dice': (), 'masked_seg': ()}, {'params': {'tokens': (8, 3)}})
    """

    tokens: Annotated[int, whole(2), "K, the number of tokens."] = 8
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    needs: ClassVar[tuple[str, ...]] = ("size", "prediction_loss")
    requires: ClassVar[tuple[str, ...]] = ()
    tasks: ClassVar[tuple[str, ...]] = _TASKS
    terms: ClassVar[dict[str, tuple[str, ...]]] = {"masked_*": ("method",), "dice": ("method",)}

    @nn.compact
    def __call__(
        self, student: View, teacher: View | None, *, size: jax.Array, prediction_loss: PredictionLoss
    ) -> MethodTerms:
        """The terms of the own loss on masked logits, as "masked_<term>", and "dice"; see :mod:`kdjax.methods`."""
        logits: Logits = jax.lax.stop_gradient(student.predictions)
        tokens = self.param("tokens", _tokens_init, (self.tokens, logits.main.shape[-1]))
        masks = token_masks(logits.main, tokens, where=valid_logits(student, size))
        masked = prediction_loss(logits._replace(main=masked_features(logits.main, masks)))
        return {"dice": token_dice_loss(masks), **{f"masked_{name}": value for name, value in masked.items()}}


class MasKDLogits(nn.Module):
    """Stage "student": half of :func:`kdjax.losses.maskd_loss` between logits, with the first stage's tokens [code]::

        loss = 1/2 mean_{n,k,c} [ sum_hw M_k^2 (S - T)^2 / sum_hw M_k ]        M of the teacher's main logits

    The term "maskd_logits" is of the main head, and "maskd_auxiliary" of the auxiliary one, where both have one: the
    same with masks of the teacher's auxiliary logits, by the same tokens. The authors weigh them by 1 and 0.4.

    >>> view = View({"c5": jnp.ones((1, 8, 8, 16))}, {"c5": 8}, Logits(*2 * [jnp.ones((1, 8, 8, 3))]))
    >>> given = {"size": jnp.array([[64, 64]]), "teacher_heads": lambda ours: ours}
    >>> MasKDLogits().init_with_output(jax.random.key(0), view, None, **given)[0]
    {'maskd_logits': Array(0., dtype=float32), 'maskd_auxiliary': Array(0., dtype=float32)}
    """

    tokens: Annotated[int, whole(2), "K, the number of tokens; that of the first stage."] = 8
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    needs: ClassVar[tuple[str, ...]] = ("size", "teacher_heads")
    requires: ClassVar[tuple[str, ...]] = ("teacher", "init")
    tasks: ClassVar[tuple[str, ...]] = _TASKS
    terms: ClassVar[dict[str, tuple[str, ...]]] = dict.fromkeys(
        ("maskd_logits", "maskd_auxiliary"), ("student", "method")
    )
    still: ClassVar[dict[str, tuple[str, ...]]] = dict.fromkeys(terms, ("tokens",))
    """Learnt in the stage before."""

    @nn.compact
    def __call__(self, student: View, teacher: View, *, size: jax.Array, teacher_heads: TeacherHeads) -> MethodTerms:
        """Both terms, that of heads that are not there being zero; see the contract of :mod:`kdjax.methods`."""
        ours, theirs, where = pair_logits(student, teacher_heads, size)
        tokens = self.param("tokens", _tokens_init, (self.tokens, ours.main.shape[-1]))

        def loss(ours: jax.Array | None, theirs: jax.Array | None) -> jax.Array:
            if ours is None or theirs is None:
                return jnp.zeros(())
            # The student's own masks never take part.
            return 0.5 * maskd_loss(ours, theirs, tokens=jax.lax.stop_gradient(tokens), step=0, warmup=1, where=where)

        return {
            "maskd_logits": loss(ours.main, theirs.main),
            "maskd_auxiliary": loss(ours.auxiliary, theirs.auxiliary),
        }
