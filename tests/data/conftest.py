"""Small corpora, tokenizers and shards for the tests of the data side."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_sbn.data.tokenizer import Tokenizer, train_tokenizer

WORDS = "the cat sat on a mat\n\tdef area(width, height):\n    return width * height  # 42\n".split(" ")


def corpus_text(number: int) -> str:
    """A document of a few hundred characters, different for every number."""
    order = np.random.default_rng(number).integers(len(WORDS), size=60)
    return f"document {number}\n" + " ".join(WORDS[i] for i in order)


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Fifty documents of a few hundred characters, all different."""
    return [corpus_text(number) for number in range(50)]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    return train_tokenizer(documents, path, 340)


@pytest.fixture
def write_shard(tmp_path: Path) -> Callable[..., str]:
    """Writes a shard as Megatron's preprocess_data.py does (add_item per sequence, end_document): its prefix."""

    def write(
        name: str, documents: Sequence[Sequence[int]], dtype: type = np.int32, sequences_per_document: int = 1
    ) -> str:
        torch = pytest.importorskip("torch", reason="Megatron's builder takes tensors")
        prefix = str(tmp_path / name)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for document in documents:
            for part in np.array_split(np.asarray(document, dtype=np.int64), sequences_per_document):
                builder.add_item(torch.from_numpy(part.copy()))
            builder.end_document()
        builder.finalize(f"{prefix}.idx")
        return prefix

    return write
