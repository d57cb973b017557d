import pytest

from kmq_jax.core.errors import UserError
from kmq_jax.study.config import smoke_study, study_config
from kmq_jax.study.networks import Run, runs_of, training_config
from kmq_jax.study.options import CascadePlan, StudyOptions
from kmq_jax.training.config import default_config

SETS = {"dev": {"data": "synthetic:dev", "trials": "synthetic:dev"}}


def test_a_configurations_section_becomes_options():
    config = smoke_study(study_config(default_config("resnet18"), rules=(("^stem/", 0),)))
    options = StudyOptions.of(config.study.to_dict())
    assert options.sets["voices"].data.startswith("synthetic:dev")
    assert options.calibration.replicates == 20 and options.diagnosis.hessian_draws == 2
    assert options.cascades == (
        CascadePlan(family="distilled-nested", bits=(2, 4)),
        CascadePlan(family="distilled", bits=(2, 32)),
    )
    assert [run.name for run in runs_of(options)] == ["4", "2", "nested"]
    assert [run.step for run in runs_of(options)] == ["distilled-4", "distilled-2", "distilled-nested"]
    assert [run.grow_from for run in runs_of(options)] == ["", "", "distilled-2"]


def test_one_number_of_bits_is_not_nested():
    options = StudyOptions.of({"evaluate": SETS, "bits": (4,), "epochs": {"4": 1.0, "nested": 1.0}})
    assert [run.step for run in runs_of(options)] == ["distilled-4"]


def test_speaker_labels_are_asked_for_beside_the_teacher():
    config = default_config("resnet18")
    for weight in (0.0, 0.1):
        own = training_config(
            config, StudyOptions.of({"evaluate": SETS, "label_weight": weight}), Run("2", 2), "fp32.kmq"
        )
        assert (own.loss.weight, own.distill.weight, own.quant.bits) == (weight, 1, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"evaluate": {}}, "study: `evaluate` names no evaluation set"),
        ({"calibrate": "x", "cascades": [("distilled", (2, 3))]}, "study: 'x' is none of the evaluation sets dev"),
        ({"groups": {"all": ("x",)}}, "study: 'x' is none of the evaluation sets dev"),
        ({"diagnose_flags": ()}, "study: there is no option `diagnose_flags`; did you mean `diagnose`?"),
        ({"bits": (4, 9)}, "study: `bits` (=4,9) must be at most 8"),
        ({"bits": (2, 2)}, "study: `bits` (=2,2) must hold at least one number of bits, and none twice"),
        ({"bits": ()}, "study: `bits` (=) must hold at least one number of bits, and none twice"),
        ({"epochs": {"nestd": 3.0}}, "study: `epochs.nestd` (=3.0) must be of bits (1 to 8, or 32), of mixed or of"),
        ({"cascades": [("best", (2, 3))]}, "study.cascades: `family` (=best) must be one of kmqat, distilled, ptq"),
        ({"cascades": [("distilled", (3, 2))]}, "study.cascades: `bits` (=3,2) must ascend"),
        ({"diagnosis": {"worst": -1}}, "study.diagnosis: `worst` (=-1) must be at least 0"),
        ({"calibration": {"rul": "risk"}}, "study.calibration: there is no option `rul`; did you mean `rule`?"),
        ({"evaluate": {"dev": {"data": "x"}}}, "study.evaluate.dev: `trials` must be given"),
    ],
)
def test_what_a_section_refuses(values, message):
    with pytest.raises(UserError) as error:
        StudyOptions.of({"evaluate": SETS} | values)
    assert str(error.value).startswith(message)
