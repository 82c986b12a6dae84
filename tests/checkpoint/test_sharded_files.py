"""Files of tensors: what is written is read back in any cut, by PyTorch's own reader too; covers are checked."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from megatron_sbn.checkpoint.manifest import Manifest, SavedRegion, SavedTensor
from megatron_sbn.checkpoint.regions import Region, flat_ranges, shard_ranges
from megatron_sbn.checkpoint.run_state import pack_groups, packed_shard, unpack_groups
from megatron_sbn.checkpoint.shards import Chunk, Reader, Written, merge, write_chunks
from megatron_sbn.errors import CheckpointError
from megatron_sbn.parallel.shard import LogicalShard, column_shard, gated_shard, row_shard

FULL = torch.arange(1.0, 14 * 6 + 1).view(14, 6)
VECTOR = torch.arange(5.0)


def written_by(folder: Path, cut: int, fragments: int) -> Manifest:
    """`gate_up` and `vector` as `cut` tensor-parallel ranks hold them, each cut into `fragments` runs by ZeRO."""
    parts = []
    for tensor_rank in range(cut):
        shard = gated_shard(tuple(FULL.shape), tensor_rank, cut)
        flat = shard.take(FULL).reshape(-1)
        step = -(-flat.numel() // fragments)
        for index in range(fragments):
            start, length = index * step, max(0, min(step, flat.numel() - index * step))
            found = list(flat_ranges(shard, start, length))
            chunks = [chunk("gate_up", shard, run, flat) for run in found]
            if tensor_rank == index == 0:
                chunks.append(Chunk("vector", (5,), Region((0,), (5,)), VECTOR))
            parts.append(write_chunks(folder, tensor_rank * fragments + index, chunks))
    return merge(parts)


def chunk(name: str, shard: LogicalShard, run: object, flat: Tensor) -> Chunk:
    values = flat[run.start : run.start + run.region.numel].view(run.region.sizes)
    return Chunk(name, shard.shape, run.region, values)


@pytest.mark.parametrize(("cut", "fragments"), [(1, 1), (1, 4), (7, 1), (7, 3)])
def test_any_cut_is_read_from_any_other(cut: int, fragments: int, tmp_path: Path) -> None:
    manifest = written_by(tmp_path, cut, fragments)
    with Reader(tmp_path, manifest) as reader:
        for make, size in ((gated_shard, 7), (row_shard, 2), (row_shard, 14), (column_shard, 3), (column_shard, 1)):
            for rank in range(size):
                shard = make(tuple(FULL.shape), rank, size)
                expected = shard.take(FULL)
                target = torch.full((expected.numel(),), -1.0)
                reader.fill(target, "gate_up", shard.shape, shard_ranges(shard))
                assert torch.equal(target.view(expected.shape), expected)
        target = torch.zeros(5)
        reader.fill(target, "vector", (5,), shard_ranges(row_shard((5,), 0, 1)))
        assert torch.equal(target, VECTOR)


@pytest.mark.parametrize(("cut", "fragments"), [(1, 1), (7, 3)])
def test_pytorch_reads_it_too(cut: int, fragments: int, tmp_path: Path) -> None:
    """Its reader reshards it, and its consolidation makes one plain file of it."""
    written_by(tmp_path, cut, fragments)
    state = {"gate_up": torch.zeros(14, 6), "vector": torch.zeros(5)}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert torch.equal(state["gate_up"], FULL)
    assert torch.equal(state["vector"], VECTOR)
    plain = tmp_path / "plain"
    plain.mkdir()
    consolidate_safetensors_files(str(tmp_path), str(plain), fqn_to_index_mapping={"gate_up": 1, "vector": 1})
    (file,) = plain.glob("*.safetensors")
    assert torch.equal(load_file(file)["gate_up"], FULL)


def test_what_a_recipe_lacks_or_has_otherwise_is_named(tmp_path: Path) -> None:
    manifest = written_by(tmp_path, 1, 1)
    with Reader(tmp_path, manifest) as reader:
        for name, shape, dtype, expected in (
            ("other", (3, 3), torch.float32, "other has no tensor, this recipe needs [3, 3]"),
            ("gate_up", (6, 14), torch.float32, "gate_up has shape [14, 6], this recipe needs [6, 14]"),
            ("gate_up", (14, 6), torch.uint8, "gate_up is saved as F32, not U8"),
        ):
            with pytest.raises(CheckpointError) as refusal:
                reader.fill(torch.zeros(9, dtype=dtype), name, shape, [])
            assert expected in str(refusal.value)


COVERS = {
    "a hole": [((0, 0), (2, 3)), ((2, 0), (1, 3))],
    "twice": [((0, 0), (2, 3)), ((1, 0), (3, 3))],
    "a hole and twice": [((0, 0), (3, 3)), ((2, 0), (1, 3))],
    "outside": [((0, 0), (4, 3)), ((4, 0), (1, 3))],
    "a vector": [((0,), (12,))],
    "nothing": [],
}


@pytest.mark.parametrize("cover", COVERS)
def test_boxes_that_do_not_cover_a_tensor_once_are_refused(cover: str, tmp_path: Path) -> None:
    boxes = tuple(SavedRegion(file="shard-00000-0.safetensors", offsets=o, sizes=s) for o, s in COVERS[cover])
    tensor = SavedTensor(dtype="F32", shape=(4, 3), boxes=boxes)
    with pytest.raises(CheckpointError, match="exactly once"):
        merge([Written({}, {"weight": tensor})])
    with pytest.raises(CheckpointError, match="exactly once"):
        Reader(tmp_path, Manifest(files={}, tensors={"weight": tensor}))


def test_a_file_whose_header_says_otherwise_is_refused(tmp_path: Path) -> None:
    manifest = written_by(tmp_path, 1, 1)
    (file,) = tmp_path.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["gate_up"]["shape"] = [6, 14]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    file.write_bytes(data[:8] + text[:size] + data[8 + size :])
    with Reader(tmp_path, manifest) as reader, pytest.raises(CheckpointError, match="not of the manifest's sizes"):
        reader.fill(torch.zeros(84), "gate_up", (14, 6), shard_ranges(row_shard((14, 6), 0, 1)))


@given(m=st.integers(1, 32), groups=st.integers(1, 4), size=st.integers(1, 3), data=st.data())
@settings(max_examples=60, deadline=None)
def test_packed_masks_are_cut_where_weights_are(m: int, groups: int, size: int, data: st.DataObject) -> None:
    """Whole groups stay whole bytes: a rank's packed mask is the same part of the whole packed mask."""
    columns = m * groups * size
    mask = torch.rand(6, columns, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) < 0.5
    packed = pack_groups(mask, m)
    assert packed.shape == (6, columns // m * -(-m // 8))
    assert torch.equal(unpack_groups(packed, m), mask)
    for make, count in ((column_shard, size), (row_shard, 3), (gated_shard, 3)):
        for rank in range(count):
            shard = make((6, columns), rank, count)
            assert torch.equal(packed_shard(shard, m).take(packed), pack_groups(shard.take(mask), m))
