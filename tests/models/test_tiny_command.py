"""A random model of any size is written as a checkpoint that loads as it was made."""

from __future__ import annotations

import pytest
import torch

from models.checkpoint import load_pretrained
from models.registry import FAMILIES
from models.tiny import build_tiny, main

CHANGES = {"hidden_size": 32, "num_layers": 3, "tie_word_embeddings": True}


@pytest.mark.parametrize("family", ["sdar", "dream"])
def test_what_is_written_is_read_again(tmp_path, family, capsys):
    main(
        [
            "--family",
            family,
            "--seed",
            "5",
            "--out",
            str(tmp_path / "model"),
            "hidden_size=32",
            "num_layers=3",
            "tie_word_embeddings=true",
        ]
    )
    model, made = load_pretrained(str(tmp_path / "model"), family, torch.float32), build_tiny(FAMILIES.get(family), 5, **CHANGES)
    assert model.decoder.config == made.decoder.config and model.decoder.config.num_layers == 3
    found, right = dict(model.decoder.named_parameters()), dict(made.decoder.named_parameters())
    assert found.keys() == right.keys() and all(torch.equal(found[name], right[name]) for name in right)
    assert model.tokenizer.get_vocab() == made.tokenizer.get_vocab()
    assert f"{sum(p.numel() for p in right.values()):,} parameters" in capsys.readouterr().out


def test_other_fields_are_refused(tmp_path, capsys):
    for wrong in ["hiden_size=3", "vocab_size=9", "hidden_size"]:
        with pytest.raises(SystemExit) as end:
            main(["--out", str(tmp_path / "model"), wrong])
        assert end.value.code == 2 and "FIELD=VALUE" in capsys.readouterr().err
