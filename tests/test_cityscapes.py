"""The pairs on Cityscapes: each method's config of each is valid, and those of the papers have the authors' values.

``AUTHORS[method, pair][key]`` is (value, source), as in :mod:`tests.authors`.
MMSegmentation's schedule is of one stored version of the file; MGD's README names 0.20.2, whose numbers are the same.
"""

import pytest

from kdjax import cityscapes
from kdjax.papers import ON_CITYSCAPES
from kdjax.plan import resolve
from tests.test_authors import resolved
from tests.test_config import CONFIGS, load

FILES = {path.stem: path for path in CONFIGS}
METHODS = ("mgd", "maskd", "dmkd", "mimic", "kd", "cwd", "none")

_MGD = "yzd-v/MGD@2c9da0b28625:seg"
_MGD_DATA = f"{_MGD}/configs/_base_/datasets/cityscapes_512x512.py"
_MGD_README = f"{_MGD}/README.md"
_SCHEDULE = "open-mmlab/mmsegmentation@0dd964367a91:configs/_base_/schedules/schedule_40k.py"
_MASKD = "hunto/MasKD@b5af34fe343f:segmentation"
_TRAIN, _TOKENS = f"{_MASKD}/train_maskd.py", f"{_MASKD}/train_mask_module.py"
_MASKD_DATA = f"{_MASKD}/dataset/datasets.py"


def _mgd(pair: str, model: str) -> dict:
    distiller = f"{_MGD}/configs/distillers/mgd/{pair}.py"
    student = f"{_MGD}/configs/{model}/{model}_r18-d8_512x512_40k_cityscapes.py"
    return {
        "student.loss_weights.mgd": (2e-5, f"{distiller}:6"),
        "student.methods.mgd.mask_ratio": (0.75, f"{distiller}:7"),
        "student.loss_weights.cwd": (3.0, f"{distiller}:12"),
        "student.inherit": ((), f"{distiller}:11"),
        "student.model.backbone.depth": (18, f"{student}:7"),
        "student.model.head.channels": (128, f"{student}:10"),
        "student.model.head.auxiliary_channels": (64, f"{student}:12"),
        "student.optimizer.learning_rate": (0.01, f"{_SCHEDULE}:2"),
        "student.optimizer.momentum": (0.9, f"{_SCHEDULE}:2"),
        "student.optimizer.weight_decay": (5e-4, f"{_SCHEDULE}:2"),
        "student.optimizer.clip_norm": (0.0, f"{_SCHEDULE}:3"),
        "student.optimizer.schedule": ("poly", f"{_SCHEDULE}:7"),
        "student.optimizer.final_factor": (0.01, f"{_SCHEDULE}:8"),
        "student.optimizer.power": (0.9, f"{_SCHEDULE}:9"),
        "student.steps": (40_000, f"{_SCHEDULE}:14"),
        "data.crop": ((512, 512), f"{_MGD_DATA}:4"),
        "data.jitter": ((0.5, 2.0), f"{_MGD_DATA}:8"),
        "data.cat_max_ratio": (0.75, f"{_MGD_DATA}:9"),
        "data.flip": (0.5, f"{_MGD_DATA}:10"),
        "data.photometric": (True, f"{_MGD_DATA}:11"),
        "data.image_size": ((1024, 2048), f"{_MGD_DATA}:21"),
    }


