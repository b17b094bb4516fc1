import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.weights import learnt_tokens

RNG = np.random.default_rng(0)


def authors(maps: int, prefix: str = "", channels: int = 5, tokens: int = 3, weighted: bool = True):
    """What the authors' program saves for as many maps, (O, I, H, W) kernels."""
    shapes = {"mask_token": (tokens, channels)}
    if weighted:
        shapes |= {"prob.0.weight": (channels, channels, 3, 3), "prob.0.bias": (channels,)}
        shapes |= {"prob.2.weight": (tokens, channels, 1, 1), "prob.2.bias": (tokens,)}
    return {
        f"{prefix}mask_modules.{number}.{name}": RNG.normal(size=shape).astype(np.float32)
        for number in range(maps)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("prefix", ["", "module.", "distill_losses.loss_fpn."])
def test_a_checkpoint_of_a_detector_gives_the_tokens_of_each_map(prefix):
    saved = authors(2, prefix)
    found = learnt_tokens({"backbone.conv1.weight": np.zeros(3), **saved}, ("p3", "p4"), "file.pth")["tokens"]
    assert list(found) == ["p3", "p4"]
    for number, level in enumerate(found):
        there = f"{prefix}mask_modules.{number}."
        np.testing.assert_array_equal(found[level]["tokens"], saved[there + "mask_token"])
        np.testing.assert_array_equal(found[level]["bias_1"], saved[there + "prob.2.bias"])
        kernel, theirs = found[level]["kernel_0"], saved[there + "prob.0.weight"]
        assert all(kernel[1, 2, i, o] == theirs[o, i, 1, 2] for i in range(5) for o in range(5))
        assert found[level]["kernel_1"].shape == (1, 1, 5, 3)


def test_plain_masks_have_tokens_alone_and_those_of_logits_are_one_array():
    assert learnt_tokens(authors(1, weighted=False), ("c5",), "file.pth")["tokens"]["c5"].keys() == {"tokens"}
    for prefix in ("", "module."):
        found = learnt_tokens({f"{prefix}mask_token": np.ones((8, 19), np.float16)}, ("c4", "c5"), "file.pth")
        assert found["tokens"].shape == (8, 19)
        assert found["tokens"].dtype == np.float32


def test_a_file_without_tokens_or_of_other_maps_is_refused():
    with pytest.raises(
        UserError, match=r"file.pth has no receptive tokens: there is neither mask_modules.0.mask_token"
    ):
        learnt_tokens({"backbone.conv1.weight": np.zeros(3)}, ("p3",), "file.pth")
    with pytest.raises(UserError, match=r"file.pth has the tokens of 2 maps \(0, 1\), but the teacher has 1 \(p3\)"):
        learnt_tokens(authors(2), ("p3",), "file.pth")
