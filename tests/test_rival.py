"""A model that stands beside is taken as it is where it reads texts as the base does, and refused where it does not."""

import pytest
from specimens import TEXT, folder
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from longlora.model.rival import Rivals
from longlora.stages.rival import stage

ASKED = Rivals(models=["champion"])


def test_a_rival_of_the_same_tokenizer_is_taken_file_by_file_its_weights_linked(tmp_path):
    base, rival = folder(tmp_path / "base"), folder(tmp_path / "rivals/champion", window=128)
    stage(rival, base, tmp_path / "models/champion", ASKED)
    taken = tmp_path / "models/champion"
    assert {f.name: f.read_bytes() for f in taken.iterdir()} == {f.name: f.read_bytes() for f in rival.iterdir()}
    assert (taken / "model.safetensors").samefile(rival / "model.safetensors")
    assert not (taken / "config.json").samefile(rival / "config.json")


def test_a_rival_that_reads_other_tokens_is_refused_before_anything_is_written(tmp_path):
    base, rival = folder(tmp_path / "base"), folder(tmp_path / "rivals/champion")
    words = Tokenizer(models.WordLevel(unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator([TEXT], trainers.WordLevelTrainer(special_tokens=["?"]))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(rival)
    with pytest.raises(ValueError, match="^rivals.models: champion cannot be compared: not the base's tokenizer: "):
        stage(rival, base, tmp_path / "models/champion", ASKED)
    assert not (tmp_path / "models").exists()
