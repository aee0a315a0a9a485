"""An unknown name leads to the field that was meant, or to none."""

import pytest

from vaemo.config import Config, nearest, suggest

FIELDS = {f"{section}.{key}" for section, fields in Config().to_dict().items() for key in fields}


@pytest.mark.parametrize(
    ("found", "meant"),
    [
        # As other tools call it.
        ("train.learning_rate", ["train.lr"]),
        ("training.learning-rate", ["train.lr"]),
        ("optimizer.learning_rate", ["train.lr"]),
        ("model.hidden_size", ["updater.d_model"]),
        ("model.num_layers", ["updater.layers"]),
        ("train.dropout_rate", ["model.dropout"]),
        ("batch_size", ["train.lanes"]),
        ("score.batch_size", ["score.lanes"]),
        ("extract.batch_size", ["extract.batch_s"]),
        ("train.max_grad_norm", ["train.clip"]),
        # In another section, or none.
        ("lr", ["train.lr", "personalize.lr"]),
        ("train.dropout", ["model.dropout"]),
        ("model.seed", ["train.seed", "splits.seed", "evaluate.seed"]),
        ("trainer.seed", ["train.seed"]),
        # Misspelt.
        ("model.alhpa", ["model.alpha"]),
        ("modle.alpha", ["model.alpha"]),
        ("train.epoch", ["train.epochs"]),
        ("train.encoder_layer", ["train.encoder_layers"]),
        ("TRAIN.LR", ["train.lr"]),
        # Nothing like it is there.
        *[(name, []) for name in ("train.momentum", "train.optimizer", "model.bidirectional", "foo.bar")],
        *[(name, []) for name in ("train.lr_decay", "features.sample_rate", "train.device", "1", "", ".", "train.")],
    ],
)
def test_what_was_meant(found, meant):
    assert nearest(found) == meant


@pytest.mark.parametrize(
    ("found", "meant"), [("modle", "model"), ("training", "train"), ("Optimizer", "train"), ("data", ""), ("", "")]
)
def test_which_section_was_meant(found, meant):
    assert suggest.sections(found, Config().to_dict()) == meant


def test_other_names_lead_to_fields_that_exist_and_are_none_themselves():
    assert suggest.ELSEWHERE.keys() <= FIELDS
    assert suggest.SECTION_ALIASES.keys() <= Config().to_dict().keys()
    own = {name.partition(".")[2] for name in FIELDS}
    assert own.isdisjoint(other for others in suggest.ELSEWHERE.values() for other in others.split())