def _maskd(script: str, decay: str) -> dict:
    return {
        "student.methods.maskd_logits.tokens": (8, f"{_TRAIN}:198"),
        "student.loss_weights.maskd_logits": (1.0, f"{_TRAIN}:72"),
        "student.loss_weights.maskd_auxiliary": (0.4, f"{_TRAIN}:263"),
        "student.optimizer.learning_rate": (0.02, f"{_TRAIN}:63"),
        "student.optimizer.momentum": (0.9, f"{_TRAIN}:65"),
        "student.optimizer.weight_decay": (2e-4 if script == "deeplabv3_mbv2" else 5e-4, decay),
        "student.optimizer.schedule": ("poly", f"{_TRAIN}:222"),
        "student.optimizer.final_factor": (0.005, f"{_TRAIN}:222"),
        "student.optimizer.power": (0.9, f"{_TRAIN}:268"),
        "student.optimizer.end_at_last": (False, f"{_TRAIN}:222"),
        "student.steps": (40_000, f"{_TRAIN}:61"),
        "student.batch_size": (16, f"{_TRAIN}:57"),
        "tokens.methods.maskd_logit_tokens.tokens": (8, f"{_TOKENS}:175"),
        "tokens.steps": (10_000, f"{_TOKENS}:54"),
        "tokens.batch_size": (16, f"{_TOKENS}:50"),
        "tokens.optimizer.learning_rate": (0.1, f"{_TOKENS}:56"),
        "tokens.optimizer.momentum": (0.9, f"{_TOKENS}:58"),
        "tokens.optimizer.weight_decay": (1e-3, f"{_TOKENS}:60"),
        "tokens.optimizer.final_factor": (0.0, f"{_TOKENS}:196"),
        "data.crop": ((512, 1024), f"{_TRAIN}:47"),
        "data.jitter": ((0.5, 2.0), f"{_MASKD_DATA}:52"),
        "data.jitter_steps": (16, f"{_MASKD_DATA}:52"),
        "student.model.pixel_mean": ((122.67891434, 116.66876762, 104.00698793), f"{_MASKD_DATA}:79"),
    }


AUTHORS = {
    ("mgd", "pspnet_r101_r18"): _mgd("psp_r101_distill_psp_r18_40k_512x512_city", "pspnet"),
    ("mgd", "pspnet_r101_deeplabv3_r18"): _mgd("psp_r101_distill_deepv3_r18_40k_512x512_city", "deeplabv3"),
    ("maskd", "deeplabv3_r101_r18"): _maskd("deeplabv3_res18", f"{_TRAIN}:67"),
    ("maskd", "deeplabv3_r101_pspnet_r18"): _maskd("pspnet_res18", f"{_TRAIN}:67"),
    ("maskd", "deeplabv3_r101_mobilenetv2"): _maskd(
        "deeplabv3_mbv2", f"{_MASKD}/train_scripts/train_maskd/deeplabv3_mbv2.sh:7"
    ),
}
REPORTED = {  # As the READMEs state them: MGD's lines 40 and 41, MasKD's lines 25 to 29.
    ("mgd", "pspnet_r101_r18"): (69.85, 73.63),
    ("mgd", "pspnet_r101_deeplabv3_r18"): (73.20, 76.31),
    ("maskd", "deeplabv3_r101_r18"): (None, 77.00),
    ("maskd", "deeplabv3_r101_pspnet_r18"): (None, 75.34),
    ("maskd", "deeplabv3_r101_mobilenetv2"): (None, 75.26),
}


@pytest.mark.parametrize("name", AUTHORS, ids=":".join)
def test_a_reported_pair_has_the_authors_values(name):
    config = load(FILES[name[0]], name[1])
    for key, (value, source) in AUTHORS[name].items():
        found = resolved(config, key)
        assert found == (pytest.approx(value) if isinstance(value, int | float | tuple) else value), (key, source)


@pytest.mark.parametrize("name", REPORTED, ids=":".join)
def test_what_is_reported_is_what_the_authors_state(name):
    report = ON_CITYSCAPES[name]
    assert (report.alone, report.distilled) == REPORTED[name]


@pytest.mark.parametrize("pair", cityscapes.PAIRS)
def test_every_methods_config_of_a_pair_is_valid_where_the_files_are(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for method in METHODS:
        config = load(FILES[method], pair)
        for stage in config.stages:
            if config[stage].weights:
                (tmp_path / config[stage].weights).touch()
        plan = resolve(config, devices=8)
        assert plan.data.training_shapes == (config.data.crop,)
        assert plan["student"].steps == cityscapes.STEPS
        assert config.data.resize == "mmdet"


@pytest.mark.parametrize("pair", [*cityscapes.PAIRS, "segmentation"])
@pytest.mark.parametrize("method", METHODS)
def test_every_pair_has_a_tiny_form(method, pair):
    plan = resolve(load(FILES[method], f"{pair}:tiny"), devices=8)
    assert {stage.steps for stage in plan.stages} == {2}
    assert plan.data.name == "shapes/maps/tiny"
