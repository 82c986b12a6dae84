"""What is written down about shards, and what is made of manifests of earlier releases."""

import json
import math

import pytest

from megatron_sbn.data.corpus import PrepareOptions, is_prepared, prepare
from megatron_sbn.data.encoding import is_held_out
from megatron_sbn.data.manifest import shard_facts
from megatron_sbn.data.unigram import unigram_perplexity


def test_the_manifest_knows_bytes_and_the_baseline_of_each_split(tmp_path, documents, tokenizer):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    inputs = (str(tmp_path / "a.jsonl"),)
    prepare(PrepareOptions(inputs, tmp_path / "c", tokenizer=tokenizer.path, validation_fraction=0.2))
    for split, side in (("train", False), ("validation", True)):
        texts = [text for text in documents if is_held_out(text, 0.2, 0) == side]
        facts = shard_facts(tmp_path / f"c-{split}")
        assert facts.text_bytes == sum(len(text.encode()) for text in texts)
        assert facts.tokens == sum(len(tokenizer.encode(text)) + 1 for text in texts)
        assert facts.bytes_per_token == facts.text_bytes / facts.tokens
    assert shard_facts(tmp_path / "c-train").unigram_loss is None
    perplexity = unigram_perplexity([tmp_path / "c-train"], [tmp_path / "c-validation"], tokenizer.vocab_size)
    assert math.exp(facts.unigram_loss) == pytest.approx(perplexity, rel=1e-12)
    prepare(PrepareOptions(inputs, tmp_path / "whole", tokenizer=tokenizer.path))
    assert shard_facts(tmp_path / "whole").text_bytes == sum(len(text.encode()) for text in documents)
    assert shard_facts(tmp_path / "whole").unigram_loss is None


@pytest.mark.parametrize(("text", "lost"), [("a\tb\tc\n" * 90, True), ("a b c\n" * 90, False)])
def test_shards_in_which_an_earlier_release_lost_the_spaces_are_made_anew(tmp_path, text, lost):
    (tmp_path / "a.txt").write_text(text)
    options = PrepareOptions((str(tmp_path / "a.txt"),), tmp_path / "c", vocab_size=264)
    prepare(options)
    assert is_prepared(options)
    manifest = json.loads((tmp_path / "c.json").read_text())
    del manifest["round_trip"]
    (tmp_path / "c.json").write_text(json.dumps(manifest))
    assert is_prepared(options) != lost
